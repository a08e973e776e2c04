"""Guilty requests are found, in a bounded number of deaths, and innocent ones never."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.messages import (
    NOTHING_IN_HAND,
    End,
    Held,
    IngressToScheduler,
    InHand,
    Lost,
    Refused,
    Submit,
    Tokenize,
    unpack,
)
from nanovllm.names import ServiceId
from nanovllm.protocol import Error, Finish
from nanovllm.services.ingress.suspects import (
    CLEARING_TOKENS,
    DEATHS,
    DEATHS_ALONE,
    Deaths,
    Suspects,
)
from nanovllm.transport.links import Peer
from tests.ingress.harness import (
    CLIENT,
    INCARNATION,
    NOT_READY,
    OTHER,
    READY,
    SCHEDULER,
    TOKENIZER,
    World,
    decoded,
)

Guilt = Literal["", "tokenizer", "scheduler", "gpu_worker", "gpu_worker, late", "detokenizer"]
GUILTS: tuple[Guilt, ...] = (
    *("", "", "tokenizer", "scheduler"),
    *("gpu_worker", "gpu_worker, late", "detokenizer"),
)
NEW_TOKENS = 60
LATE = 40
GONE = msgspec.structs.replace(READY, ready=False)
# Two in company, one in a service that has had others, and two alone.
MOST_DEATHS = 5

Draw = Callable[[int], int]


@dataclass
class SimEngine:
    """Scheduler and worker group of an engine, in their smallest form.

    Attributes:
        records: the requests that the scheduler was given, by uid.
        tokens: how many output tokens they have.
        decoded: those of which the detokenizer has had output.
        starting: whether the worker is new.
    """

    scheduler: Peer
    worker: Peer
    records: dict[int, Submit] = field(default_factory=dict)
    tokens: dict[int, int] = field(default_factory=dict)
    decoded: set[int] = field(default_factory=set)
    starting: bool = False

    @property
    def running(self) -> list[int]:
        return list(self.records)[: READY.slots]


class Pipeline:
    """Tokenizers, engines and detokenizer around a core, in their smallest form. They crash on
    guilty requests, and can be killed from outside.

    Args:
        guilt: what each request brings down.
        tokenizers, engines: how many there are.
        draw: an integer below its argument.
    """

    def __init__(self, guilt: list[Guilt], tokenizers: int, engines: int, draw: Draw) -> None:
        self.world = World(services=False)
        self.core = self.world.core
        self.draw = draw
        self.crashes = 0
        self.heard: list[object] = []
        self.inboxes: dict[Peer, dict[int, Tokenize]] = {}
        self.untold: list[Peer] = []  # what the supervisor is about to tell of
        self._incarnations = 100
        for index in range(tokenizers):
            self._tokenizer_up(index)
        self.detokenizer = self._born("detokenizer")
        self.core.service_up(self.detokenizer)
        self.engines = [
            SimEngine(self._born("scheduler", engine=n), self._born("gpu_worker", engine=n))
            for n in range(engines)
        ]
        for engine in self.engines:
            self.world.scheduler_up(engine.scheduler)
        self.guilt = dict(enumerate(guilt, (INCARNATION << 32) + 1))
        for uid in self.guilt:
            self.world.generate(str(uid))

    # What goes on -------------------------------------------------------------------------------

    def deliver(self) -> None:
        """What the core has to say arrives."""
        for peer, inbox in self.inboxes.items():
            inbox |= {tokenize.uid: tokenize for tokenize in self.world.tokenizes(peer)}
        self.heard += self.world.heard()
        self.core.submit()
        while frames := list(self.core.engines.frames()):
            for peer, frame in frames:
                self.core.engines.sent(peer, frame)
                self._receive(self.engines[peer.engine], frame)
        for engine in self.engines:
            if any(self.guilt[uid] == "scheduler" for uid in engine.records):
                self.scheduler_dies(engine, by_itself=True)

    def _receive(self, engine: SimEngine, frame: list[IngressToScheduler]) -> None:
        for message in frame:
            if isinstance(message, Held):
                assert not engine.records, "the scheduler has just started"
            elif isinstance(message, End):
                if message.uid in engine.records:
                    assert engine.records[message.uid].attempt <= message.attempt
                    del engine.records[message.uid]
            else:
                engine.records[message.uid] = message
                engine.tokens[message.uid] = len(unpack(message.output))

    def tokenize(self, peer: Peer) -> None:
        """The tokenizer's next request; requests that have ended may be among them."""
        if not self.inboxes[peer]:
            return
        uid = next(iter(self.inboxes[peer]))
        if self.guilt[uid] == "tokenizer":
            self.tokenizer_dies(peer, by_itself=True)
        else:
            self.world.tokenized(self.inboxes[peer].pop(uid), peer=peer)

    def step(self, engine: SimEngine) -> None:
        if engine.starting:  # a start takes longer than what was sent before it
            self.tell()
            engine.starting = False
            self.core.from_scheduler(engine.scheduler, READY)
            self.deliver()
        for uid in engine.running:
            guilt, tokens = self.guilt[uid], engine.tokens[uid]
            if guilt == "gpu_worker" or (guilt == "gpu_worker, late" and tokens == LATE):
                self.worker_dies(engine, by_itself=True)
                return
        for uid in engine.running:
            engine.decoded.add(uid)
            if self.guilt[uid] == "detokenizer":
                self.detokenizer_dies(by_itself=True)
                return
            self._sample(engine, uid)

    def _sample(self, engine: SimEngine, uid: int) -> None:
        submit, tokens = engine.records[uid], engine.tokens[uid]
        engine.tokens[uid] += 1
        end = engine.tokens[uid] == NEW_TOKENS
        self.core.from_detokenizer(decoded(submit, tokens, [7], end=end))
        if end:
            del engine.records[uid]

    def tell(self) -> None:
        """The supervisor's word arrives."""
        while self.untold:
            self.core.quarantine.crashed(self.untold.pop(0))

    # Who dies -----------------------------------------------------------------------------------

    def tokenizer_dies(self, peer: Peer, *, by_itself: bool) -> None:
        del self.inboxes[peer]
        self._death(peer, lambda: self.core.service_down(peer), by_itself)
        self.tell()
        self._tokenizer_up(peer.index)

    def scheduler_dies(self, engine: SimEngine, *, by_itself: bool) -> None:
        engine.records.clear()
        before = engine.scheduler
        self._death(before, lambda: self.core.service_down(before), by_itself)
        self.tell()
        engine.scheduler = self._born("scheduler", engine=before.engine)
        self.world.scheduler_up(engine.scheduler, NOT_READY if engine.starting else READY)

    def worker_dies(self, engine: SimEngine, *, by_itself: bool) -> None:
        dead = engine.worker
        held = [] if engine.starting else engine.running
        lost = self._lost(dead, held, len(held) == 1)

        def is_noticed() -> None:
            self.core.from_scheduler(engine.scheduler, lost)
            self.core.from_scheduler(engine.scheduler, GONE)

        self._death(dead, is_noticed, by_itself)
        engine.worker = self._born("gpu_worker", engine=dead.engine)
        engine.starting = True

    def detokenizer_dies(self, *, by_itself: bool) -> None:
        dead = self.detokenizer

        def is_noticed() -> None:
            for engine in self.engines:
                held = [uid for uid in engine.running if uid in engine.decoded]
                alone = len(engine.decoded) == len(held) == 1
                self.core.from_scheduler(engine.scheduler, self._lost(dead, held, alone))
                engine.decoded.clear()
            self.core.service_down(dead)

        self._death(dead, is_noticed, by_itself)
        self.tell()
        self.detokenizer = self._born("detokenizer")
        self.core.service_up(self.detokenizer)

    def _lost(self, peer: Peer, uids: list[int], alone: bool) -> Lost:
        return Lost(peer.service, peer.incarnation, InHand(uids, alone))

    def _death(self, peer: Peer, is_noticed: Callable[[], None], by_itself: bool) -> None:
        """The supervisor may tell of it before it is noticed, or after."""
        self.crashes += by_itself
        if by_itself:
            self.untold.append(peer)
            if self.draw(2):
                self.tell()
        is_noticed()

    def _tokenizer_up(self, index: int) -> None:
        peer = self._born("tokenizer", index)
        self.inboxes[peer] = {}
        self.core.service_up(peer)

    def _born(self, role: str, index: int = 0, engine: int = 0) -> Peer:
        self._incarnations += 1
        return Peer(role, index, self._incarnations, engine=engine)


