"""Guilty requests are found, in a bounded number of deaths, and innocent ones never."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from nanovllm.messages import Admitted, Cancel, HandedOn, Lost, Refused, Tokenize, unpack
from nanovllm.protocol import Error, Finish
from nanovllm.services.ingress.suspects import (
    CLEARING_TOKENS,
    DEATHS,
    DEATHS_ALONE,
    NOTHING,
    Deaths,
    InHand,
    Suspects,
)
from nanovllm.transport.links import Peer
from tests.ingress.harness import INCARNATION, SCHEDULER, World, delta

Guilt = Literal["", "tokenizer", "scheduler", "gpu_worker", "gpu_worker, late", "detokenizer"]
GUILTS: tuple[Guilt, ...] = ("", "tokenizer", "scheduler", "gpu_worker", "gpu_worker, late")
NEW_TOKENS = 60
LATE = 40
SLOTS = 4
# A guilty request may be tried in a service that has had others, or has some taken back because of
# another death: such a death proves nothing.
MOST_DEATHS = 2 * (DEATHS + DEATHS_ALONE + 1)

Draw = Callable[[int], int]


class Pipeline:
    """Tokenizers, scheduler, worker group and detokenizer around a core, in their smallest form.
    They crash on guilty requests, and can be killed from outside.

    Args:
        guilt: what each request brings down.
        tokenizers: how many there are.
        draw: an integer below its argument.
    """

    def __init__(self, guilt: list[Guilt], tokenizers: int, draw: Draw) -> None:
        self.world = World(services=False)
        self.core = self.world.core
        self.draw = draw
        self.crashes = 0
        self.kills = 0
        self.heard: list[object] = []
        self.inboxes: dict[Peer, dict[int, Tokenize]] = {}
        self.records: dict[int, Tokenize] = {}
        self.tokens: dict[int, int] = {}
        self.decoded: set[int] = set()  # in this life of the detokenizer
        self._lives = 100
        for index in range(tokenizers):
            self._tokenizer_up(index)
        self.scheduler = self._life("scheduler")
        self.worker = self._life("gpu_worker")
        self.detokenizer = self._life("detokenizer")
        self.core.scheduler_up(self.scheduler, reborn=True)
        self.guilt = dict(enumerate(guilt, (INCARNATION << 32) + 1))
        for uid in self.guilt:
            self.world.generate(str(uid))

    # What goes on -------------------------------------------------------------------------------

    def deliver(self) -> None:
        """What the core has to say arrives."""
        for peer, messages in self.core.dispatcher.unsent():
            for message in messages:
                if isinstance(message, Cancel):
                    self.inboxes[peer].pop(message.uid, None)
                else:
                    self.inboxes[peer][message.uid] = message
            messages.clear()
        self.heard += self.world.heard()
        for uid in self.core.ends:
            self.records.pop(uid, None)
        for uid, attempt in self.core.quarantine.recalls.items():
            if uid in self.records and self.records[uid].attempt <= attempt:
                del self.records[uid]
        self.core.ends.clear()
        self.core.quarantine.recalls.clear()

    def tokenize(self, peer: Peer) -> None:
        if not self.inboxes[peer]:
            return
        uid = next(iter(self.inboxes[peer]))
        if self.guilt[uid] == "tokenizer":
            self.tokenizer_dies(peer, by_itself=True)
            return
        tokenize = self.inboxes[peer].pop(uid)
        held = self.records.get(uid)
        if held is None or held.attempt < tokenize.attempt:
            self.records[uid] = tokenize
            self.tokens[uid] = len(unpack(tokenize.output))
        if self.guilt[uid] == "scheduler":
            self.scheduler_dies(by_itself=True)
            return
        self.core.from_tokenizer(
            HandedOn(uid, tokenize.attempt, 1, self.scheduler.incarnation), now=0.0
        )
        self.core.from_scheduler(Admitted(uid, tokenize.attempt))

    def step(self) -> None:
        for uid in self.running:
            guilt, place = self.guilt[uid], self.tokens[uid]
            if guilt == "gpu_worker" or (guilt == "gpu_worker, late" and place == LATE):
                self.worker_dies(by_itself=True)
                return
        for uid in self.running:
            self.decoded.add(uid)
            if self.guilt[uid] == "detokenizer":
                self.detokenizer_dies(by_itself=True)
                return
            self._sample(uid)

    def _sample(self, uid: int) -> None:
        tokenize, place = self.records[uid], self.tokens[uid]
        self.tokens[uid] += 1
        end = self.tokens[uid] == NEW_TOKENS
        self.core.from_detokenizer(delta(tokenize, place, [7], end=end))
        if end:
            del self.records[uid]

    @property
    def running(self) -> list[int]:
        return list(self.records)[:SLOTS]

    # Who dies -----------------------------------------------------------------------------------

    def tokenizer_dies(self, peer: Peer, *, by_itself: bool) -> None:
        del self.inboxes[peer]
        self._death(peer, lambda: self.core.service_down(peer), by_itself)
        self._tokenizer_up(peer.index)

    def scheduler_dies(self, *, by_itself: bool) -> None:
        self.records.clear()
        before = self.scheduler
        self._death(before, lambda: self.core.scheduler_down(before), by_itself)
        self.scheduler = self._life("scheduler")
        self.core.scheduler_up(self.scheduler, reborn=True)

    def worker_dies(self, *, by_itself: bool) -> None:
        self._lose(self.worker, self.running, others=False, by_itself=by_itself)
        self.worker = self._life("gpu_worker")

    def detokenizer_dies(self, *, by_itself: bool) -> None:
        held = [uid for uid in self.running if uid in self.decoded]
        others = len(self.decoded) > 1
        self._lose(self.detokenizer, held, others=others, by_itself=by_itself)
        self.detokenizer = self._life("detokenizer")
        self.decoded.clear()

    def _lose(self, life: Peer, uids: list[int], *, others: bool, by_itself: bool) -> None:
        raw = np.array(uids, dtype="<i8").tobytes()
        lost = Lost(life.role, life.index, life.incarnation, raw, others)
        self._death(life, lambda: self.core.from_scheduler(lost), by_itself)

    def _death(self, life: Peer, is_noticed: Callable[[], None], by_itself: bool) -> None:
        """The supervisor may tell of it before or after it is noticed."""
        self.crashes += by_itself
        self.kills += not by_itself
        told_first = by_itself and bool(self.draw(2))
        if told_first:
            self.core.quarantine.crashed(life)
        is_noticed()
        if by_itself and not told_first:
            self.core.quarantine.crashed(life)

    def _tokenizer_up(self, index: int) -> None:
        peer = self._life("tokenizer", index)
        self.inboxes[peer] = {}
        self.core.service_up(peer)

    def _life(self, role: str, index: int = 0) -> Peer:
        self._lives += 1
        return Peer(role, index, self._lives)


@settings(max_examples=150, deadline=None)
@given(
    guilt=st.lists(st.sampled_from((*GUILTS, "", "detokenizer")), min_size=1, max_size=9),
    tokenizers=st.integers(1, 2),
    data=st.data(),
)
def test_the_guilty_are_found_and_the_others_finish(
    guilt: list[Guilt], tokenizers: int, data: st.DataObject
) -> None:
    pipeline = Pipeline(guilt, tokenizers, lambda below: data.draw(st.integers(0, below - 1)))
    kills: list[Callable[[], None]] = [
        lambda: pipeline.tokenizer_dies(next(iter(pipeline.inboxes)), by_itself=False),
        lambda: pipeline.scheduler_dies(by_itself=False),
        lambda: pipeline.worker_dies(by_itself=False),
        lambda: pipeline.detokenizer_dies(by_itself=False),
    ]
    aborted: set[int] = set()

    def abort() -> None:
        uid = data.draw(st.sampled_from(list(pipeline.guilt)))
        aborted.add(uid)
        pipeline.world.say({"type": "abort", "id": str(uid)})

    def tokenize() -> None:
        pipeline.tokenize(data.draw(st.sampled_from(list(pipeline.inboxes))))

    works = [pipeline.deliver, tokenize, pipeline.step]
    for happens in data.draw(
        st.lists(st.sampled_from([*works, *works, *works, *kills, abort]), max_size=60)
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
        pipeline.step()
        pipeline.deliver()
    for message in pipeline.heard:
        if isinstance(message, Error):
            assert message.code == "poisoned"
            assert pipeline.guilt[int(message.id or "")], "an innocent one was set aside"
        if isinstance(message, Finish):
            uid = int(message.id)
            assert uid in aborted or not pipeline.guilt[uid]
    disturbances = len(aborted) + pipeline.kills
    num_guilty = sum(map(bool, guilt))
    assert pipeline.crashes <= MOST_DEATHS * num_guilty + disturbances


def test_a_suspect_that_is_refused_holds_nobody_back() -> None:
    world = World()
    first, second = world.start("a", "b")
    for incarnation in range(DEATHS):
        worker = Peer("gpu_worker", 0, 1 + incarnation)
        uids = np.array([first.uid, second.uid], dtype="<i8").tobytes()
        world.core.from_scheduler(Lost(worker.role, 0, worker.incarnation, uids, others=False))
        world.core.quarantine.crashed(worker)
    assert world.core.quarantine.recalls == {first.uid: 1}, "the latest runs alone"
    assert world.tokenizes() == []
    world.core.scheduler_down(SCHEDULER)
    world.core.scheduler_up(Peer("scheduler", 0, 99), reborn=True)
    (alone,) = world.tokenizes()
    assert alone.uid == second.uid
    world.core.from_tokenizer(Refused(alone.uid, alone.attempt, "internal", "no"), now=0.0)
    (other,) = world.tokenizes()
    assert other.uid == first.uid, "it is the other's turn, though nobody has read the error"


@given(
    st.lists(st.tuples(st.sampled_from(["lost", "by itself", "connected"]), st.integers(1, 3))),
    st.lists(st.frozensets(st.integers(1, 4), min_size=1)),
)
def test_the_halves_of_a_death_are_joined_once_and_only_in_one_life(
    events: list[tuple[str, int]], hands: list[frozenset[int]]
) -> None:
    deaths = Deaths()
    latest: dict[int, InHand | None] = {}
    told: set[int] = set()
    for (what, incarnation), uids in zip(events, hands, strict=False):
        life = Peer("tokenizer", 0, incarnation)
        in_hand = InHand(uids, others=False)
        if what == "lost":
            joined = deaths.lost(life, in_hand)
            assert joined is None or (joined == in_hand and incarnation in told)
            latest[incarnation] = in_hand if joined is None else None
        elif what == "connected":
            assert deaths.lost(life, NOTHING) is None
            latest.clear()
        else:
            told.add(incarnation)
            joined = deaths.by_itself(life)
            assert joined is None or joined == latest.pop(incarnation)


def test_who_gets_further_than_it_was_at_a_death_is_cleared_and_later_has_to_get_twice_as_far() -> (
    None
):
    suspects = Suspects()
    place = 100
    for further in (CLEARING_TOKENS, 2 * CLEARING_TOKENS, 4 * CLEARING_TOKENS):
        for _ in range(DEATHS):
            assert not suspects.must_be_alone(1)
            assert not suspects.was_there(1, place, alone=False)
        assert suspects.next() == 1
        assert not suspects.got_to(1, place + further - 1)
        assert suspects.got_to(1, place + further)
        assert suspects.next() is None


def test_one_after_the_other_runs_alone_who_was_there_most_often_first() -> None:
    suspects = Suspects()
    for _ in range(DEATHS):
        for uid in (1, 2, 3):
            suspects.was_there(uid, 0, alone=False)
    suspects.was_there(4, 0, alone=False)
    suspects.was_there(2, 0, alone=False)
    order: list[int | None] = []
    while (first := suspects.next()) is not None:
        order.append(first)
        suspects.forget(first)
    assert order == [2, 3, 1]


def test_when_one_is_found_guilty_those_that_were_only_there_are_free() -> None:
    suspects = Suspects()
    for _ in range(DEATHS):
        for uid in (1, 2):
            suspects.was_there(uid, 0, alone=False)
    suspects.was_there(1, 0, alone=True)
    for _ in range(DEATHS_ALONE):
        assert suspects.next() is not None
        guilty = suspects.was_there(2, 0, alone=True)
    assert guilty
    assert suspects.must_be_alone(1), "it has been alone once itself"
    assert not suspects.must_be_alone(2)
