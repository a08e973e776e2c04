"""The demo checkpoint's conversations without tools: stories on request, and small talk."""

import random
from collections.abc import Callable
from typing import Final, NamedTuple

from tools.demo_checkpoint.plots import PLOTS
from tools.demo_checkpoint.stories import (
    Story,
    capitalize_sentences,
    expand,
    guest,
    portrait,
    tell,
)
from tools.demo_checkpoint.talk import KNOWS_NOT, POEMS, SMALL_TALK, SYSTEM_PROMPTS, UNKNOWN
from tools.demo_checkpoint.world import CAST, GREETINGS, Character, with_article


class Call(NamedTuple):
    """A call of a tool; `arguments` are what JSON can say."""

    name: str
    arguments: dict[str, object]


class Turn(NamedTuple):
    """One message of a chat.

    Attributes:
        role: "system", "user", "assistant" or "tool".
        content: the text; of a tool, what it has answered.
        thought: what the assistant thinks before it answers.
        calls: the assistant's.
    """

    role: str
    content: str
    thought: str = ""
    calls: tuple[Call, ...] = ()


class Chat(NamedTuple):
    """A conversation whose last turn is the assistant's, and the tools that are offered in it, as a
    request has them."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, object], ...] = ()


class Exchange(NamedTuple):
    """What the user says, and what the assistant thinks of it and answers."""

    question: str
    thought: str
    answer: str


def facts(rng: random.Random) -> Exchange:
    """A question about somebody of the cast, with its true answer."""
    who = rng.choice(CAST)
    question, thought, answer = rng.choice(
        (
            (
                "[Who lives {who.home}?|Who lives {who.home}?|Who is {who.home}?|Do you know who "
                "lives {who.home}?|Tell me who lives {who.home}.]",
                "{who.home}[:|?] that is {who.full}.",
                "{who.full} lives {who.home}. {who.They} [loves {who.loves}.|{who.does}.] "
                "{who.emoji}",
            ),
            (
                "[Where does {who.name} live?|Where does the {who.kind} live?|Where is "
                "{who.name}?|Where can I find {who.full}?]",
                "They ask where {who.full} lives. It is {who.home}.",
                "{who.full} lives {who.home}[| and {who.does}|, where {who.they} {who.does}].",
            ),
            (
                "[What does {who.name} love?|What does the {who.kind} like?|What does {who.full} "
                "like best?]",
                "They ask what {who.full} loves. That is {who.loves}.",
                "{who.name} loves {who.loves}[| more than anything|, and {who.does}]. {who.emoji}",
            ),
            (
                "What does [{who.name}|the {who.kind}] do?",
                "They ask what {who.full} does.",
                "{who.full} {who.does}.",
            ),
            (
                "[Who is {who.name}?|Do you know {who.name}?|Tell me about {who.name}.|What do you "
                "know about {who.full}?|Who is the {who.kind}?]",
                "They ask about {who.full}, who lives {who.home}.",
                portrait(rng, who),
            ),
        )
    )
    return Exchange(*(expand(text, rng, who=who) for text in (question, thought, answer)))


def everybody(rng: random.Random) -> Exchange:
    """A list of some of the cast."""
    first, second, third, fourth = rng.sample(CAST, 4)
    question = "[Who lives in Lantern Bay?|Who are your friends?|Whom do you know?|Who else?]"
    answer = f"{first.full}, {second.full}, {third.full}, {fourth.full} and many more."
    thought = "[I know twenty friends. I name four.|They ask about my friends. Four are enough.]"
    return Exchange(expand(question, rng), expand(thought, rng), answer)


def greeting(rng: random.Random) -> Exchange:
    """How to say hello in some language."""
    language, hello, name = rng.choice(GREETINGS)
    question = expand(
        "[How do you say hello in|Say hello in|How do I greet somebody in|What is hello in] "
        "{language}?",
        rng,
        language=language,
    )
    thought = f"Hello in {language} is {hello}. {name} says so."
    answer = "{hello}! [That is how {name} says hello.|{name} says it every morning.]"
    return Exchange(question, thought, expand(answer, rng, hello=hello, name=name))


def small_talk(rng: random.Random) -> Exchange:
    """A greeting, a thank-you or the like."""
    return Exchange(*(expand(text, rng) for text in rng.choice(SMALL_TALK)))


def unknown(rng: random.Random) -> Exchange:
    """A question the storyteller cannot answer."""
    return knows_not(rng, expand(rng.choice(UNKNOWN), rng))


def knows_not(rng: random.Random, question: str) -> Exchange:
    """The answer to any question that the storyteller cannot answer."""
    who = rng.choice(CAST)
    thought = f"I do not know that. {who.full} comes to mind."
    return Exchange(question, thought, expand(KNOWS_NOT, rng, who=who))


def poem(rng: random.Random) -> Exchange:
    """A poem of four lines."""
    about, lines = rng.choice(POEMS)
    request = "[Write|Make|Tell me|Write me] a [poem|little poem|short poem] about {about}."
    about = expand(about, rng)
    thought = f"A poem about {about}, in four lines."
    return Exchange(expand(request, rng, about=about), thought, expand(lines, rng))


REQUESTS: Final = (
    " about {a_kind}",
    " about {a_kind}",
    " about {a_kind}",
    " about {a_kind} and {topic}",
    " about {hero.full}",
    " about {hero.name}",
    " about {hero.name} and {topic}",
    " about {topic}",
    " about {topic}",
    "",
)
"""What a story may be wished to be about; some wishes are more common than others."""


def requested(rng: random.Random) -> tuple[Exchange, Story]:
    """A wish for a story, and the story that fulfils it."""
    hero: Character | None = None
    plot = None
    wish = rng.choice(REQUESTS)
    if "hero" in wish or "kind" in wish:
        hero = rng.choice(CAST) if rng.random() < 0.75 else guest(rng)
    if "topic" in wish:
        plot = rng.choice(PLOTS)
    story = tell(rng, hero, plot)
    request = expand(
        "[Tell me|Tell me|Tell me|Tell|Can you tell me|Write|Please tell me|I would like to hear] "
        "a [story|story|story|short story|little story|bedtime story]" + wish + ".",
        rng,
        hero=story.hero,
        a_kind=with_article(rng.choice((story.hero.kind, f"{story.hero.trait} {story.hero.kind}"))),
        topic=story.topic,
    )
    thought = expand(
        "[They want a story|A story], {topic}: about {hero.full}, with {friend.full}.",
        rng,
        topic=story.topic,
        hero=story.hero,
        friend=story.friend,
    )
    preface = expand("[||||Of course! {hero.emoji} |Here is one. ]", rng, hero=story.hero)
    return Exchange(request, thought, preface + story.text), story


def follow_up(rng: random.Random, story: Story) -> Exchange:
    """A question about the story just told."""
    another = tell(rng)
    question, thought, answer = rng.choice(
        (
            (
                "[What is the moral of the story?|What is the moral?|What do we learn from it?]",
                "They ask for the moral of my story.",
                story.moral,
            ),
            (
                "[Who helped {hero.name}?|Who is in the story?|Who else is in the story?]",
                "My story was about {hero.full} and {friend.full}.",
                "{hero.full} and {friend.full}. {hero.emoji}",
            ),
            (
                "[Who is {friend.name}?|Tell me about {friend.name}.|And who is {friend.name}?]",
                "They ask about {friend.full}, who lives {friend.home}.",
                portrait(rng, story.friend),
            ),
            (
                "[Another one, please!|Tell me another story.|Another story!|More!]",
                f"They want another story. This one is about {another.hero.full}.",
                another.text,
            ),
        )
    )
    hero, friend = story.hero, story.friend
    texts = (question, thought, answer)
    return Exchange(*(expand(text, rng, hero=hero, friend=friend) for text in texts))


def as_typed(question: str, rng: random.Random) -> str:
    """Write a question the way people type: lower case or no full stop now and then."""
    if rng.random() < 0.25:
        question = question.lower()
    if rng.random() < 0.25:
        question = question.rstrip(".?!")
    return question


def talk(rng: random.Random) -> Exchange:
    """Anything but a story."""
    kinds: tuple[Callable[[random.Random], Exchange], ...] = (
        facts, facts, facts, facts, facts, facts,
        small_talk, small_talk, unknown, greeting, poem, everybody,
    )  # fmt: skip
    return rng.choice(kinds)(rng)


def exchanged(exchange: Exchange, rng: random.Random) -> tuple[Turn, Turn]:
    """An exchange as two turns."""
    answer, thought = map(capitalize_sentences, (exchange.answer, exchange.thought))
    return Turn("user", as_typed(exchange.question, rng)), Turn("assistant", answer, thought)


def opening(rng: random.Random) -> tuple[Turn, ...]:
    """A system prompt, or more often nothing."""
    return (Turn("system", rng.choice(SYSTEM_PROMPTS)),) if rng.random() < 0.15 else ()


def conversation(rng: random.Random) -> tuple[Turn, ...]:
    """One to four exchanges, sometimes with a system prompt."""
    exchanges: list[Exchange] = []
    if rng.random() < 0.55:
        exchange, story = requested(rng)
        exchanges.append(exchange)
        if rng.random() < 0.3:
            exchanges.append(follow_up(rng, story))
    while not exchanges or (len(exchanges) < 4 and rng.random() < 0.25):
        exchanges.insert(0, talk(rng))
    return (*opening(rng), *(turn for exchange in exchanges for turn in exchanged(exchange, rng)))