@settings(max_examples=200, deadline=None)
@given(
    guilt=st.lists(st.sampled_from(GUILTS), min_size=1, max_size=9),
    tokenizers=st.integers(1, 2),
    engines=st.integers(1, 3),
    data=st.data(),
)
def test_the_guilty_are_found_and_the_others_finish(
    guilt: list[Guilt], tokenizers: int, engines: int, data: st.DataObject
) -> None:
    pipeline = Pipeline(
        guilt, tokenizers, engines, lambda below: data.draw(st.integers(0, below - 1))
    )

    def inbox() -> Peer:
        return data.draw(st.sampled_from(list(pipeline.inboxes)))

    def engine() -> SimEngine:
        return data.draw(st.sampled_from(pipeline.engines))

    kills: list[Callable[[], None]] = [
        lambda: pipeline.tokenizer_dies(inbox(), by_itself=False),
        lambda: pipeline.scheduler_dies(engine(), by_itself=False),
        lambda: pipeline.worker_dies(engine(), by_itself=False),
        lambda: pipeline.detokenizer_dies(by_itself=False),
    ]
    aborted: set[int] = set()

    def abort() -> None:
        uid = data.draw(st.sampled_from(list(pipeline.guilt)))
        aborted.add(uid)
        pipeline.world.abort(str(uid))

    works: list[Callable[[], None]] = [
        pipeline.deliver,
        lambda: pipeline.tokenize(inbox()),
        lambda: pipeline.step(engine()),
    ]
    for happens in data.draw(
        st.lists(
            st.sampled_from([*works, *works, *works, *kills, abort, pipeline.tell]), max_size=60
        )
    ):
        happens()
    rounds = 0
    while pipeline.core.stats.requests:
        rounds += 1
        assert rounds < 5000, "some request never ends"
        pipeline.deliver()
        for peer in list(pipeline.inboxes):
            if peer in pipeline.inboxes:
                pipeline.tokenize(peer)
        for each in pipeline.engines:
            pipeline.step(each)
            pipeline.deliver()
    for message in pipeline.heard:
        if isinstance(message, Error):
            assert message.code == "poisoned"
            assert pipeline.guilt[int(message.id or "")], "an innocent one was set aside"
        if isinstance(message, Finish):
            uid = int(message.id)
            assert uid in aborted or not pipeline.guilt[uid]
    number = sum(map(bool, guilt))
    # On several engines, guilty requests are present at deaths of one another.
    assert pipeline.crashes <= MOST_DEATHS * number * (1 if 1 in (number, engines) else 2)


