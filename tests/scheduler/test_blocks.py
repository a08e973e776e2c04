"""Blocks: counting, the order in which they are taken, and what is found in them."""

from __future__ import annotations

import pytest

from nanovllm.messages import pack
from nanovllm.services.scheduler import blocks
from nanovllm.services.scheduler.blocks import BlockManager, Prefix, root


def tokens(*values: int) -> bytes:
    return pack(values)


def fill(manager: BlockManager, content: bytes, salt: str = "") -> tuple[list[int], Prefix]:
    """Takes blocks for whole blocks of tokens, and names them."""
    width = manager.block_size * 4
    table = manager.allocate([], len(content) // width)
    assert table is not None
    prefix = root(salt)
    for i, block in enumerate(table):
        prefix = manager.register(block, prefix, content[i * width : (i + 1) * width])
    return table, prefix


def found(manager: BlockManager, content: bytes, salt: str = "") -> list[int]:
    return manager.match(root(salt), content, len(content) // 4 // manager.block_size).blocks


def test_a_chain_is_found_as_far_as_it_is_the_same() -> None:
    manager = BlockManager(8, 2)
    table, _ = fill(manager, tokens(1, 2, 3, 4, 5, 6))
    assert found(manager, tokens(1, 2, 3, 4, 5, 6)) == table
    assert found(manager, tokens(1, 2, 3, 4, 9, 9)) == table[:2]
    assert found(manager, tokens(3, 4)) == []
    assert manager.match(root(""), tokens(1, 2, 3, 4), 1).blocks == table[:1]


def test_salts_share_nothing() -> None:
    manager = BlockManager(8, 2)
    table, _ = fill(manager, tokens(1, 2), salt="a")
    assert found(manager, tokens(1, 2)) == []
    assert found(manager, tokens(1, 2), salt="a") == table


def test_a_sequence_gets_all_its_blocks_or_none() -> None:
    manager = BlockManager(4, 2)
    table, _ = fill(manager, tokens(1, 2, 3, 4))
    assert manager.allocate(table, 3) is None
    assert manager.num_used == 2
    manager.release(table)
    assert manager.allocate(table, 3) is None, "the two cached are not free for anything else"
    assert manager.allocate(table, 2, reserve=1) is None
    assert manager.allocate(table, 2) is not None
    assert manager.num_used == 4
    assert manager.append() is None


def test_shared_blocks_are_free_when_the_last_has_left() -> None:
    manager = BlockManager(4, 2)
    table, _ = fill(manager, tokens(1, 2, 3, 4))
    assert manager.allocate(table, 1) is not None
    manager.release(table)
    assert manager.num_used == 3


def test_least_recently_used_first_and_tails_before_heads() -> None:
    manager = BlockManager(5, 1)
    old, _ = fill(manager, tokens(1, 2))
    new, _ = fill(manager, tokens(8, 9))
    nameless = manager.append()
    manager.release(old)
    manager.release(new)
    manager.release([nameless] if nameless is not None else [])
    taken = [manager.append() for _ in range(5)]
    assert taken == [nameless, old[1], old[0], new[1], new[0]]
    assert found(manager, tokens(1, 2)) == []


def test_a_hit_makes_it_recently_used() -> None:
    manager = BlockManager(3, 1)
    first, _ = fill(manager, tokens(1))
    second, _ = fill(manager, tokens(2))
    third, _ = fill(manager, tokens(3))
    for table in (first, second, third):
        manager.release(table)
    hit = manager.allocate(found(manager, tokens(1)), 0)
    assert hit == first
    manager.release(first)
    assert [manager.append() for _ in range(3)] == [second[0], third[0], first[0]]


def test_a_twin_goes_on_in_the_chain_of_the_first() -> None:
    manager = BlockManager(8, 2)
    first, _ = fill(manager, tokens(1, 2))
    twin, _ = fill(manager, tokens(1, 2, 3, 4))
    assert found(manager, tokens(1, 2, 3, 4)) == [first[0], twin[1]]
    manager.release(twin)
    assert manager.append() == twin[0], "nobody can find the twin: it is taken first"


def test_a_block_whose_predecessor_was_taken_is_named_anew() -> None:
    manager = BlockManager(4, 2)
    table, _ = fill(manager, tokens(1, 2, 3, 4))
    kept = table[1:]
    manager.release(table[:1])
    while manager.append() is not None:
        pass
    assert found(manager, tokens(1, 2, 3, 4)) == []
    manager.release(kept)
    manager.release([block for block in range(4) if block not in kept])
    again, _ = fill(manager, tokens(1, 2, 3, 4))
    assert found(manager, tokens(1, 2, 3, 4)) == again


@pytest.fixture
def weak_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """All names are the same, those of the salts too."""
    monkeypatch.setattr(blocks, "name_of", lambda predecessor, tokens: b"same")
    monkeypatch.setattr("xxhash.xxh64_digest", lambda data: b"same")


@pytest.mark.usefixtures("weak_hash")
def test_a_collision_is_no_hit() -> None:
    manager = BlockManager(8, 2)
    one, _ = fill(manager, tokens(1, 2))
    assert found(manager, tokens(3, 4)) == []
    other, _ = fill(manager, tokens(3, 4))
    assert found(manager, tokens(3, 4)) == other, "the newer took the name"
    assert found(manager, tokens(1, 2)) == []
    manager.release(other)
    manager.release(one)
    assert manager.append() == one[0], "it has lost its name"


@pytest.mark.usefixtures("weak_hash")
def test_the_same_tokens_after_others_are_no_hit() -> None:
    manager = BlockManager(8, 2)
    _, first = fill(manager, tokens(1, 2))
    second = manager.allocate([], 1)
    assert second is not None
    manager.register(second[0], first, tokens(3, 4))
    assert manager.match(first, tokens(3, 4), 1).blocks == second
    assert found(manager, tokens(3, 4)) == [], "there it follows nothing"
    assert manager.match(Prefix(b"same", "pepper"), tokens(3, 4), 1).blocks == []


@pytest.mark.usefixtures("weak_hash")
def test_a_salt_is_compared_itself() -> None:
    manager = BlockManager(8, 2)
    fill(manager, tokens(1, 2), salt="a")
    assert found(manager, tokens(1, 2), salt="b") == []
