"""What the commands do on a cluster: the actors of a pipeline, by their names in its namespace."""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import ray
from ray import ObjectRef, PlacementGroupID
from ray.exceptions import RayError
from ray.util import list_named_actors
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from nanovllm.client.results import PipelineUnavailable
from nanovllm.ray.actors import HEAD, Engine, Head
from nanovllm.ray.launched import GRACE_S
from nanovllm.ray.plan import STARTS, WAITS, EnginePlan, EngineState, HeadState, Plan
from nanovllm.transport.endpoints import host_and_port

# What is called between two looks; with the states of the head and of engines by their numbers.
Look = Callable[[HeadState | None, dict[int, EngineState]], None]

# From one look at the actors to the next; how long an answer may take while others are waited for,
# and else; how long a connection.
LOOK_AGAIN_S: Final = 0.3
SOON_S: Final = 1.0
ANSWER_S: Final = 5.0
CONNECT_S: Final = 5.0
_ENGINE: Final = "engine-"
# Ray would kill an actor's children with the actor: they have things to remove before they end.
_ENVIRONMENT: Final = {"env_vars": {"RAY_kill_child_processes_on_worker_exit": "0"}}
_ANY_NODE: Final = {
    "lifetime": "detached",
    "max_restarts": -1,
    "max_concurrency": 16,
    "runtime_env": _ENVIRONMENT,
}


class Failed(ValueError):
    """The pipeline, or an engine, cannot start; the message says why."""


