"""Several engines: which one gets a request, and where the requests of one that is gone go."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.messages import End, InHand, Lost, Submit, Tokenized, pack
from nanovllm.protocol import Error, Generate
from nanovllm.services.ingress.engines import CLEARLY_MORE
from nanovllm.services.ingress.pending import PendingRequests
from nanovllm.services.ingress.sessions import Session
from nanovllm.services.ingress.suspects import DEATHS, DEATHS_ALONE
from nanovllm.services.scheduler.blocks import BlockManager, root
from nanovllm.transport.links import Peer
from tests.ingress.harness import READY, SCHEDULER, World, decoded
from tests.ingress.test_suspects import MOST_DEATHS

OTHER = Peer("scheduler", 0, 23, engine=1)
SIZE = 4
STATE = msgspec.structs.replace(READY, block_size=SIZE, slots=100, endpoint="ipc://a")
TOLD = {0: "ipc://a", 1: "ipc://b"}


class Engines(World):
    """Two engines that are ready."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.core.from_scheduler(SCHEDULER, STATE)
        self.core.service_up(OTHER)
        self.ready(OTHER)

    def ready(self, peer: Peer, ready: bool = True) -> None:
        endpoint = TOLD[peer.engine]
        state = msgspec.structs.replace(STATE, ready=ready, endpoint=endpoint)
        self.core.from_scheduler(peer, state)

    def ask(self, name: str, prompt: list[int], **keys: Any) -> tuple[int, Submit]:
        """The engine that gets the request, and what it gets."""
        keys.setdefault("sampling", {"max_tokens": 8})
        self.generate(name, prompt=None, prompt_token_ids=prompt, **keys)
        self.tokenized(*self.tokenizes())
        (given_,) = self.given()
        return given_

    def given(self) -> list[tuple[int, Submit]]:
        return [(e, m) for e, frame in self.frames() for m in frame if isinstance(m, Submit)]

    def frames(self) -> list[tuple[int, list[Any]]]:
        self.core.submit()
        frames = [(peer.engine, frame) for peer, frame in self.core.engines.frames()]
        for number, frame in frames:
            self.core.engines.by_number[number].sent(frame)
        return frames

    def finish(self, submit: Submit, tokens: list[int]) -> None:
        self.core.from_detokenizer(decoded(submit, 0, tokens, end=True))
        self.heard()


