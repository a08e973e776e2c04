"""All that the demo checkpoint is trained on, as a function of a seed."""

import random
from collections.abc import Iterator

from tools.demo_checkpoint.chats import Chat, conversation
from tools.demo_checkpoint.stories import introduction, portrait, tell
from tools.demo_checkpoint.tool_use import tool_chat
from tools.demo_checkpoint.world import CAST

Document = str | Chat
"""A plain text, or a chat."""


def documents(seed: int) -> Iterator[Document]:
    """Yield training documents without end: plain stories and portraits, chats, and chats with
    tools."""
    rng = random.Random(seed)
    while True:
        kind = rng.random()
        if kind < 0.18:
            yield tell(rng).text
        elif kind < 0.2:
            yield " ".join(portrait(rng, who) for who in rng.sample(CAST, 3))
        elif kind < 0.22:
            yield introduction(rng, rng.choice(CAST))
        elif kind < 0.65:
            yield Chat(conversation(rng))
        else:
            yield tool_chat(rng)