class Cluster:
    """A connection to a cluster, and there to the pipeline called `name`.

    Raises:
        PipelineUnavailable: no cluster answers.
    """

    def __init__(self, address: str, name: str) -> None:
        self._name = name
        try:
            if address != "auto":  # for one that is not there Ray looks for minutes
                socket.create_connection(host_and_port(address), CONNECT_S).close()
            ray.init(address, namespace=name, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise PipelineUnavailable(
                f"no Ray cluster at {address}: `ray start --head` starts one, and --address names"
                f" another ({error})"
            ) from None
        # As Ctrl-C. Ray's handler would end the command before it takes away what it has begun.
        signal.signal(signal.SIGTERM, signal.default_int_handler)

    def gpus(self) -> int:
        """GPUs of all nodes together."""
        return int(ray.cluster_resources().get("GPU", 0))

    def up(self, plan: Plan, engines: int, look: Look) -> HeadState:
        """Returns when all engines are ready. On any failure nothing is left.

        Raises Failed.
        """
        taken = Failed(f"a pipeline {self._name!r} runs there: see `nanovllm-ray status`")
        if self._there():
            raise taken
        here = ray.get_runtime_context().get_node_id()
        near = NodeAffinitySchedulingStrategy(here, soft=True)
        try:
            ray.remote(Head).options(
                name=HEAD, num_cpus=1, scheduling_strategy=near, **_ANY_NODE
            ).remote(plan)
        except ValueError:  # another command was faster
            raise taken from None
        try:
            for number in range(engines):
                self._start(number, plan.engine)
            return self._wait(range(engines), look)
        except BaseException:
            self.down()
            raise

    def scale(self, count: int, plan: EnginePlan, look: Look) -> None:
        """Runs `count` engines from now on; returns when they do.

        Raises Failed: an engine cannot start; the others go on.
        """
        there = self._engines()
        free = (number for number in itertools.count() if number not in there)
        new = [*itertools.islice(free, max(0, count - len(there)))]
        try:
            for number in new:
                self._start(number, plan)
            if new:
                self._wait(new, look)
        except BaseException:
            self._end(new, 0.0)
            raise
        self._end(there[count:], plan.drain_s)

    def state(self) -> tuple[HeadState | None, dict[int, EngineState]]:
        """Raises PipelineUnavailable if there is none."""
        self._check()
        return self._states(ANSWER_S)

    def engine_plan(self) -> EnginePlan:
        """Raises PipelineUnavailable if there is no pipeline, or its head does not answer."""
        self._check()
        state: HeadState | None
        (state,) = self._ask([HEAD], "state", ANSWER_S)
        if state is None:
            raise PipelineUnavailable("the head does not answer: Ray is placing it anew")
        return state.engine

    def down(self) -> bool:
        """Ends the pipeline; returns False if there was nothing."""
        there, engines = self._there(), self._engines()
        with contextlib.suppress(PipelineUnavailable):  # the head is not placed
            self._stop([HEAD], self.engine_plan().drain_s)
        self._end(engines, 0.0)
        self._kill([HEAD])
        return there

    def _start(self, number: int, plan: EnginePlan) -> None:
        bundle: dict[str, float] = {"CPU": 1}
        if plan.gpus:
            bundle["GPU"] = plan.gpus
        name = _engine(number)
        group = placement_group(
            [bundle], "STRICT_PACK", name=f"{self._name}:{name}", lifetime="detached"
        )
        ray.remote(Engine).options(
            name=name,
            num_cpus=1,
            num_gpus=plan.gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0),
            **_ANY_NODE,
        ).remote(plan.drain_s)

    def _wait(self, engines: Sequence[int], look: Look) -> HeadState:
        """Returns when the head and these engines are ready. Raises Failed."""
        while True:
            head, states = self._states(SOON_S)
            look(head, states)
            if not states.keys() >= {*engines}:
                raise Failed("another command has ended the engines meanwhile")
            for number in engines:
                if (state := states[number]).error:
                    raise Failed(f"engine {number} on {state.where} cannot start: {state.error}")
            if head is not None and head.error:
                error = head.error.replace("--services", "--port: --services")
                raise Failed(f"the head cannot start: {error}")
            if head is not None and head.ready and all(states[n].ready for n in engines):
                return head
            time.sleep(LOOK_AGAIN_S)

    def _states(self, timeout_s: float) -> tuple[HeadState | None, dict[int, EngineState]]:
        groups = self._groups()
        head, *answers = self._ask([HEAD, *groups], "state", timeout_s)
        states = {
            _number(name): answer or EngineState(STARTS if group.state == "CREATED" else WAITS)
            for (name, group), answer in zip(groups.items(), answers, strict=True)
        }
        return head, dict(sorted(states.items()))

    def _ask(self, names: Sequence[str], method: str, timeout_s: float) -> list[Any]:
        """What these actors answer; None of those that do not in time."""
        asked: list[Any] = []
        for name in names:
            try:
                asked.append(getattr(ray.get_actor(name), method).remote())
            except ValueError:  # there is none of this name
                asked.append(None)
        refs = [ref for ref in asked if ref is not None]
        answered, _ = ray.wait(refs, num_returns=len(refs), timeout=timeout_s) if refs else ([], 0)
        return [_answer(ref) if ref in answered else None for ref in asked]

    def _there(self) -> bool:
        return HEAD in list_named_actors() or bool(self._groups())

    def _check(self) -> None:
        if not self._there():
            raise PipelineUnavailable(
                f"no pipeline {self._name!r} runs on this cluster: `nanovllm-ray up` starts one,"
                " and --name names another"
            )

    def _end(self, engines: Sequence[int], drain_s: float) -> None:
        """Ends engines for good, all at the same time."""
        names = [*map(_engine, engines)]
        self._stop(names, drain_s)
        self._kill(names)

    def _stop(self, names: Sequence[str], drain_s: float) -> None:
        """Ends what these actors run; those that are not placed run nothing."""
        reached = [
            name
            for name, state in zip(names, self._ask(names, "state", ANSWER_S), strict=True)
            if state is not None
        ]
        self._ask(reached, "stop", drain_s + 2 * GRACE_S)

    def _kill(self, names: Sequence[str]) -> None:
        """Removes these actors and their placement groups; returns when they are gone."""
        for name in names:
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(name))
        for name, group in self._groups().items():
            if name in names:
                remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(group.number)))
        while not {*names}.isdisjoint({*list_named_actors(), *self._groups()}):
            time.sleep(LOOK_AGAIN_S)

    def _engines(self) -> list[int]:
        """The numbers of the engines: each has a placement group, and that an actor."""
        return sorted(map(_number, self._groups()))

    def _groups(self) -> dict[str, _Group]:
        """The placement groups of the engines, by the names of their actors."""
        ours = re.compile(re.escape(self._name) + rf":({_ENGINE}\d+)")
        return {
            found[1]: _Group(number, group["state"])
            for number, group in placement_group_table().items()
            if (found := ours.fullmatch(group["name"])) and group["state"] != "REMOVED"
        }


class _Group(NamedTuple):
    number: str
    state: str


def _number(name: str) -> int:
    return int(name.removeprefix(_ENGINE))


def _engine(number: int) -> str:
    return f"{_ENGINE}{number}"


def _answer(ref: ObjectRef) -> Any:
    """None if the actor has died."""
    try:
        return ray.get(ref)
    except RayError:
        return None
