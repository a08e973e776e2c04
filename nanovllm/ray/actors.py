"""The actors, each of which runs a launcher."""

from __future__ import annotations

import contextlib
import re
from typing import Final

import ray
from ray.exceptions import RayError

from nanovllm.client.control import Control
from nanovllm.client.results import PipelineUnavailable
from nanovllm.control import Status
from nanovllm.names import first_of
from nanovllm.ray.launched import Keeper
from nanovllm.ray.plan import EngineState, HeadState, Launch, Plan

HEAD: Final = "head"
# So long an engine waits for the head's answer, until it asks again.
ANSWER_S: Final = 10.0


class Head:
    """Runs the launcher of a pipeline without engines, and tells engines how to join it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._host = ray.util.get_node_ip_address()
        launch = plan.head(self._host)
        self._keeper = Keeper(lambda: launch, plan.engine.drain_s)

    def joining(self) -> Launch:
        return self._plan.joining(self._host)

    def state(self) -> HeadState:
        keeper, status = self._keeper, None
        if (launched := keeper.launched) is not None:
            with (
                contextlib.suppress(PipelineUnavailable),
                Control(str(launched.runtime_dir)) as ask,
            ):
                status = ask.status()
        addresses = self._addresses(status)
        return HeadState(bool(keeper.said), keeper.error, addresses, self._plan.engine, status)

    def stop(self) -> None:
        """Returns when requests have finished, or their time is over, and services have ended."""
        self._keeper.stop()

    def _addresses(self, status: Status | None) -> dict[str, str]:
        addresses = {"services": f"tcp://{self._host}:{self._plan.port}"}
        if status is not None:
            settings = self._plan.settings
            for name, asked, bound in (
                ("HTTP", settings.http, status.http),
                ("ingress", settings.ingress, status.endpoint),
            ):
                addresses |= {name: _from_elsewhere(asked, bound, self._host)} if bound else {}
        return addresses


class Engine:
    """Runs a launcher that joins the head's with one engine, wherever the head is."""

    def __init__(self, drain_s: float) -> None:
        self._node = ray.util.get_node_ip_address()
        self._keeper = Keeper(_as_the_head_says, drain_s)

    def state(self) -> EngineState:
        said = self._keeper.said
        joined = re.match(r"machine (\d+):", said)
        number = first_of(int(joined[1])) if joined else None
        return EngineState(self._node, bool(said), self._keeper.error, number)

    def stop(self) -> None:
        """Returns when requests have moved to other engines, and the services have ended."""
        self._keeper.stop()


def _as_the_head_says() -> Launch | None:
    """None while there is no head: Ray is about to place it anew."""
    try:
        launch: Launch = ray.get(ray.get_actor(HEAD).joining.remote(), timeout=ANSWER_S)
    except (RayError, ValueError):
        return None
    return launch


def _from_elsewhere(asked: str, bound: str, host: str) -> str:
    """Where other nodes reach what was asked to bind every address of the node `host`."""
    if asked.removeprefix("tcp://").rpartition(":")[0] not in ("*", "0.0.0.0", "[::]"):
        return bound
    return f"{bound.partition('://')[0]}://{host}:{bound.rpartition(':')[2]}"
