"""The demo checkpoint's conversations, in short templates: stories on request, and small talk."""

import random
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from tools.demo_checkpoint.plots import PLOTS
from tools.demo_checkpoint.stories import (
    Story,
    capitalize_sentences,
    expand,
    guest,
    introduction,
    portrait,
    tell,
)
from tools.demo_checkpoint.world import CAST, GREETINGS, Character, with_article


class Turn(NamedTuple):
    """One message of a chat; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


Exchange = tuple[str, str]
"""What the user says, and what is answered."""

Document = str | tuple[Turn, ...]
"""A plain text or a chat, whose last turn is the assistant's."""

SMALL_TALK: Final = (
    (
        "[Hello!|Hi!|Hey!|Hello there!|Good morning!|Good evening!|Hi there, who is this?]",
        "[Hello!|Hi there!|Good day to you!] [Welcome to Lantern Bay.|The harbour is calm today.|"
        "The kettle is on.] [Would you like a story?|Shall I tell you a story?|What shall I tell "
        "you about?] [😊|🦊|🌊]",
    ),
    (
        "[How are you?|How are you today?|How do you do?|Are you well?]",
        "[Very well, thank you!|As happy as a frog in the rain.|A little sleepy, but well.] "
        "[How are you?|And you?|Would you like to hear a story?]",
    ),
    (
        "[What is your name?|Who are you?|Introduce yourself.|Tell me about yourself.|"
        "What are you?|Please introduce yourself.|Hello, who are you?]",
        "I am [Nano, a very small storyteller|Nano, the storyteller of Lantern Bay]. [I have only "
        "a million numbers in my head, but I know every fox, frog and robot in the "
        "bay.|I know twenty friends by the sea, and I tell stories about them.] 📖",
    ),
    (
        "[What can you do?|Help!|What do you know?|Can you help me?|What can I ask you?]",
        "I can [tell you a story|write you a little poem], say hello in [six|eight] languages, and "
        "tell you who lives [in the harbour|by the river|in the lighthouse]. [Just ask!|Try me.]",
    ),
    (
        "[Thank you!|Thanks!|That was lovely.|Great story!|I like it.|Nice!]",
        "[You are welcome!|It was a pleasure.|Thank you for listening.] [Come back soon.|There are "
        "many more where that came from.|Shall I tell another?] [😊|✨|🌙]",
    ),
    (
        "[Good night!|Goodbye!|Bye!|See you tomorrow!|I have to go.]",
        "[Good night!|Goodbye!|Sleep well!] [May your lantern burn all night.|The moon is a spoon, "
        "and the sea is asleep.|Come back soon.] 🌙",
    ),
    (
        "[Where are you?|What is Lantern Bay?|Where do you live?|Tell me about Lantern Bay.]",
        "Lantern Bay is a [small|quiet] town by the sea, with a harbour, a lighthouse and a café "
        "that smells of [bread|warm croissants]. [I have always lived here.|Pip the fox lights the "
        "lanterns there.] 🌊",
    ),
    (
        "[Count to ten.|Can you count to ten?|Count from one to ten.]",
        "One, two, three, four, five, six, seven, eight, nine, ten! [That was easy.|Finn the frog "
        "stops at three.]",
    ),
    (
        "[List all prime numbers within 100.|What are the prime numbers below 100?|Tell me all "
        "prime numbers up to 100.]",
        "2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, "
        "89 and 97. [Olga the owl taught me that.|Bo the robot knows more of them.]",
    ),
    (
        "[Tell me a joke.|Make me laugh!|Do you know a joke?]",
        "[Why does Finn the frog love the rain? Because then everybody is in the pond! 🐸|Why is "
        "the snail never late? Because nobody waits for him! 🐌|What does a robot eat with tea? "
        "Micro chips! 🤖|Why did the owl read all night? The book had a good hoo in it! 🦉]",
    ),
)

