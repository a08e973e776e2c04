"""The demo checkpoint's chats with tools: what users want of tools, and what the tools answer.

Tools are called and described in the words of many programs, and some have made-up names: what the
model is to learn is to copy names and values from what it is given.
"""

import json
import random
from collections.abc import Callable
from typing import Final, NamedTuple

from tools.demo_checkpoint.chats import (
    Call,
    Chat,
    Turn,
    exchanged,
    knows_not,
    opening,
    requested,
    talk,
)
from tools.demo_checkpoint.stories import expand
from tools.demo_checkpoint.world import CAST

PLACES: Final = (
    "Bern", "Paris", "London", "Berlin", "Madrid", "Rome", "Oslo", "Lisbon", "Vienna", "Prague",
    "Tokyo", "Kyoto", "Beijing", "Seoul", "Delhi", "Cairo", "Lima", "Quito", "Boston", "New York",
    "San Francisco", "Toronto", "Sydney", "Zürich", "München", "São Paulo", "Lantern Bay",
    "the harbour", "the lighthouse", "the mountain cave",
)  # fmt: skip
SYLLABLES: Final = (
    "ba", "den", "dor", "el", "fen", "gar", "ham", "is", "ka", "len", "lo", "mi", "mur", "na", "os",
    "pel", "ra", "ros", "sal", "ta", "tor", "ul", "ven", "wick", "yo", "zan",
)  # fmt: skip
COLOURS: Final = ("red", "blue", "green", "yellow", "white", "golden", "pink")
VERBS: Final = ("get", "find", "set", "check", "open", "count", "list", "read", "make", "show")
NOUNS: Final = (
    "boat", "book", "bridge", "cake", "clock", "door", "garden", "key", "letter", "map", "moon",
    "news", "order", "price", "river", "room", "song", "stone", "table", "ticket", "train", "user",
)  # fmt: skip


class Wish(NamedTuple):
    """Something that a user wants of a tool.

    Attributes:
        tool: the tool's name.
        about: what the tool does, in the words of who offers the tool.
        question: what the user says.
        arguments: the tool's parameters, and what they have to be here.
        found: what the tool answers.
        answer: what the assistant makes of that.
    """

    tool: str
    about: str
    question: str
    arguments: dict[str, str | int]
    found: dict[str, str | int]
    answer: str

    @property
    def call(self) -> Call:
        """What the assistant writes."""
        return Call(self.tool, dict(self.arguments))

    @property
    def thought(self) -> str:
        """What the assistant thinks before the call."""
        if not self.arguments:
            return f"I can call {self.tool}."
        values = " and ".join(f"{name} {value}" for name, value in self.arguments.items())
        return f"I can call {self.tool} with {values}."


def invented(rng: random.Random) -> str:
    """A made-up name."""
    return "".join(rng.sample(SYLLABLES, rng.randint(2, 3))).capitalize()


def somewhere(rng: random.Random) -> str:
    """A place, often a made-up one."""
    return invented(rng) if rng.random() < 0.4 else rng.choice(PLACES)


def weather(rng: random.Random) -> Wish:
    place, degrees = somewhere(rng), rng.randint(-9, 35)
    sky = expand("[rain|snow|fog|sunshine|a storm|clouds|sunny|cloudy|wind]", rng)
    question = (
        "[What is the weather like in|What is the weather in|How is the weather in|What's the "
        "weather in|Tell me the weather in|Is it cold in|Will it rain in] {place}[| today]?"
    )
    return Wish(
        expand("[get_weather|get_weather|get_current_weather|weather|look_up_weather]", rng),
        expand(
            "[Get the|The|Looks up the|Get the current] weather [in|of|for] [a city|a given city|"
            "a place|a location][|.]",
            rng,
        ),
        expand(question, rng, place=place),
        {expand("[city|city|location|place|town]", rng): place},
        {expand("[temperature|degrees|celsius]", rng): degrees, "sky": sky},
        f"In {place} it is {degrees} degrees: {sky}.",
    )


