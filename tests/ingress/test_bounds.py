"""What clients send and do not read is bounded, and they take turns."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from nanovllm.control import IngressStats
from nanovllm.messages import Submit, Tokenized, TokenLogprobs, pack
from nanovllm.protocol import Accepted, Delta, Error, Finish, Pong
from nanovllm.services.ingress import pending
from nanovllm.services.ingress.core import MAX_QUEUED_BYTES
from nanovllm.services.ingress.sessions import FRAME_BYTES, MAX_FULL_S, MAX_UNREAD_BYTES
from tests.ingress.harness import CLIENT, OTHER, SESSION, TOKENIZER, World, decode, decoded


def test_many_messages_are_handled_bit_by_bit() -> None:
    world = World()
    for _ in range(1000):
        world.core.receive(CLIENT, msgspec.msgpack.encode({"type": "ping"}))
    world.core.work()
    some = len(world.heard())
    assert 0 < some < 1000
    world.work()
    assert some + len(world.heard()) == 1000


@pytest.mark.parametrize("torn", [False, True])
def test_large_messages_are_handled_one_by_one(torn: bool) -> None:
    world = World()
    large = msgspec.msgpack.encode({"type": "ping", "id": "x" * 900_000})
    for _ in range(20):
        world.core.receive(CLIENT, large[:-1] if torn else large)
    world.core.receive(OTHER, msgspec.msgpack.encode({"type": "ping"}))
    world.core.work()
    some = len(world.heard())
    assert 0 < some <= 2
    world.core.work()
    assert len(world.heard(OTHER)) == 1
    some += len(world.heard())
    assert some <= 4
    world.work()
    assert some + len(world.heard()) == 20


def test_clients_take_turns() -> None:
    """One sends far more than the other. Neither waits for the other, and each is served in
    order."""
    world = World()
    orders = {CLIENT: [f"{n}" for n in range(1000)], OTHER: [f"{n}" for n in range(200)]}
    for client, ids in orders.items():
        for name in ids:
            world.core.receive(client, msgspec.msgpack.encode({"type": "ping", "id": name}))
    heard: dict[bytes, list[str | None]] = {CLIENT: [], OTHER: []}
    while world.core.has_work:
        world.core.work()
        for client in orders:
            heard[client] += [pong.id for pong in world.heard(client) if isinstance(pong, Pong)]
        done = len(heard[OTHER]) == len(orders[OTHER])
        assert done or abs(len(heard[OTHER]) - len(heard[CLIENT])) <= 1
    assert heard == orders


def test_client_queues_are_bounded() -> None:
    world = World()
    frame = bytes(16 << 20)
    for _ in range(MAX_QUEUED_BYTES // len(frame) - 1):
        world.core.receive(CLIENT, frame)
    world.core.receive(OTHER, msgspec.msgpack.encode({"type": "ping"}))
    assert world.core.flooded() is None
    world.core.receive(OTHER, frame)
    assert world.core.flooded() == CLIENT, "which sent most of it"
    assert world.core.flooded() is None
    world.work()
    pong, error = world.heard(OTHER)
    assert isinstance(pong, Pong)
    assert isinstance(error, Error)
    assert world.core.stats.sessions == 1


def test_the_bytes_of_requests_that_are_held_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text counts until it is tokenized, and then its ids. A session has half of what others
    leave."""
    monkeypatch.setattr(pending, "MAX_REQUEST_BYTES", 210_000)
    world = World()

    def refused(request_id: str, client: bytes = CLIENT) -> bool:
        world.generate(request_id, client, prompt="x" * 40_000)
        return any(isinstance(message, Error) for message in world.heard(client))

    assert [refused(name) for name in "abc"] == [False, False, True]
    assert [refused(name, OTHER) for name in "xy"] == [False, True]
    world.abort("a")
    world.heard()
    assert not refused("d"), "80,000 bytes of the 170,000 that the other leaves"
    first, other, second = world.tokenizes()
    world.tokenized(first)
    world.heard()
    assert [refused(name) for name in "ef"] == [False, True]
    world.core.from_tokenizer(TOKENIZER, Tokenized(second.uid, pack([1] * 10_000), second.sampling))
    world.heard()
    assert refused("f"), "its ids take as much as its text"
    world.core.from_tokenizer(TOKENIZER, Tokenized(other.uid, pack([1] * 30_000), other.sampling))
    assert refused("g"), "the ids of the other's take three times as much as the text"
    assert refused("z", b"third"), "nothing is left"
    world.core.closed(OTHER)
    assert not refused("z", b"third")


def test_token_ids_that_are_listed_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pending, "MAX_REQUEST_BYTES", 60_000)
    world = World()
    world.generate("a", prompt="x", sampling={"allowed_token_ids": list(range(1000))})
    (ask,) = world.tokenizes()
    world.core.from_tokenizer(TOKENIZER, Tokenized(ask.uid, pack([1]), ask.sampling))
    world.heard()
    world.generate("b", prompt="x")
    (error,) = world.heard()
    assert isinstance(error, Error)
    assert error.code == "overloaded"