def test_a_suspect_that_is_over_holds_nobody_back() -> None:
    world = World()
    first, second = world.start("a", "b")
    for incarnation in range(1, DEATHS + 1):
        lost = Lost(
            ServiceId("gpu_worker"), incarnation, InHand([first.uid, second.uid], alone=False)
        )
        world.core.from_scheduler(SCHEDULER, lost)
        world.core.quarantine.crashed(Peer("gpu_worker", 0, incarnation))
    assert world.start("c") == [], "the latest suspect runs alone"
    assert world.ended == [(first.uid, 1)]
    world.core.from_detokenizer(decoded(first, 0, [11]))
    world.core.from_detokenizer(decoded(second, 0, [11], end=True))
    assert [submit.uid for submit in world.submits()] == [first.uid], "it is the other's turn"
    world.abort("a")
    assert [submit.uid for submit in world.submits()] == [second.uid + 1], "all go on"


def test_suspects_that_go_at_once_are_not_ranked_anew_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With thousands the ingress would stand still until it is taken for hung."""
    world = World()
    world.start(*(f"{number}" for number in range(30)))
    for incarnation in range(1, DEATHS + 1):
        in_hand = InHand(list(world.engine.given), alone=False)
        lost = Lost(ServiceId("gpu_worker"), incarnation, in_hand)
        world.core.from_scheduler(SCHEDULER, lost)
        world.core.quarantine.crashed(Peer("gpu_worker", 0, incarnation))
    ranked = 0

    def count(suspects: Suspects, rank: Callable[[Suspects], int | None] = Suspects.next) -> object:
        nonlocal ranked
        ranked += 1
        return rank(suspects)

    monkeypatch.setattr(Suspects, "next", count)
    world.core.closed(CLIENT)
    assert ranked == 1, "only when the one that ran alone has gone"
    assert world.core.quarantine.suspects.records == {}
    assert len(world.start("later", client=OTHER)) == 1


def test_a_death_counts_as_alone_only_if_the_scheduler_can_have_had_no_other() -> None:
    """The other one was aborted just before, and may be what brought it down."""
    world = World()
    world.start("suspect")
    for death in range(DEATHS + DEATHS_ALONE):
        assert not any(isinstance(message, Error) for message in world.heard())
        scheduler = world.engine.peer
        assert scheduler is not None
        world.start(f"other {death}")
        world.abort(f"other {death}")
        world.core.quarantine.crashed(scheduler)
        world.scheduler_restarts(Peer("scheduler", 0, scheduler.incarnation + 1))
    (error,) = (message for message in world.heard() if isinstance(message, Error))
    assert (error.id, error.code) == ("suspect", "poisoned")


def test_a_suspect_of_a_tokenizer_waits_until_one_has_nothing_in_hand() -> None:
    world = World()
    second, third, fourth = (Peer("tokenizer", 1, incarnation) for incarnation in (30, 31, 32))
    world.core.service_up(second)
    for name in ("early", "suspect"):
        world.generate(name)
    for dies, by_itself, comes in (
        (second, True, third),
        (TOKENIZER, True, None),
        (third, False, fourth),
    ):
        world.tokenizes(dies)
        if by_itself:
            world.core.quarantine.crashed(dies)
        world.core.service_down(dies)
        if comes is not None:
            world.core.service_up(comes)
    world.generate("late")
    early, suspect, late = range((INCARNATION << 32) + 1, (INCARNATION << 32) + 4)
    for uid in (early, suspect, late):
        (tokenize,) = world.tokenizes(fourth)
        assert tokenize.uid == uid, "nothing overtakes the suspect, and it is alone"
        world.core.from_tokenizer(fourth, Refused(uid, "internal", "no"))


@given(
    st.lists(st.tuples(st.sampled_from(["lost", "by itself", "connected"]), st.integers(1, 3))),
    st.lists(st.lists(st.integers(1, 4), min_size=1, unique=True)),
)
def test_the_halves_of_a_death_are_joined_once_and_only_in_one_incarnation(
    events: list[tuple[str, int]], hands: list[list[int]]
) -> None:
    deaths = Deaths()
    latest: dict[int, InHand | None] = {}
    told: set[int] = set()
    for (what, incarnation), uids in zip(events, hands, strict=False):
        peer = Peer("tokenizer", 0, incarnation)
        in_hand = InHand(uids, alone=False)
        if what == "lost":
            joined = deaths.lost(peer, in_hand)
            assert joined is None or (joined == in_hand and incarnation in told)
            latest[incarnation] = in_hand if joined is None else None
        elif what == "connected":
            assert deaths.lost(peer, NOTHING_IN_HAND) is None
            latest.pop(incarnation, None)
        else:
            told.add(incarnation)
            for known in deaths.by_itself(peer):
                assert known == latest.pop(incarnation)


def test_a_death_counts_though_the_next_incarnation_is_there_before_it_is_told() -> None:
    deaths = Deaths()
    in_hand = InHand([1], alone=True)
    assert deaths.lost(Peer("tokenizer", 0, 1), in_hand) is None
    assert deaths.lost(Peer("tokenizer", 0, 2), NOTHING_IN_HAND) is None
    assert deaths.by_itself(Peer("tokenizer", 0, 1)) == [in_hand]


def test_clearing_a_suspect_takes_twice_as_many_tokens_each_time() -> None:
    suspects = Suspects()
    tokens = 100
    for further in (CLEARING_TOKENS, 2 * CLEARING_TOKENS, 4 * CLEARING_TOKENS):
        for _ in range(DEATHS):
            assert not suspects.must_be_alone(1)
            assert not suspects.was_present(1, tokens, alone=False)
        assert suspects.next() == 1
        assert not suspects.got_to(1, tokens + further - 1)
        assert suspects.got_to(1, tokens + further)
        assert suspects.next() is None


def test_suspects_run_alone_in_order_of_their_deaths() -> None:
    suspects = Suspects()
    for _ in range(DEATHS):
        for uid in (1, 2, 3):
            suspects.was_present(uid, 0, alone=False)
    suspects.was_present(4, 0, alone=False)
    suspects.was_present(2, 0, alone=False)
    order: list[int | None] = []
    while (first := suspects.next()) is not None:
        order.append(first)
        suspects.forget(first)
    assert order == [2, 3, 1]


def test_when_one_is_found_guilty_those_that_were_only_present_are_free() -> None:
    suspects = Suspects()
    for _ in range(DEATHS):
        for uid in (1, 2):
            suspects.was_present(uid, 0, alone=False)
    suspects.was_present(1, 0, alone=True)
    for _ in range(DEATHS_ALONE):
        assert suspects.next() is not None
        guilty = suspects.was_present(2, 0, alone=True)
    assert guilty
    assert suspects.must_be_alone(1), "it has been alone once itself"
    assert not suspects.must_be_alone(2)