def clock(rng: random.Random) -> Wish:
    place, time = somewhere(rng), f"{rng.randrange(24)}:{rng.randrange(60):02}"
    return Wish(
        expand("[get_time|get_current_time|clock|time_in]", rng),
        expand("[Get the|The|Tells the] [current |]time in [a city|a place][|.]", rng),
        expand(
            "[What time is it in|What is the time in|How late is it in|Tell me the time in] "
            "{place}[| now]?",
            rng,
            place=place,
        ),
        {expand("[city|place|location|timezone]", rng): place},
        {"time": time},
        f"It is {time} in {place}.",
    )


def sum_of(rng: random.Random) -> Wish:
    most = rng.choice((10, 100, 1000))
    a, b = rng.randrange(most), rng.randrange(most)
    word, name, result = rng.choice(
        (("plus", "add", a + b), ("times", "multiply", a * b), ("minus", "subtract", a - b))
    )
    return Wish(
        expand("[{name}|{name}|{name}_numbers]", rng, name=name),
        expand("[Can {name}|To {name}] two [numbers|integers][|.]", rng, name=name),
        expand("[What is|How much is|Compute] {a} {word} {b}?", rng, a=a, b=b, word=word),
        {"a": a, "b": b},
        {expand("[result|value]", rng): result},
        f"{a} {word} {b} is {result}.",
    )


def dice(rng: random.Random) -> Wish:
    sides = rng.choice((4, 6, 8, 12, 20, rng.randint(2, 100)))
    shown = rng.randint(1, sides)
    return Wish(
        expand("[roll_dice|roll_die|dice]", rng),
        expand("[Roll|Rolls|Throw] a die[|.]", rng),
        expand("[Roll|Throw|Please roll] a die with {sides} sides.", rng, sides=sides),
        {"sides": sides},
        {"shows": shown},
        f"It shows {shown}. 🎲",
    )


def lantern(rng: random.Random) -> Wish:
    colour = rng.choice(COLOURS)
    return Wish(
        expand("[light_lantern|light_lamp|light]", rng),
        expand("[Light|Lights] a lantern[|.]", rng),
        expand("[Light|Please light|Can you light] a {colour} lantern.", rng, colour=colour),
        {expand("[colour|color]", rng): colour},
        {"state": "lit"},
        f"The {colour} lantern is lit. 🏮",
    )


def bell(rng: random.Random) -> Wish:
    return Wish(
        expand("[ring_bell|ring|bell]", rng),
        expand("[Ring|Rings] the bell[| of the harbour][|.]", rng),
        expand("[Ring the bell!|Please ring the bell.|Can you ring the bell?]", rng),
        {},
        {"state": "rung"},
        "Ding dong! 🔔",
    )


def letter(rng: random.Random) -> Wish:
    to = rng.choice(CAST).name if rng.random() < 0.6 else invented(rng)
    text = expand(
        "[come to tea|happy birthday|I have found your {noun}|good night|the {noun} is here|"
        "look at the {noun}]",
        rng,
        noun=rng.choice(NOUNS),
    )
    return Wish(
        expand("[send_letter|send_message|write_letter|send_mail]", rng),
        expand("[Send|Sends] a [letter|message] to somebody[|.]", rng),
        expand(
            "[Write to|Send a letter to|Send a message to] {to}: {text}.", rng, to=to, text=text
        ),
        {expand("[to|name|recipient]", rng): to, expand("[text|message|body]", rng): text},
        {"state": "sent"},
        f"The letter to {to} is on its way. ✉",
    )


def search(rng: random.Random) -> Wish:
    who = rng.choice(CAST)
    query = rng.choice((who.loves, who.name, f"the {who.kind}", invented(rng)))
    return Wish(
        expand("[search|search|web_search|look_up|find]", rng),
        expand("[Search|Searches|Look up something in] the [web|library|internet][|.]", rng),
        expand("[Search for|Look up|Search the web for|Please look up] {query}.", rng, query=query),
        {expand("[query|query|q|words]", rng): query},
        {"result": f"{who.full} {who.does}"},
        f"I have found this: {who.full} {who.does}.",
    )


