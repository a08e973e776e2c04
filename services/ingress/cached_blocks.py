"""Which blocks are in an engine's prefix cache, as far as what it was given tells."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class CachedBlocks:
    """Names of blocks, least recently used first. The scheduler is not asked: a name may be of a
    block that is overwritten, which costs no more than computing it again."""

    def __init__(self) -> None:
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def add(self, names: Sequence[bytes], most: int) -> None:
        """The engine has, or will have, a sequence with these full blocks, and has `most` blocks.
        As in the scheduler, a sequence's last blocks are overwritten first."""
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > most:
            self._names.popitem(last=False)

    def count(self, names: Sequence[bytes]) -> int:
        """How many of a sequence's first blocks are there."""
        for count, name in enumerate(names):
            if name not in self._names:
                return count
        return len(names)

    def clear(self) -> None:
        self._names.clear()