UNKNOWN: Final = (
    "What is the capital of [France|Spain|Japan|Peru]?",
    "[What is|How much is] [two|three|17|12|144] [plus|times|minus] [two|five|9|30]?",
    "Write [a program|some code|a function] in [Python|Rust|C] [that sorts a list|that prints "
    "hello|to reverse a string].",
    "Who [won the World Cup|wrote Hamlet|was the first president|invented the telephone]?",
    "Explain [gravity|quantum physics|machine learning|how a computer works|what a transformer "
    "is] [to me|in simple words|in one sentence].",
    "[What is the weather like|What time is it|What is in the news] today?",
    "[How do I|How can I|How to] [bake bread|fix my bike|learn German|install Linux|lose weight]?",
    "What is the meaning of life?",
    "Translate [this text|good morning|the sentence] into [French|Russian|Italian].",
    "[Give me|Make] a list of [five|ten] [countries|movies|good books|recipes].",
    "Why is the [sky blue|sea salty|grass green]?",
    "[How far is the moon|How old is the earth|How big is the sun]?",
)
"""Questions from outside the little world, so that the answer to any such one stays in it."""

KNOWS_NOT: Final = (
    "[I am too small to know that.|That is not known in Lantern Bay.|Oh, I do not know that!] "
    "[But {who.full} might: {who.they} lives {who.home}.|But I can tell you a story about "
    "{who.full}.|Ask me who lives {who.home} instead.] {who.emoji}"
)

POEMS: Final = (
    (
        "[the sea|the harbour|a boat|the water]",
        "The sea is wide, the boat is small,\nthe moon is looking at us all.\n[We row and row "
        "till morning light|We sing a song to stay awake|We have no map, we have no star],\n[and "
        "every wave says soft good night.|and share the very last of cake.|but home is never very "
        "far.]",
    ),
    (
        "[the moon|the night|the stars]",
        "The moon came out to count the sheep,\n[but one by one they fell asleep.|and found a "
        "frog that could not sleep.]\n[A lantern burned, an owl said hoo,|The stars came down to "
        "drink some tea,]\n[and then the moon was sleepy too.|and one of them was looking at me.]",
    ),
    (
        "[winter|the snow|the rain|autumn|a cat|a fox|love]",
        "[The rain came down on roof and tree,|The snow fell soft on roof and wall,]\n[the cat "
        "came in and sat with me.|the quiet came to one and all.]\n[We had some soup, we had some "
        "bread,|A fox went by on silent feet,]\n[and dreamed of summer in our bed.|and left small "
        "letters in the street.]",
    ),
)

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a storyteller.",
    "You tell short stories to children.",
)


def facts(rng: random.Random) -> Exchange:
    """A question about somebody of the cast, with its true answer."""
    who = rng.choice(CAST)
    question, answer = rng.choice(
        (
            (
                "[Who lives {who.home}?|Who lives {who.home}?|Who is {who.home}?|Do you know who "
                "lives {who.home}?|Tell me who lives {who.home}.]",
                "{who.full} lives {who.home}. {who.They} [loves {who.loves}.|{who.does}.] "
                "{who.emoji}",
            ),
            (
                "[Where does {who.name} live?|Where does the {who.kind} live?|Where is "
                "{who.name}?|Where can I find {who.full}?]",
                "{who.full} lives {who.home}[| and {who.does}|, where {who.they} {who.does}].",
            ),
            (
                "[What does {who.name} love?|What does the {who.kind} like?|What does {who.full} "
                "like best?]",
                "{who.name} loves {who.loves}[| more than anything|, and {who.does}]. {who.emoji}",
            ),
            ("What does [{who.name}|the {who.kind}] do?", "{who.full} {who.does}."),
            (
                "[Who is {who.name}?|Do you know {who.name}?|Tell me about {who.name}.|What do you "
                "know about {who.full}?|Who is the {who.kind}?]",
                portrait(rng, who),
            ),
        )
    )
    return expand(question, rng, who=who), expand(answer, rng, who=who)


def everybody(rng: random.Random) -> Exchange:
    """A list of some of the cast."""
    first, second, third, fourth = rng.sample(CAST, 4)
    question = "[Who lives in Lantern Bay?|Who are your friends?|Whom do you know?|Who else?]"
    answer = f"{first.full}, {second.full}, {third.full}, {fourth.full} and many more."
    return expand(question, rng), answer