def anything(rng: random.Random) -> Wish:
    """Of a tool that may do anything, called by its name."""
    tool = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
    names = rng.sample(("name", "id", "size", "place", "kind", "count", "value"), rng.randint(1, 2))
    arguments = {
        name: rng.randrange(100) if name in ("id", "size", "count") else invented(rng).lower()
        for name in names
    }
    said = " and ".join(f"{name} {value}" for name, value in arguments.items())
    found = rng.choice((invented(rng).lower(), rng.randrange(1000)))
    return Wish(
        tool,
        expand(
            "[{words}|{words}.|{words} for you]", rng, words=tool.replace("_", " ").capitalize()
        ),
        expand("[Call|Use|Please call] {tool} with {said}.", rng, tool=tool, said=said),
        dict(arguments),
        {"result": found},
        f"{tool} says {found}.",
    )


Kind = Callable[[random.Random], Wish]
KINDS: Final[tuple[Kind, ...]] = (
    weather, weather, weather, clock, sum_of, dice, lantern, bell, letter, search, anything,
    anything,
)  # fmt: skip


def offered(wish: Wish, rng: random.Random) -> dict[str, object]:
    """The wish's tool as a request offers it."""
    properties: dict[str, dict[str, str]] = {}
    for name, value in wish.arguments.items():
        properties[name] = {"type": "integer" if isinstance(value, int) else "string"}
        if rng.random() < 0.2:
            properties[name]["description"] = expand("[The {name}|{name}.]", rng, name=name)
    parameters: dict[str, object] = {"type": "object", "properties": properties}
    if properties and rng.random() < 0.6:
        parameters["required"] = list(properties)
    function: dict[str, object] = {"name": wish.tool}
    if rng.random() < 0.75:
        function["description"] = wish.about
    return {"type": "function", "function": {**function, "parameters": parameters}}


def wishes(kind: Kind, rng: random.Random) -> list[Wish]:
    """One wish, or two of the same tool."""
    first = kind(rng)
    if kind not in (weather, clock) or rng.random() < 0.75:
        return [first]
    second = kind(rng)
    (name,), (value,) = first.arguments, second.arguments.values()
    second = second._replace(tool=first.tool, arguments={name: value})
    return [first, second._replace(question=f"[And|And what about] in {value}?")]


def answered(wish: Wish, rng: random.Random) -> Turn:
    """What the tool answers: JSON, or its values alone."""
    plain = ", ".join(map(str, wish.found.values()))
    content = json.dumps(wish.found, ensure_ascii=False) if rng.random() < 0.6 else plain
    return Turn("tool", content)


def tool_chat(rng: random.Random) -> Chat:
    """A chat in which tools are offered, and most often are of use."""
    kind = rng.choice(KINDS)
    wanted = wishes(kind, rng)
    other_kinds = [other for other in KINDS if other is not kind]
    others = [rng.choice(other_kinds)(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
    at_hand = {wish.tool: offered(wish, rng) for wish in (*others, wanted[0])}
    tools = list(at_hand.values())
    rng.shuffle(tools)
    turns = [*opening(rng), *(exchanged(talk(rng), rng) if rng.random() < 0.15 else ())]
    question = expand(" ".join(wish.question for wish in wanted), rng)
    course = rng.random()
    if course < 0.1:
        other = requested(rng)[0] if rng.random() < 0.3 else talk(rng)
        return Chat((*turns, *exchanged(other, rng)), tuple(tools))
    if course < 0.15 and len(tools) > 1:
        tools.remove(at_hand[wanted[0].tool])
        return Chat((*turns, *exchanged(knows_not(rng, question), rng)), tuple(tools))
    turns.append(Turn("user", question if rng.random() < 0.8 else question.rstrip(".?!")))
    thought = " ".join(wish.thought for wish in wanted)
    turns.append(Turn("assistant", "", thought, tuple(wish.call for wish in wanted)))
    if course < 0.65:
        return Chat(tuple(turns), tuple(tools))
    if rng.random() < 0.5:  # many programs do not send thoughts back
        turns[-1] = turns[-1]._replace(thought="")
    turns += [answered(wish, rng) for wish in wanted]
    answer = " ".join(wish.answer for wish in wanted)
    turns.append(Turn("assistant", answer, f"{wanted[0].tool} has answered."))
    if course > 0.9:
        turns += exchanged(talk(rng), rng)
    return Chat(tuple(turns), tuple(tools))
