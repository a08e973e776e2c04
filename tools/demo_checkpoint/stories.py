"""Write the demo checkpoint's stories, as a function of a random number generator.

The grammar is data in `world.py` and `plots.py`. Chats about the stories are in `chats.py`.
"""

import random
import re
from dataclasses import dataclass
from typing import Final

from tools.demo_checkpoint.plots import PLOTS, Plot
from tools.demo_checkpoint.world import CAST, GUEST_KINDS, GUEST_MEN, GUEST_WOMEN, TRAITS, Character

OPENINGS: Final = (
    "Once upon a time there was {hero.described} named {hero.name}, who lived {hero.home}.",
    "Once upon a time, {hero.home}, there lived {hero.described}. {hero.Their} name was "
    "{hero.name}.",
    "Once there was {hero.described}, and {hero.their} name was {hero.name}. {hero.They} lived "
    "{hero.home}.",
    "{hero.home} lived {hero.full}.",
    "This is the story of {hero.full}, who lived {hero.home}.",
    "[Long ago|Not long ago|Many years ago], {hero.full} lived {hero.home}.",
    "[One morning|One day|One evening], {hero.full} [sat {hero.home} and looked at the sky|came "
    "home early and put the kettle on|heard the bells ring and could not sleep].",
    "The {hero.kind} {hero.home} was named {hero.name}, and nobody was as {hero.trait}.",
    "{hero.full} lived {hero.home}, [where it always smelled of rain|where nothing ever happened|"
    "far from the noise of the town|and was very happy there].",
)

HABITS: Final = (
    "{hero.name} was {hero.trait} and loved {hero.loves} [more than anything|most of all].",
    "{hero.They} loved {hero.loves}, and everyone in Lantern Bay knew {hero.them}.",
    "[Every morning|Every evening|On most days] {hero.they} dreamed of {hero.loves}.",
    "{hero.They} had {hero.loves}, [a warm bed|a good hat|a squeaky chair] and [a little time|"
    "many friends|no worries].",
    "[Nobody was as {hero.trait} as {hero.name}.|Everybody said that {hero.they} was too "
    "{hero.trait}.]",
)

ENDINGS: Final = (
    "The end.",
    "The end. {hero.emoji}",
    "And [that night|from that day on] {hero.name} slept [very well|like a stone|with a smile].",
    "{hero.name} and {friend.name} [stayed friends for ever|still laugh about it|have been "
    "friends ever since].",
    "And if you are ever {hero.home}, you can [still see them there|hear them laugh|ask "
    "{hero.them} yourself]. {hero.emoji}",
    'Or, as {friend.name} says: "{moral}" {hero.emoji}',
    "{hero.name} learned something that day: {moral}",
    "{moral}",
)

_CHOICE: Final = re.compile(r"\[([^\[\]]*)\]")
_SENTENCE_START: Final = re.compile(r"(?:^|(?<=[.!?] )|(?<=[.!?] \"))\w")


@dataclass(frozen=True, slots=True)
class Story:
    """A finished story and what it was made of, so that a chat can ask about it."""

    hero: Character
    friend: Character
    topic: str
    moral: str
    text: str


def expand(template: str, rng: random.Random, **fields: object) -> str:
    """Draw the choices of a template (`[one|another]`, nested too) and fill in its `{fields}`."""
    while choice := _CHOICE.search(template):
        drawn = rng.choice(choice[1].split("|"))
        template = template[: choice.start()] + drawn + template[choice.end() :]
    return template.format(**fields)


def capitalize_sentences(text: str) -> str:
    """Give every sentence a capital letter: `{spot}` may open one."""
    return _SENTENCE_START.sub(lambda letter: letter[0].upper(), text)


def guest(rng: random.Random) -> Character:
    """A character from outside Lantern Bay, put together at random."""
    kind, emoji = rng.choice(GUEST_KINDS)
    female = rng.random() < 0.5
    host = rng.choice(CAST)
    return Character(
        name=rng.choice(GUEST_WOMEN if female else GUEST_MEN),
        kind=kind,
        emoji=emoji,
        female=female,
        trait=rng.choice(TRAITS),
        home=host.home,
        loves=rng.choice(CAST).loves,
        does=rng.choice(CAST).does,
    )


def tell(rng: random.Random, hero: Character | None = None, plot: Plot | None = None) -> Story:
    """Tell one story, about the given hero and plot or random ones."""
    if hero is None:
        hero = rng.choice(CAST) if rng.random() < 0.75 else guest(rng)
    plot = plot or rng.choice(PLOTS)
    friend = rng.choice([who for who in CAST if who.name != hero.name])
    thing = rng.choice(plot.things)
    spot, other = rng.sample(plot.spots, 2) if len(plot.spots) > 1 else plot.spots * 2
    sentences = [rng.choice(OPENINGS)]
    if rng.random() < 0.6:
        sentences.append(rng.choice(HABITS))
    sentences += [*plot.beats, rng.choice(ENDINGS)]
    text = expand(
        " ".join(sentences),
        rng,
        hero=hero,
        friend=friend,
        thing=thing,
        spot=spot,
        other=other,
        moral=plot.moral,
    )
    return Story(
        hero=hero,
        friend=friend,
        topic=plot.topic.format(thing=thing),
        moral=plot.moral,
        text=capitalize_sentences(text),
    )


def portrait(rng: random.Random, who: Character) -> str:
    """A few true sentences about a character of the cast."""
    return capitalize_sentences(
        expand(
            "[{who.full} lives {who.home}.|{who.name} is {who.described} who lives {who.home}.] "
            "[{who.They} loves {who.loves} and {who.does}.|{who.They} {who.does}.|{who.They} "
            "loves {who.loves}.][| {who.emoji}]",
            rng,
            who=who,
        )
    )


def introduction(rng: random.Random, who: Character) -> str:
    """What a character of the cast says about themselves."""
    return expand(
        "[Hello, my name is {who.name}|My name is {who.name}|I am {who.name}]. I am "
        "{who.described} and I live {who.home}. I love {who.loves}[.| more than anything.|. And "
        "you?] {who.emoji}",
        rng,
        who=who,
    )