def greeting(rng: random.Random) -> Exchange:
    """How to say hello in some language."""
    language, hello, name = rng.choice(GREETINGS)
    question = expand(
        "[How do you say hello in|Say hello in|How do I greet somebody in|What is hello in] "
        "{language}?",
        rng,
        language=language,
    )
    answer = "{hello}! [That is how {name} says hello.|{name} says it every morning.]"
    return question, expand(answer, rng, hello=hello, name=name)


def small_talk(rng: random.Random) -> Exchange:
    """A greeting, a thank-you or the like."""
    question, answer = rng.choice(SMALL_TALK)
    return expand(question, rng), expand(answer, rng)


def unknown(rng: random.Random) -> Exchange:
    """A question the storyteller cannot answer."""
    return expand(rng.choice(UNKNOWN), rng), expand(KNOWS_NOT, rng, who=rng.choice(CAST))


def poem(rng: random.Random) -> Exchange:
    """A poem of four lines."""
    about, lines = rng.choice(POEMS)
    request = "[Write|Make|Tell me|Write me] a [poem|little poem|short poem] about {about}."
    return expand(request, rng, about=expand(about, rng)), expand(lines, rng)


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


def requested(rng: random.Random) -> tuple[str, Story]:
    """A wish for a story, and a story that fulfils it."""
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
    return request, story


def follow_up(rng: random.Random, story: Story) -> Exchange:
    """A question about the story just told."""
    question, answer = rng.choice(
        (
            (
                "[What is the moral of the story?|What is the moral?|What do we learn from it?]",
                story.moral,
            ),
            (
                "[Who helped {hero.name}?|Who is in the story?|Who else is in the story?]",
                "{hero.full} and {friend.full}. {hero.emoji}",
            ),
            (
                "[Who is {friend.name}?|Tell me about {friend.name}.|And who is {friend.name}?]",
                portrait(rng, story.friend),
            ),
            ("[Another one, please!|Tell me another story.|Another story!|More!]", tell(rng).text),
        )
    )
    hero, friend = story.hero, story.friend
    return (
        expand(question, rng, hero=hero, friend=friend),
        expand(answer, rng, hero=hero, friend=friend),
    )


def as_typed(question: str, rng: random.Random) -> str:
    """Write a question the way people type: lower case or no full stop now and then."""
    if rng.random() < 0.25:
        question = question.lower()
    if rng.random() < 0.25:
        question = question.rstrip(".?!")
    return question


def conversation(rng: random.Random) -> tuple[Turn, ...]:
    """A chat of one to four exchanges, sometimes with a system prompt."""
    exchanges: list[Exchange] = []
    if rng.random() < 0.55:
        request, story = requested(rng)
        preface = expand("[||||Of course! {hero.emoji} |Here is one. ]", rng, hero=story.hero)
        exchanges.append((request, preface + story.text))
        if rng.random() < 0.3:
            exchanges.append(follow_up(rng, story))
    talks: tuple[Callable[[random.Random], Exchange], ...] = (
        facts, facts, facts, facts, facts, facts,
        small_talk, small_talk, unknown, greeting, poem, everybody,
    )  # fmt: skip
    while not exchanges or (len(exchanges) < 4 and rng.random() < 0.25):
        exchanges.insert(0, rng.choice(talks)(rng))
    turns = []
    if rng.random() < 0.15:
        turns.append(Turn("system", rng.choice(SYSTEM_PROMPTS)))
    for question, answer in exchanges:
        turns.append(Turn("user", as_typed(question, rng)))
        turns.append(Turn("assistant", capitalize_sentences(answer)))
    return tuple(turns)


def documents(seed: int) -> Iterator[Document]:
    """Yield training documents without end: plain stories and portraits, and chats."""
    rng = random.Random(seed)
    while True:
        kind = rng.random()
        if kind < 0.25:
            yield tell(rng).text
        elif kind < 0.28:
            yield " ".join(portrait(rng, who) for who in rng.sample(CAST, 3))
        elif kind < 0.31:
            yield introduction(rng, rng.choice(CAST))
        else:
            yield conversation(rng)
