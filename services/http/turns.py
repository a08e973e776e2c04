"""How much of an event loop's turn goes to logprobs: a turn lasts milliseconds, whatever waits."""

from __future__ import annotations

import asyncio
from typing import Final

# Entries of logprobs that one turn of the event loop writes; about 10 ms of CPU.
ENTRIES_A_TURN: Final = 4096


class Turns:
    """Shares out the turns of one event loop."""

    def __init__(self) -> None:
        self._left = ENTRIES_A_TURN

    async def take(self, entries: int) -> None:
        """Waits for a turn that has room for so many entries: at most ENTRIES_A_TURN."""
        while entries > self._left:
            await asyncio.sleep(0)
        if self._left == ENTRIES_A_TURN:
            asyncio.get_running_loop().call_soon(self._begin)
        self._left -= entries

    def _begin(self) -> None:
        self._left = ENTRIES_A_TURN