@given(
    prompt=st.lists(st.integers(0, 3), max_size=20),
    output=st.lists(st.integers(0, 3), max_size=20),
    salt=st.sampled_from(["", "salt"]),
)
def test_blocks_have_the_names_that_a_scheduler_gives_them(
    prompt: list[int], output: list[int], salt: str
) -> None:
    pending = PendingRequests(1, 10, draw_seed=lambda: 1)
    ask = Generate(id="a", prompt="x", cache_salt=salt)
    request = pending.begin(Session(b"", ""), ask, 1)
    pending.tokenized(request, Tokenized(request.uid, pack(prompt), request.sampling))
    request.name_blocks(SIZE)
    request.output.tokens += pack(output)
    request.name_blocks(SIZE)
    prefix, names = root(salt), []
    manager = BlockManager(20, SIZE)
    tokens = pack(prompt + output)
    for number in range(len(prompt + output) // SIZE):
        block = manager.append()
        assert block is not None
        width = 4 * SIZE
        prefix = manager.register(block, prefix, tokens[number * width : (number + 1) * width])
        names.append(prefix.name)
    assert request.block_names == names


def test_a_request_goes_where_its_prefix_is() -> None:
    world = Engines()
    prompts = [[n] * 12 for n in range(1, 7)]
    at = {}
    for number, prompt in enumerate(prompts):
        engine, submit = world.ask(f"first {number}", prompt)
        world.finish(submit, [9] * 8)
        at[number] = engine
    assert set(at.values()) == {0}, "with no load the first is as good"
    busy, _ = world.ask("long", [7] * 20, sampling={"max_tokens": 30})
    assert busy == 0
    for number, prompt in enumerate(prompts[:3]):
        engine, submit = world.ask(f"again {number}", [*prompt, *[9] * 8, 5])
        assert engine == 1, "one is clearly more loaded"
        world.finish(submit, [9] * 8)
    world.abort("long")
    engine, _ = world.ask("there", [*prompts[4], *[9] * 8, 5])
    assert engine == 0
    engine, _ = world.ask("here", [*prompts[1], *[9] * 8, 5, *[9] * 7, 1, 2, 3])
    assert engine == 1, "where more of it is cached, output included"
    engine, _ = world.ask("salted", [*prompts[1], *[9] * 8], cache_salt="s")
    assert engine == 0, "another salt, another cache: the least loaded one"


def test_a_cache_that_is_gone_draws_no_request() -> None:
    world = Engines()
    engine, submit = world.ask("a", [1] * 20)
    world.finish(submit, [2])
    other, submit = world.ask("b", [3] * 8)
    world.finish(submit, [2])
    assert engine == other == 0
    world.ready(SCHEDULER, ready=False)
    world.ready(SCHEDULER)
    world.ask("load", [4] * 4)
    engine, _ = world.ask("c", [1] * 20)
    assert engine == 1


def test_many_times_the_same_prompt_is_spread() -> None:
    world = Engines()
    counts = {0: 0, 1: 0}
    for number in range(40):
        engine, _ = world.ask(str(number), [1] * 40)
        counts[engine] += 1
    assert max(counts.values()) <= CLEARLY_MORE * min(counts.values()) + 40 / 8


def test_the_requests_of_an_engine_that_is_gone_go_to_another_and_none_comes_back() -> None:
    world = Engines()
    _, quiet = world.ask("quiet", [1] * 8)
    _, streams = world.ask("streams", [1] * 8)
    world.core.from_detokenizer(decoded(streams, 0, [7]))
    on_0 = [submit for submit in (quiet, streams) if submit.uid in world.engine.given]
    assert len(on_0) == 2
    world.ready(SCHEDULER, ready=False)
    ((first, ends), (second, submits)) = world.frames()
    assert (first, second) == (0, 1)
    assert ends == [End(quiet.uid, 1), End(streams.uid, 1)]
    assert [(m.uid, m.attempt, m.output) for m in submits] == [
        (streams.uid, 2, pack([7])),
        (quiet.uid, 2, b""),
    ], "those with output first"
    world.ready(SCHEDULER)
    assert world.frames() == []
    engine, _ = world.ask("new", [2] * 8)
    assert engine == 0
    world.core.service_down(OTHER)
    assert sorted(m.uid for _, m in world.given()) == sorted([streams.uid, quiet.uid])


def test_where_no_engine_is_ready_requests_stay() -> None:
    world = Engines()
    _, submit = world.ask("a", [1] * 8)
    world.ready(OTHER, ready=False)
    world.ready(SCHEDULER, ready=False)
    assert world.frames() == []
    world.ready(OTHER)
    assert [(e, m.uid, m.attempt) for e, m in world.given()] == [(1, submit.uid, 2)]


def test_detokenizers_are_told_of_the_engines_at_each_change() -> None:
    world = Engines()
    ((peer, (engines,)),) = world.core.detokenizers.frames()
    assert engines.endpoints == TOLD
    world.core.detokenizers.sent(peer, [engines])
    world.ready(OTHER, ready=False)
    world.core.service_down(OTHER)
    assert list(world.core.detokenizers.frames()) == [], "an engine that is gone comes back"


def test_an_engine_that_is_to_stop_gives_its_requests_away_first() -> None:
    world = Engines()
    _, submit = world.ask("a", [1] * 8)
    world.core.vacate(0, leaves=False)
    assert world.core.engines.vacated() == [0]
    assert [(e, m.uid) for e, m in world.given()] == [(1, submit.uid)]
    assert world.core.engines.vacated() == [], "it is said once"
    engine, _ = world.ask("b", [1] * 8)
    assert engine == 1, "it is still ready, and stays empty"
    world.core.vacate(1, leaves=False)
    assert world.core.engines.vacated() == [1], "there is no other that stays"
    world.ready(SCHEDULER, ready=False)
    world.ready(SCHEDULER)
    assert len(world.given()) == 2, "the one that has started anew gets what the next one had"
    assert world.core.engines.vacated() == []


def test_an_engine_waits_until_another_is_ready_to_take_its_requests() -> None:
    world = Engines()
    _, submit = world.ask("a", [1] * 8)
    world.ready(OTHER, ready=False)
    world.core.vacate(0, leaves=False)
    assert world.core.engines.vacated() == []
    world.ready(OTHER)
    assert [(e, m.uid) for e, m in world.given()] == [(1, submit.uid)]
    assert world.core.engines.vacated() == [0]


@pytest.mark.parametrize("dead", [False, True], ids=["told first", "dead first"])
def test_an_engine_that_has_left_for_good_is_forgotten(dead: bool) -> None:
    world = Engines()
    _, submit = world.ask("a", [1] * 8)
    if dead:
        world.core.service_down(SCHEDULER)
    world.core.vacate(0, leaves=True)
    if not dead:
        world.core.service_down(SCHEDULER)
    assert [(e, m.uid) for e, m in world.given()] == [(1, submit.uid)]
    ((_, (engines,)),) = world.core.detokenizers.frames()
    assert engines.endpoints == {1: TOLD[1]}


def test_an_engine_whose_machine_is_given_up_goes_on_while_it_is_connected() -> None:
    world = Engines()
    world.ready(OTHER, ready=False)
    world.core.forget(0)
    engine, submit = world.ask("a", [1] * 8)
    assert engine == 0
    world.ready(OTHER)
    world.core.service_down(SCHEDULER)
    assert [(e, m.uid) for e, m in world.given()] == [(1, submit.uid)]
    assert [*world.core.engines.by_number] == [1]
    world.core.service_down(OTHER)
    world.core.forget(1)
    assert not world.core.engines.by_number


@pytest.mark.parametrize("moved", [False, True], ids=["told first", "moved first"])
def test_a_guilty_request_is_given_to_no_engine_any_more(moved: bool) -> None:
    """Its engine is gone before, or after, the ingress knows that a service died by itself."""
    world = Engines()
    _, good = world.ask("good", [1] * 8)
    _, bad = world.ask("bad", [1] * 8)
    for death in range(MOST_DEATHS):
        has_it = [n for n, e in world.core.engines.by_number.items() if bad.uid in e.given]
        scheduler = {0: SCHEDULER, 1: OTHER}[has_it[0]]
        worker = Peer("gpu_worker", 0, death + 1, engine=scheduler.engine)
        uids = list(world.core.engines.by_number[scheduler.engine].given)
        in_hand = InHand(uids, alone=len(uids) == 1)
        if moved:
            world.ready(scheduler, ready=False)
        world.core.from_scheduler(scheduler, Lost(worker.service, worker.incarnation, in_hand))
        world.core.quarantine.crashed(worker)
        world.ready(scheduler, ready=False)
        world.ready(scheduler)
        given_ = {submit.uid for _, submit in world.given()}
        if any(isinstance(message, Error) for message in world.heard()):
            break
    assert given_ == {good.uid}


def test_a_request_is_moved_once_before_it_is_known_why_an_engine_is_gone() -> None:
    """Two engines die so soon one after the other that the supervisor has told of neither."""
    world = Engines()
    third = Peer("scheduler", 0, 24, engine=2)
    world.core.service_up(third)
    world.core.from_scheduler(third, msgspec.structs.replace(STATE, endpoint="ipc://c"))
    engine, bad = world.ask("bad", [1] * 8)
    schedulers = {0: SCHEDULER, 1: OTHER, 2: third}
    workers = [Peer("gpu_worker", 0, 7, engine=n) for n in schedulers]

    def dies(engine: int) -> list[int]:
        """The engines that get the request then."""
        worker, in_hand = workers[engine], InHand([bad.uid], alone=False)
        lost = Lost(worker.service, worker.incarnation, in_hand)
        world.core.from_scheduler(schedulers[engine], lost)
        gone = msgspec.structs.replace(STATE, ready=False, endpoint=f"ipc://{'abc'[engine]}")
        world.core.from_scheduler(schedulers[engine], gone)
        return [number for number, submit in world.given() if submit.uid == bad.uid]

    (second,) = dies(engine)
    assert dies(second) == []
    world.core.quarantine.crashed(workers[engine])
    world.core.quarantine.crashed(workers[second])
    ((last, _),) = world.given()
    assert last not in (engine, second)
    assert world.core.quarantine.alone is not None
    assert world.core.quarantine.alone.uid == bad.uid


def test_a_request_that_ran_alone_waits_until_it_is_known_why_its_engine_is_gone() -> None:
    """The same engine died of it before."""
    world = Engines()
    engine, bad = world.ask("bad", [1] * 8)
    schedulers = {0: SCHEDULER, 1: OTHER}
    deaths = 0
    while not any(isinstance(message, Error) for message in world.heard()):
        deaths += 1
        worker = Peer("gpu_worker", 0, deaths, engine=engine)
        lost = Lost(worker.service, deaths, InHand([bad.uid], alone=deaths > DEATHS))
        world.core.from_scheduler(schedulers[engine], lost)
        world.ready(schedulers[engine], ready=False)
        moved = world.given()
        assert bool(moved) == (deaths == 1)
        world.core.quarantine.crashed(worker)
        world.ready(schedulers[engine])
        for number, _ in moved or world.given():
            engine = number
    assert deaths == DEATHS + DEATHS_ALONE