LIKELIEST = {"logprobs": 20}


def pings(world: World, submit: Submit) -> None:
    world.say({"type": "ping", "id": "x" * 30_000})


def stream(world: World, submit: Submit) -> None:
    new = decoded(submit, world.steps, [world.steps])
    new.text, new.text_offset = "x" * 30_000, world.steps * 30_000
    world.core.from_detokenizer(new)


def logprobs(world: World, submit: Submit) -> None:
    new = decoded(submit, 100 * world.steps, list(range(100)))
    new.logprobs = (TokenLogprobs(bytes(84), bytes(84)),) * 100
    new.text, new.text_offset = "", 0
    world.core.from_detokenizer(new)


def whole_answers(world: World, submit: Submit) -> None:
    (whole,) = world.start(f"whole {world.steps}", stream=False)
    end = decoded(whole, 0, [1], end=True)
    end.text = "x" * 30_000
    world.core.from_detokenizer(end)


@pytest.mark.parametrize("produce", [pings, stream, logprobs, whole_answers])
def test_output_kept_for_a_client_that_does_not_read_is_bounded(
    produce: Callable[[World, Submit], None],
) -> None:
    world = World(max_pending_requests=2000)
    (submit,) = world.start("a", sampling={"logprobs": 20})
    world.start("b", client=OTHER)
    world.full.add(CLIENT)
    (session,) = (s for s in world.core.sessions.unsent if s.connection == CLIENT)
    for world.steps in range(2000):
        produce(world, submit)
        assert session.unread_bytes < 1.1 * MAX_UNREAD_BYTES
        assert world.sent() == []
        if world.disconnected:
            break
    assert world.disconnected == [CLIENT]
    assert session.unread_bytes > MAX_UNREAD_BYTES
    world.engine_frames()
    assert (submit.uid, 1) in world.ended, "its request was aborted"
    assert world.core.stats.requests == 1, "others go on"


def test_output_that_waits_for_a_client_comes_in_frames_of_bounded_size() -> None:
    world = World()
    submits = [submit for name in "abcdefghij" for submit in world.start(name, sampling=LIKELIEST)]
    world.full.add(CLIENT)
    for world.steps in range(8):
        for submit in submits:
            logprobs(world, submit)
    (session,) = world.core.sessions.unsent
    size = session.unread_bytes // len(submits)
    world.full.clear()
    frames = [decode(frame) for frame in world.sent()]
    assert session.unread_bytes == 0
    deltas = [[message for message in frame if isinstance(message, Delta)] for frame in frames]
    assert max(map(len, deltas)) <= FRAME_BYTES // size + 1
    tokens = {delta.id: len(delta.token_ids) for frame in deltas for delta in frame}
    assert tokens == dict.fromkeys("abcdefghij", 800)


def test_output_that_a_client_has_read_is_not_counted() -> None:
    world = World()
    (submit,) = world.start("a")
    for world.steps in range(300):
        for produce in (pings, stream, whole_answers):
            produce(world, submit)
        (session,) = world.core.sessions.unsent
        world.heard()
        assert session.unread_bytes == 0


def test_a_client_whose_socket_takes_nothing_is_treated_as_gone() -> None:
    world = World()
    (submit,) = world.start("a")
    for world.now in (0.0, MAX_FULL_S - 0.1):
        world.full.add(CLIENT)
        assert world.sent() == []
    world.full.clear()
    assert world.heard(), "it reads again, before it is too late"
    world.full.add(CLIENT)
    for world.now in (10.0, 10.0 + MAX_FULL_S - 0.1):
        world.core.from_detokenizer(decoded(submit, 0, [1]))
        world.sent()
        assert not world.disconnected
    world.now = 10.1 + MAX_FULL_S
    world.sent()
    assert world.disconnected == [CLIENT]
    world.engine_frames()
    assert world.ended == [(submit.uid, 1)]
    assert world.core.stats == IngressStats(0, 0, 1)


def test_a_slow_reader_gets_everything_merged() -> None:
    world = World()
    (submit,) = world.start("a")
    world.full.add(CLIENT)
    world.sent()
    for offset in range(20):
        world.core.from_detokenizer(decoded(submit, offset, [offset], end=offset == 19))
        world.sent()
    world.generate("a")
    world.full.clear()
    frames = world.sent()
    assert len(frames) == 2, "the one that was refused, and one with all the rest"
    first, second = map(decode, frames)
    assert first == [Accepted(id="a", session=SESSION, seed=4242)]
    duplicate, merged, finish = second
    assert isinstance(duplicate, Error)
    assert duplicate.code == "duplicate_id"
    assert isinstance(merged, Delta)
    assert merged.token_ids == list(range(20))
    assert isinstance(finish, Finish)
    assert world.core.stats.requests == 0
