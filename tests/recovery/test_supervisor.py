"""The supervisor's policy, on a clock of the test's: when services are started, ended, given up."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanovllm.exit_codes import EXIT_FOLLOWED, EXIT_MISCONFIGURED
from nanovllm.launch.groups import (
    CONNECTED_START_LIVENESS_S,
    GRACE_S,
    LIVENESS_S,
    LONGEST_DELAY_S,
    MAX_FAILED_STARTS,
    PROGRESS_S,
    STABLE_S,
    START_LIVENESS_S,
    Action,
    Answer,
    Blame,
    GiveUp,
    Group,
    Kill,
    Move,
    Start,
    Stop,
    TakeBack,
    Work,
)
from nanovllm.launch.policy import MOVE_S, Policy
from nanovllm.names import ENGINE_ROLES, ServiceId
from nanovllm.transport.links import Peer

SCHEDULER = ServiceId("scheduler", 0)
RANKS = [ServiceId("gpu_worker", 0), ServiceId("gpu_worker", 1)]
TOKENIZERS = [ServiceId("tokenizer", 0), ServiceId("tokenizer", 1)]
GROUPS = [[SCHEDULER], RANKS, [TOKENIZERS[0]], [TOKENIZERS[1]]]
SERVICES = [service for group in GROUPS for service in group]
KILLED = -signal.SIGKILL
COMMAND = Peer("command", 1, 1)


class World:
    """Processes as the policy asks for them. They report once a second; what breaks a rule of
    supervision raises.

    Args:
        load_s: how long a service takes to be ready.
        obeys: whether services end on SIGTERM.
    """

    def __init__(self, load_s: float = 0.5, obeys: bool = True) -> None:
        self.now = 1000.0
        self.policy = Policy(GROUPS, self.now)
        self.load_s = load_s
        self.obeys = obeys
        self.alive: dict[ServiceId, float] = {}
        self.starts: dict[ServiceId, list[float]] = {}
        self.silent: set[ServiceId] = set()
        self.busy: set[ServiceId] = set()
        self.connected: set[ServiceId] = set()
        self.killed: list[tuple[ServiceId, str]] = []
        self.moves: list[Move] = []
        self.moves_at_once = True
        self.given_up: GiveUp | None = None
        self.taken_back: list[TakeBack] = []
        self.answered: list[Peer] = []
        self.blamed: list[ServiceId] = []

    def run(self, seconds: float, each: Callable[[], None] = lambda: None) -> None:
        """Time passes, in eighths of a second, which are exact; `each` is called at each."""
        for _ in range(round(seconds * 8)):
            self.now += 0.125
            each()
            for service, started in list(self.alive.items()):
                if service in self.silent:
                    continue
                group = self.group_of(service)
                if self.now - started >= self.load_s:
                    group.ready(service, self.now)
                if self.now.is_integer():
                    group.sign(service, self.now)
                    work = Work(1, 7) if service in self.busy else Work(0, 7)
                    group.work(service, work, self.now)
            self.look()

    def look(self) -> None:
        assert self.policy.wait_s(self.now) <= 1.0
        for action in self.policy.due(self.now, self.connected):
            self.do(action)

    def end(self, service: ServiceId, code: int = KILLED) -> None:
        if self.alive.pop(service, None) is not None:
            self.group_of(service).ended(service, code, self.now)

    def group_of(self, service: ServiceId) -> Group:
        group = self.policy.group_of(service)
        assert group is not None, "a group is there while a process of it is"
        return group

    def do(self, action: Action) -> None:
        match action:
            case Start(service=service):
                group = next((g for g in GROUPS if service in g), [service])
                others = [other for other in group if other in self.alive]
                assert all(self.alive[other] == self.now for other in others), "one for all"
                assert service not in self.alive
                self.alive[service] = self.now
                self.starts.setdefault(service, []).append(self.now)
            case Stop(service=service):
                assert service in self.alive
                if self.obeys:
                    self.end(service, 0)
            case Kill(service=service, why=why):
                assert service in self.alive
                self.killed.append((service, why))
                self.silent.discard(service)
                self.end(service)
            case GiveUp():
                self.given_up = self.given_up or action
            case TakeBack():
                self.taken_back.append(action)
            case Move():
                self.moves.append(action)
                if self.moves_at_once:
                    self.policy.moved(action.engine)
            case Answer(asked_by=peer):
                self.answered.append(peer)
            case Blame(service=service):
                self.blamed.append(service)


def test_all_are_started_at_once_and_then_left_alone() -> None:
    world = World()
    world.run(300)
    assert world.policy.all_ready
    assert {service: len(starts) for service, starts in world.starts.items()} == dict.fromkeys(
        SERVICES, 1
    )
    assert not world.killed


@pytest.mark.parametrize("victim", SERVICES, ids=str)
def test_a_death_restarts_its_group_at_once_and_no_other(victim: ServiceId) -> None:
    world = World()
    world.run(STABLE_S + 1)
    world.end(victim)
    world.look()
    world.look()
    group = next(group for group in GROUPS if victim in group)
    restarted = [service for service in SERVICES if len(world.starts[service]) == 2]
    assert restarted == group
    assert world.starts[victim][1] == world.now


@given(
    st.floats(0.0, 8.0),
    st.lists(st.lists(st.sampled_from(SERVICES), max_size=3), min_size=1, max_size=60),
)
def test_kills_every_second_for_a_minute_are_borne(
    load_s: float, kills: list[list[ServiceId]]
) -> None:
    world = World(load_s)
    for victims in kills:
        for victim in victims:
            world.end(victim)
        world.run(1)
    world.run(LONGEST_DELAY_S + load_s + 1)
    assert world.given_up is None
    assert world.policy.all_ready
    assert sorted(world.alive, key=SERVICES.index) == SERVICES


def test_the_same_service_is_borne_to_be_killed_each_second() -> None:
    world = World(load_s=10.0)
    for _ in range(60):
        world.end(RANKS[1])
        world.run(1)
    world.run(15)
    assert world.given_up is None
    assert world.policy.all_ready


@given(st.sampled_from(SERVICES), st.sampled_from([1, 4, -signal.SIGSEGV, -signal.SIGABRT]))
def test_a_service_that_cannot_become_ready_is_given_up(service: ServiceId, code: int) -> None:
    world = World(load_s=5.0)

    def crash() -> None:
        if service in world.alive and world.now - world.alive[service] > 0.5:
            world.end(service, code)

    while world.given_up is None:
        world.run(0.125, crash)
        assert world.now < 1060
    assert world.given_up == GiveUp(service, MAX_FAILED_STARTS)
    assert len(world.starts[service]) == MAX_FAILED_STARTS
    waits = [b - a for a, b in zip(world.starts[service], world.starts[service][1:], strict=False)]
    assert waits == sorted(waits)


def test_a_service_that_is_always_killed_while_it_loads_is_given_up_in_the_end() -> None:
    world = World(load_s=5.0)
    while world.given_up is None:
        world.run(2)
        world.end(SCHEDULER)
        world.look()
        assert world.now < 1300
    assert world.now > 1100


def test_a_service_that_is_misconfigured_is_given_up_at_once_but_only_at_first() -> None:
    world = World()
    world.look()
    world.end(RANKS[1], 2)
    world.look()
    assert world.given_up == GiveUp(RANKS[1], 1)
    assert world.policy.gives_up
    world = World()
    world.run(1)
    world.end(RANKS[1], 2)
    world.run(1)
    assert world.given_up is None
    assert world.policy.all_ready
    assert not world.policy.gives_up


def test_the_back_off_grows_and_begins_anew_after_good_health() -> None:
    world = World(load_s=0.0)
    delays: list[float] = []
    for _ in range(12):
        world.run(1)
        assert world.policy.all_ready
        died_at = world.now
        world.end(SCHEDULER)
        world.run(LONGEST_DELAY_S + 0.5)
        delays.append(world.starts[SCHEDULER][-1] - died_at)
    assert delays == sorted(delays)
    assert delays[0] <= 0.125
    assert delays[-1] == LONGEST_DELAY_S
    world.run(STABLE_S)
    world.end(SCHEDULER)
    world.look()
    world.look()
    assert world.starts[SCHEDULER][-1] == world.now


@pytest.mark.parametrize(("load_s", "limit_s"), [(0.5, LIVENESS_S), (1e9, START_LIVENESS_S)])
def test_a_silent_service_is_killed_in_time_and_not_before(load_s: float, limit_s: float) -> None:
    world = World(load_s)
    world.run(3)
    world.silent.add(RANKS[0])
    world.run(limit_s - 1.5)
    assert not world.killed
    world.run(2.5)
    (first, why), *rest = world.killed
    assert first == RANKS[0]
    assert f"no sign for {limit_s:g} s" in why
    assert rest == [(RANKS[1], "")]


@given(st.integers(5, 10_000))
def test_silence_while_the_supervisor_was_stopped_is_forgiven(seconds: int) -> None:
    world = World()
    world.run(3)
    world.now += seconds
    world.look()
    world.run(3)
    assert not world.killed


def test_a_service_with_work_but_no_progress_is_killed_and_an_idle_one_is_not() -> None:
    world = World()
    world.run(PROGRESS_S + 10)
    assert not world.killed
    world.busy.add(TOKENIZERS[0])
    world.run(PROGRESS_S - 1)
    assert not world.killed
    world.run(3)
    assert [service for service, _ in world.killed] == [TOKENIZERS[0]]


def test_a_connected_service_that_starts_may_import_for_minutes() -> None:
    world = World(load_s=1e9)
    world.run(3)
    world.silent.update(RANKS)
    world.connected.update(RANKS)
    world.run(CONNECTED_START_LIVENESS_S - 1.5)
    assert not world.killed
    world.run(2.5)
    assert {service for service, _ in world.killed} == set(RANKS)


def test_only_a_tokenizer_may_be_silent_once_it_is_ready() -> None:
    world = World()
    world.run(3)
    world.silent.add(SCHEDULER)
    world.connected.update(SERVICES)
    world.run(LIVENESS_S + 1)
    assert [service for service, _ in world.killed] == [SCHEDULER]


def test_a_tokenizer_that_answers_may_be_silent_for_as_long_as_its_work_may_take() -> None:
    world = World()
    world.run(3)
    world.silent.add(TOKENIZERS[0])
    world.connected.add(TOKENIZERS[0])
    world.run(PROGRESS_S - 4)
    assert not world.killed
    world.connected.clear()
    world.run(1)
    assert [service for service, _ in world.killed] == [TOKENIZERS[0]]
    world.silent.add(TOKENIZERS[0])
    world.connected.add(TOKENIZERS[0])
    world.run(PROGRESS_S + 2)
    assert len(world.killed) == 2


def test_loading_is_no_lack_of_progress() -> None:
    world = World(load_s=3 * PROGRESS_S)
    world.busy.update(SERVICES)
    world.run(2 * PROGRESS_S)
    assert not world.killed


@pytest.mark.parametrize(
    ("code", "own"),
    [(0, False), (KILLED, False), (EXIT_FOLLOWED, False), (1, True), (-signal.SIGABRT, True)],
)
def test_a_service_is_blamed_for_its_own_deaths_alone(code: int, own: bool) -> None:
    world = World()
    world.run(3)
    world.end(RANKS[1], code)
    world.run(3)
    assert world.blamed == [RANKS[1]] * own
    assert world.policy.all_ready


# Commands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("obeys", [True, False])
def test_restart_all_is_one_group_after_the_other(obeys: bool) -> None:
    world = World(load_s=1.0, obeys=obeys)
    world.run(3)
    world.policy.restart("all", COMMAND)

    world.run(len(GROUPS) * (GRACE_S + 2), lambda: assert_at_most_one_is_away(world))
    assert world.answered == [COMMAND]
    assert {service: len(starts) for service, starts in world.starts.items()} == dict.fromkeys(
        SERVICES, 2
    )
    assert bool(world.killed) is not obeys


def assert_at_most_one_is_away(world: World) -> None:
    away = [group.services[0] for group in world.policy.groups if not group.settled]
    assert len({s.engine if s.role in ENGINE_ROLES else s for s in away}) <= 1


@pytest.mark.parametrize("role", ["engine", "gpu_worker", "scheduler"])
def test_engines_are_restarted_one_after_the_other_and_their_requests_moved_first(
    role: str,
) -> None:
    world = World(load_s=1.0)
    world.policy.scale("engine", 3, engine, COMMAND, world.now)
    world.run(3)
    world.moves_at_once = False
    before = {service: len(starts) for service, starts in world.starts.items()}
    world.policy.restart(role, COMMAND)
    for number in range(3):
        world.run(2, lambda: assert_at_most_one_is_away(world))
        assert world.moves[number:] == [Move(number, False)]
        assert all(s in world.alive for s in SERVICES), "it runs until its requests are moved"
        if number < 2:
            world.policy.moved(number)
        world.run(2 if number < 2 else MOVE_S, lambda: assert_at_most_one_is_away(world))
    assert world.answered == [COMMAND] * 2
    for service, starts in world.starts.items():
        again = service.role == role or (role == "engine" and service.role in ENGINE_ROLES)
        assert len(starts) - before[service] == again


def test_an_ingress_that_starts_is_told_of_the_engines_that_go() -> None:
    """It may start while requests are moved, and meet an engine that has a moment to live."""
    world = World(load_s=1.0)
    world.policy.scale("engine", 2, engine, COMMAND, world.now)
    world.run(3)
    assert world.policy.vacating == []
    world.moves_at_once = False
    world.policy.restart("engine", COMMAND)
    world.run(0.5)
    assert world.policy.vacating == [Move(0, False)]
    world.run(2 * (MOVE_S + 2))
    world.policy.scale("engine", 1, engine, COMMAND, world.now)
    world.run(0.5)
    assert world.policy.vacating == [Move(1, True)], "it still runs"
    world.policy.moved(1)
    world.run(5)
    assert world.moves[-2:] == [Move(1, True)] * 2, "once more when the engine has ended"
    assert world.policy.vacating == [Move(1, True)]
    world.policy.scale("engine", 2, engine, COMMAND, world.now)
    assert world.policy.vacating == []


@pytest.mark.parametrize("code", [1, EXIT_MISCONFIGURED])
def test_an_engine_that_is_added_and_cannot_start_is_given_up_alone(code: int) -> None:
    world = World(load_s=1.0)
    world.run(3)
    victim, other = ServiceId("gpu_worker", 0, 1), Peer("command", 2, 2)
    world.policy.scale("engine", 2, engine, COMMAND, world.now)
    world.policy.scale("engine", 3, engine, other, world.now)
    world.run(60, lambda: world.end(victim, code))
    times = 1 if code == EXIT_MISCONFIGURED else MAX_FAILED_STARTS
    assert world.taken_back == [TakeBack(victim, times, [COMMAND, other])]
    assert world.given_up is None
    assert not world.answered
    assert world.policy.all_ready
    assert {s.engine for s in world.alive if s.role in ENGINE_ROLES} == {0, 2}
    world.policy.scale("engine", 2, engine, COMMAND, world.now)
    world.run(10)
    assert world.answered == [COMMAND]
    assert {s.engine for s in world.alive if s.role in ENGINE_ROLES} == {0, 1}


@pytest.mark.parametrize("role", ENGINE_ROLES)
def test_an_engine_is_called_back_when_half_of_it_has_ended(role: str) -> None:
    world = World(load_s=1.0, obeys=False)
    world.policy.scale("engine", 2, engine, COMMAND, world.now)
    world.run(3)
    world.policy.scale("engine", 1, engine, COMMAND, world.now)
    world.run(0.5)
    for service in [s for s in world.alive if s.role == role and s.engine == 1]:
        world.end(service, 0)
    world.run(0.5)
    world.policy.scale("engine", 2, engine, COMMAND, world.now)
    world.run(10)
    assert len(world.answered) == 3
    assert {s for s in world.alive if s.engine == 1} == {s for g in engine(1) for s in g}


def engine(number: int) -> list[list[ServiceId]]:
    ranks = [ServiceId("gpu_worker", rank, number) for rank in range(len(RANKS))]
    return [[ServiceId("scheduler", 0, number)], ranks]


def test_restart_goes_on_when_a_service_dies_meanwhile() -> None:
    world = World(load_s=1.0)
    world.run(3)
    world.policy.restart("tokenizer", COMMAND)
    world.run(0.5)
    world.end(TOKENIZERS[0])
    world.end(TOKENIZERS[1])
    world.run(10)
    assert world.answered == [COMMAND]
    assert world.policy.all_ready


@given(
    st.sampled_from(["tokenizer", "engine"]),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.booleans(),
    st.booleans(),
)
def test_scaling_ends_with_the_number_asked_for(
    role: str, counts: list[int], hurried: bool, obeys: bool
) -> None:
    world = World(load_s=1.0, obeys=obeys)
    services = engine if role == "engine" else lambda number: [[ServiceId(role, number)]]
    for count in counts:
        world.policy.scale(role, count, services, COMMAND, world.now)
        world.run(0.25 if hurried else 5)
    world.run(60)
    assert len(world.answered) == len(counts)
    roles = ENGINE_ROLES if role == "engine" else (role,)
    running = {(s.role, s.number) for s in world.alive if s.role in roles}
    assert running == {(of, number) for of in roles for number in range(counts[-1])}
    assert {move.leaves for move in world.moves} <= {True}
    assert not world.killed or not obeys
