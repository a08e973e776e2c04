"""The KV cache's blocks: how many sequences hold each, which are free, and their contents."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import count
from typing import NamedTuple

from nanovllm.block_names import TOKEN_BYTES, name_of, root_name


class Prefix(NamedTuple):
    """A chain of full blocks, named by its last block. The next block's name continues `name`."""

    name: bytes  # a hash, so two chains may have the same one
    identity: int | str  # a number that no other chain has; the salt, if the chain is empty


class Contents(NamedTuple):
    """What a block holds: `tokens` (int32) after the chain whose identity is `parent`."""

    prefix: Prefix
    parent: int | str
    tokens: bytes


class Match(NamedTuple):
    """Cached blocks for the beginning of a sequence, in order, and their chain."""

    blocks: list[int]
    prefix: Prefix


def root(salt: str) -> Prefix:
    """The empty chain. Only sequences with the same salt share blocks."""
    return Prefix(root_name(salt), salt)


class BlockManager:
    """Reference-counted blocks of `block_size` tokens, `num_blocks` of them.

    A full block has a name, by which later sequences find the block. A free block keeps its
    contents until it is taken again. Free blocks without a name are taken first, then the least
    recently used. Every operation is O(1) a block.

    Attributes:
        releases: how often blocks were given back so far. While this number stays the same, an
            allocation that failed fails again.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.releases = 0
        self._references = [0] * num_blocks
        self._contents: list[Contents | None] = [None] * num_blocks
        self._named: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._identities = count()

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    def match(self, prefix: Prefix, tokens: bytes, most: int) -> Match:
        """The longest cached chain, of at most `most` blocks, that continues `prefix` with the
        beginning of `tokens` (int32)."""
        blocks: list[int] = []
        width = self.block_size * TOKEN_BYTES
        for start in range(0, most * width, width):
            wanted = tokens[start : start + width]
            block = self._named.get(name_of(prefix.name, wanted))
            if block is None or not self._holds(block, prefix, wanted):
                break
            blocks.append(block)
            prefix = self._prefix(block)
        return Match(blocks, prefix)

    def allocate(self, cached: Sequence[int], num_new: int, reserve: int = 0) -> list[int] | None:
        """Takes the `cached` blocks and `num_new` others, so that `reserve` are left free.

        Returns them in this order, or None, and takes nothing, if there are not enough.
        """
        unused = sum(not self._references[block] for block in cached)
        if len(self._free) - unused < num_new + reserve:
            return None
        for block in cached:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1
        return [*cached, *(self._take() for _ in range(num_new))]

    def append(self) -> int | None:
        """Takes one block, if one is free."""
        return self._take() if self._free else None

    def register(self, block: int, prefix: Prefix, tokens: bytes) -> Prefix:
        """Names a block that is full from now on; returns the chain that it ends.

        If another block holds the same contents already, the other block keeps the name.
        """
        name = name_of(prefix.name, tokens)
        holder = self._named.get(name)
        if holder is not None:
            if self._holds(holder, prefix, tokens):
                return self._prefix(holder)
            # A collision; or the holder's predecessor is gone, so that no sequence finds it.
            self._forget(holder)
        self._named[name] = block
        contents = Contents(Prefix(name, next(self._identities)), prefix.identity, tokens)
        self._contents[block] = contents
        return contents.prefix

    def release(self, table: Iterable[int]) -> None:
        """Gives back a sequence's block table.

        The last blocks become free first, and so are taken first: more sequences share the first
        blocks of a prompt than the last.
        """
        self.releases += 1
        for block in reversed(list(table)):
            self._references[block] -= 1
            if not self._references[block]:
                self._free[block] = None
                if self._contents[block] is None:
                    self._free.move_to_end(block, last=False)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        self._references[block] = 1
        contents = self._contents[block]
        if contents is not None:
            del self._named[contents.prefix.name]
            self._contents[block] = None
        return block

    def _forget(self, block: int) -> None:
        self._contents[block] = None
        if block in self._free:
            self._free.move_to_end(block, last=False)

    def _holds(self, block: int, prefix: Prefix, tokens: bytes) -> bool:
        contents = self._contents[block]
        return (
            contents is not None
            and contents.parent == prefix.identity
            and contents.tokens == tokens
        )

    def _prefix(self, block: int) -> Prefix:
        contents = self._contents[block]
        if contents is None:
            raise LookupError(f"block {block} has no name")
        return contents.prefix
