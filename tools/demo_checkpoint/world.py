"""The little world that the demo checkpoint knows: who lives in Lantern Bay, and where.

The facts are fixed, so that stories and answers agree: Pip the fox lives in the harbour in both.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Character:
    """Somebody a story can be about.

    Grammar templates read the attributes: `{hero.name}`, `{hero.they}` and so on.

    Attributes:
        name: "Pip".
        kind: a noun with no article, "fox".
        emoji: one emoji that goes with the kind.
        female: chooses the pronouns.
        trait: an adjective, "curious".
        home: where the character lives, with its preposition, "in the harbour".
        loves: what the character loves, "old lanterns".
        does: a habit, in the third person, "polishes every lantern before the sun goes down".
    """

    name: str
    kind: str
    emoji: str
    female: bool
    trait: str
    home: str
    loves: str
    does: str

    @property
    def they(self) -> str:
        """Subject pronoun: "she" or "he"."""
        return "she" if self.female else "he"

    @property
    def They(self) -> str:
        """The same at the start of a sentence."""
        return self.they.capitalize()

    @property
    def them(self) -> str:
        """Object pronoun: "her" or "him"."""
        return "her" if self.female else "him"

    @property
    def their(self) -> str:
        """Possessive: "her" or "his"."""
        return "her" if self.female else "his"

    @property
    def Their(self) -> str:
        """The same at the start of a sentence."""
        return self.their.capitalize()

    @property
    def full(self) -> str:
        """Name and kind: "Pip the fox"."""
        return f"{self.name} the {self.kind}"

    @property
    def described(self) -> str:
        """Trait and kind with an article: "a curious fox"."""
        return with_article(f"{self.trait} {self.kind}")

    @property
    def place(self) -> str:
        """The home without its preposition, "the harbour"."""
        return self.home.split(" ", 1)[1]


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun phrase."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


CAST: Final = (
    Character(
        "Pip", "fox", "🦊", False, "curious", "in the harbour", "old lanterns",
        "polishes every lantern before the sun goes down",
    ),
    Character(
        "Mara", "otter", "🦦", True, "brave", "by the river", "smooth stones",
        "carries letters from one side to the other",
    ),
    Character(
        "Théo", "mouse", "🐭", False, "shy", "in the café", "warm croissants",
        "counts the crumbs each night",
    ),
    Character(
        "Zoë", "cat", "🐱", True, "clever", "in the lighthouse", "the sound of rain",
        "watches the ships and gives each one a name",
    ),
    Character(
        "Bruno", "bear", "🐻", False, "gentle", "in the pine forest", "honey cakes",
        "sleeps late and snores like a drum",
    ),
    Character(
        "Yuki", "rabbit", "🐰", True, "quick", "on the snowy hill", "fresh snow",
        "writes 雪 in the snow with one paw",
    ),
    Character(
        "Olga", "owl", "🦉", True, "wise", "in the clock tower", "long books",
        "reads aloud to the moon",
    ),
    Character(
        "Finn", "frog", "🐸", False, "cheerful", "in the pond", "loud songs",
        "sings one note better than anyone",
    ),
    Character(
        "Inés", "goat", "🐐", True, "stubborn", "at the market", "red apples",
        "sells jam and tells jokes",
    ),
    Character(
        "Kenji", "crane", "🐦", False, "patient", "in the rice field", "quiet mornings",
        "stands on one leg and thinks",
    ),
    Character(
        "Lin", "tea seller", "🍵", True, "kind", "in the tea house", "green tea",
        "paints 茶 on every cup",
    ),
    Character(
        "Tomás", "sailor", "⛵", False, "merry", "on the old boat", "tall waves",
        "ties knots that nobody can undo",
    ),
    Character(
        "Nils", "hedgehog", "🦔", False, "careful", "in the garden", "round pears",
        "rakes the leaves into neat little hills",
    ),
    Character(
        "Saga", "squirrel", "🌰", True, "busy", "in the oak tree", "maps of far lands",
        "hides nuts and forgets where",
    ),
    Character(
        "Ruth", "captain", "⚓", True, "bold", "on the island", "stormy weather",
        "looks for treasure in every puddle",
    ),
    Character(
        "Bo", "robot", "🤖", False, "polite", "in the workshop", "tiny screws",
        "repairs clocks and says good morning to each of them",
    ),
    Character(
        "Ember", "dragon", "🐉", True, "warm", "in the mountain cave", "hot soup",
        "lights the village stoves in winter",
    ),
    Character(
        "Max", "dog", "🐶", False, "loyal", "at the station", "the evening train",
        "carries the bags of tired travellers",
    ),
    Character(
        "Amélie", "painter", "🎨", True, "dreamy", "in the blue attic", "bright colours",
        "paints the sky before breakfast",
    ),
    Character(
        "Jürgen", "snail", "🐌", False, "calm", "under the stone bridge", "slow walks",
        "is never late because he is never in a hurry",
    ),
)  # fmt: skip

GUEST_WOMEN: Final = ("Ada", "Iris", "Chloë", "Anaïs", "Zara", "Nadia", "Mei", "Lucía", "Poppy")
GUEST_MEN: Final = ("Luka", "Noor", "Milo", "Søren", "Oscar", "Hugo", "Björn", "Otto", "Ravi")

GUEST_KINDS: Final = (
    ("wolf", "🐺"), ("turtle", "🐢"), ("penguin", "🐧"), ("whale", "🐳"), ("lion", "🦁"),
    ("pirate", "🏴"), ("wizard", "🔮"), ("horse", "🐴"), ("elephant", "🐘"), ("duck", "🦆"),
    ("monkey", "🐵"), ("bee", "🐝"), ("crow", "🪶"), ("giant", "⛰"), ("fish", "🐟"),
)  # fmt: skip
"""Kind and emoji of those who are not from Lantern Bay."""

TRAITS: Final = (
    *(who.trait for who in CAST),
    "small", "young", "lonely", "proud", "hungry",
)  # fmt: skip

GREETINGS: Final = (
    ("French", "Bonjour", "Théo"),
    ("Spanish", "¡Hola", "Inés"),
    ("Japanese", "こんにちは", "Yuki"),
    ("Chinese", "你好", "Lin"),
    ("German", "Grüß dich", "Jürgen"),
    ("Swedish", "Hej", "Nils"),
    ("Korean", "안녕하세요", "Kenji"),
    ("Portuguese", "Olá", "Tomás"),
)
"""Language, how to say hello in it, and who in Lantern Bay says it so."""
