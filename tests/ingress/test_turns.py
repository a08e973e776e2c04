"""Turns between clients, and how much of the shared bounds one session may have."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from nanovllm.protocol import Error, Sampling
from nanovllm.services.ingress.engine import WAITING_REQUESTS
from nanovllm.services.ingress.output import Output
from nanovllm.services.ingress.requests import Request
from nanovllm.services.ingress.sessions import Session
from nanovllm.services.ingress.tokenizers import WINDOW
from nanovllm.services.ingress.turns import Turns
from tests.ingress.harness import CLIENT, INCARNATION, OTHER, SCHEDULER, TOKENIZER, World


def request_of(uid: int, session: Session, client: str) -> Request:
    sampling = Sampling()
    output = Output(b"", with_logprobs=False)
    return Request(uid, str(uid), session, client, True, 0, 0, "", sampling, output, 0, None)


class Watch:
    """That while one waits for its turn, each other one has one turn at most."""

    def __init__(self) -> None:
        self._waiting: set[object] = set()
        self._turns: Counter[tuple[object, object]] = Counter()

    def waiting(self, names: set[object]) -> None:
        for pair in [pair for pair in self._turns if pair[0] not in names]:
            del self._turns[pair]
        self._waiting = names

    def taken(self, name: object) -> None:
        for other in self._waiting - {name}:
            self._turns[other, name] += 1
            assert self._turns[other, name] == 1
        for pair in [pair for pair in self._turns if pair[0] == name]:
            del self._turns[pair]


@given(st.data())
def test_sessions_take_turns_and_their_clients_too(data: st.DataObject) -> None:
    """And nothing is lost, and the requests of a client keep their order."""
    sessions = [Session(bytes([number]), str(number)) for number in range(3)]
    turns = Turns()
    waiting: dict[int, Request] = {}
    gone: dict[int, Request] = {}
    of_sessions = Watch()
    of_clients = {session: Watch() for session in sessions}
    for uid, action in enumerate(data.draw(st.lists(st.sampled_from("aaattttbd"), max_size=80))):
        if action == "a":
            session, client = (
                data.draw(st.sampled_from(sessions)),
                data.draw(st.sampled_from("xyz")),
            )
            waiting[uid] = request_of(uid, session, client)
            turns.add(waiting[uid])
        elif action == "b":
            back = data.draw(st.lists(st.sampled_from(sorted(gone) or [-1]), unique=True))
            again = {uid: gone.pop(uid) for uid in back if uid in gone}
            turns.put_back(again.values())
            waiting |= again
        elif action == "d" and waiting:
            some = data.draw(st.sampled_from(sorted(waiting)))
            turns.discard(some)
            turns.discard(some)
            gone[some] = waiting.pop(some)
        elif action == "t" and (first := turns.first()) is not None:
            turns.take(first)
            of_sessions.taken(first.session)
            of_clients[first.session].taken(first.client)
            mine = (first.session, first.client)
            assert first.uid == min(u for u, r in waiting.items() if (r.session, r.client) == mine)
            gone[first.uid] = waiting.pop(first.uid)
        of_sessions.waiting({r.session for r in waiting.values()})
        for session, watch in of_clients.items():
            watch.waiting({r.client for r in waiting.values() if r.session is session})
        assert len(turns) == len(waiting)
        assert all(uid in turns for uid in waiting)
        assert (turns.first() is None) == (not waiting)


def ask(world: World, connection: bytes, request_id: str, **keys: object) -> None:
    message = {"type": "generate", "id": request_id, "prompt": "x", **keys}
    world.say(message, client=connection)


def test_a_request_waits_for_one_of_each_other_client_at_a_tokenizer_and_at_an_engine() -> None:
    """Output that a client says it has changes nothing."""
    world = World(max_pending_requests=4000, services=False)
    for number in range(1000):
        ask(world, OTHER, str(number), resume_token_ids=[5])
        if number < 300:
            ask(world, CLIENT, str(number), client="many")
    ask(world, CLIENT, "one", client="one")
    ask(world, CLIENT, "without")
    world.core.service_up(TOKENIZER)
    tokenizes = world.tokenizes()
    assert len(tokenizes) == WINDOW
    order = [t.uid - (INCARNATION << 32) for t in tokenizes]
    assert order[:6] == [1, 2, 3, 1301, 5, 1302]
    while tokenizes:
        world.tokenized(*tokenizes)
        tokenizes = world.tokenizes()
    world.scheduler_up(SCHEDULER)
    submits = world.submits()
    assert len(submits) >= WAITING_REQUESTS
    assert [s.uid - (INCARNATION << 32) for s in submits][:6] == [1, 2, 3, 1301, 5, 1302]


def test_a_session_has_half_of_what_others_leave_and_there_is_room_for_one_more() -> None:
    world = World(max_pending_requests=20)
    ids = itertools.count()

    def taken(connection: bytes) -> int:
        """How many of twenty requests."""
        for _ in range(20):
            ask(world, connection, str(next(ids)))
        refused = world.heard(connection)
        assert all(isinstance(m, Error) and m.code == "overloaded" for m in refused)
        return 20 - len(refused)

    assert [taken(bytes([number])) for number in range(9)] == [10, 5, 2, 1, 1, 1, 0, 0, 0]
    world.core.closed(bytes([0]))
    assert taken(bytes([1])) == 2, "it holds 7, of the 15 that the others leave"
    assert taken(bytes([9])) == 4
