"""The scheduler as a process, among peers over real sockets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from nanovllm.control import Ready, Report, SchedulerStats, ToSupervisor
from nanovllm.messages import (
    Begin,
    End,
    EngineState,
    Finished,
    GroupReady,
    Held,
    Message,
    Missing,
    NewTokens,
    Reset,
    SchedulerToDetokenizer,
    SchedulerToIngress,
    SchedulerToWorker,
    StepPlan,
    StepResult,
    Submit,
    pack,
    pack_int64,
    unpack,
    unpack_int64,
)
from nanovllm.options import settings_argv
from nanovllm.protocol import Sampling
from nanovllm.settings import Settings
from nanovllm.transport.links import BoundLink, ConnectedLink, Peer, Received, Up

TIMEOUT_S = 20.0
UID = (77 << 32) + 1
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
M = TypeVar("M")


class Neighbours:
    """The supervisor, the ingress, a detokenizer and rank 0 of a worker group."""

    def __init__(self, settings: Settings) -> None:
        self.context: zmq.Context[Any] = zmq.Context()
        self._settings = settings
        self._links: list[BoundLink[Any] | ConnectedLink[Any]] = []
        self.events: list[tuple[object, Any]] = []
        control, supervisor = settings.control_endpoint, Peer("supervisor", 0, 1)
        self.supervisor = self.bind(control, supervisor, list[ToSupervisor])
        self.ingress = self.bind_ingress(77)
        self.detokenizer = self.connect(Peer("detokenizer", 0, 4), list[SchedulerToDetokenizer])
        self.worker = self.connect(Peer("gpu_worker", 0, 5), list[SchedulerToWorker])

    def bind(self, endpoint: str, me: Peer, inbound: type[list[Any]]) -> BoundLink[Any]:
        link: BoundLink[Any] = BoundLink(self.context, endpoint, me, inbound)
        self._links.append(link)
        return link

    def bind_ingress(self, incarnation: int) -> BoundLink[Any]:
        me = Peer("ingress", 0, incarnation)
        return self.bind(self._settings.services_endpoint, me, list[SchedulerToIngress])

    def connect(self, me: Peer, inbound: type[list[Any]]) -> ConnectedLink[Any]:
        endpoint = self._settings.scheduler_endpoint
        link: ConnectedLink[Any] = ConnectedLink(self.context, endpoint, me, inbound)
        self._links.append(link)
        return link

    def close(self, link: BoundLink[Any] | ConnectedLink[Any]) -> None:
        self._links.remove(link)
        link.close()

    def from_ingress(self, *messages: Message) -> None:
        (scheduler,) = self.ingress.peers
        assert self.ingress.send(scheduler, messages)

    def wait(self, what: str, found: Callable[[], M | None]) -> M:
        """Polls all links until `found` has found something among `events`."""
        deadline = time.monotonic() + TIMEOUT_S
        while (result := found()) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no {what} among {self.events}")
            poller = zmq.Poller()
            for link in self._links:
                for socket in link.sockets:
                    poller.register(socket, zmq.POLLIN)
            poller.poll(100)
            for link in self._links:
                self.events.extend((link, event) for event in link.receive())
        return result

    def message(self, link: object, kind: type[M], matches: Callable[[M], bool] | None = None) -> M:
        """The next message of this kind from a link; it is taken out of `events`."""

        def found() -> M | None:
            for i, (source, event) in enumerate(self.events):
                if source is link and isinstance(event, Received):
                    message = event.message
                    if isinstance(message, kind) and (matches is None or matches(message)):
                        del self.events[i]
                        return message
            return None

        return self.wait(kind.__name__, found)

    def up(self, *links: object) -> None:
        """Waits until each is connected with the scheduler."""

        def found() -> bool | None:
            connected = {id(source) for source, event in self.events if isinstance(event, Up)}
            return True if connected >= {id(link) for link in links} else None

        self.wait("connection", found)


@pytest.fixture
def neighbours(tmp_path: Path) -> Iterator[Neighbours]:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    settings = Settings(
        model=str(tmp_path), runtime_dir=str(tmp_path), max_num_seqs=4, kvcache_block_size=4
    )
    neighbours = Neighbours(settings)
    command = [sys.executable, "-m", "nanovllm.services.scheduler", *settings_argv(settings)]
    process = subprocess.Popen(command)
    try:
        yield neighbours
        assert process.poll() is None, "it has ended by itself"
    finally:
        process.terminate()
        process.wait(TIMEOUT_S)
        neighbours.context.destroy(linger=0)


def submit(uid: int = UID, max_tokens: int = 3) -> Submit:
    sampling = Sampling(max_tokens=max_tokens, stop_token_ids=[99], seed=1)
    return Submit(uid, 0, pack([1, 2, 3, 4, 5]), b"", 0, sampling, "")


def answer(plan: StepPlan, *tokens: int) -> StepResult:
    return StepResult(plan.number, pack(tokens), [], 0, 0)


def scheduler_report(n: Neighbours, matches: Callable[[SchedulerStats], bool]) -> SchedulerStats:
    def of_scheduler(report: Report) -> bool:
        return isinstance(report.stats, SchedulerStats) and matches(report.stats)

    stats = n.message(n.supervisor, Report, of_scheduler).stats
    assert isinstance(stats, SchedulerStats)
    return stats


def test_a_request_from_submit_to_end(neighbours: Neighbours) -> None:
    n = neighbours
    n.message(n.supervisor, Ready)
    n.up(n.ingress, n.detokenizer, n.worker)
    assert n.message(n.ingress, EngineState) == EngineState(False, 4, 0, 4)
    assert n.worker.send([GroupReady(num_blocks=32, block_size=4)])
    assert n.message(n.worker, Reset).number == 0
    assert n.message(n.ingress, EngineState) == EngineState(True, 4, 32, 4)

    n.from_ingress(Held(b"", b""), submit())
    plan = n.message(n.worker, StepPlan)
    assert unpack(plan.admit[0].tokens).tolist() == [1, 2, 3, 4, 5]
    assert unpack(plan.prefill).tolist() == [0, 0, 5]
    second = n.message(n.worker, StepPlan)
    assert unpack(second.decode).tolist() == [0], "sent before the first has a result"
    assert n.worker.send([answer(plan, 10)])
    begin = n.message(n.detokenizer, Begin)
    assert (begin.uid, unpack(begin.output).tolist(), begin.prompt_tokens) == (UID, [10], 5)

    third = n.message(n.worker, StepPlan)
    assert n.worker.send([answer(second, 11), answer(second, 12)])
    new = n.message(n.detokenizer, NewTokens)
    assert unpack_int64(new.uids) == [UID]
    assert (unpack(new.offsets).tolist(), unpack(new.token_ids).tolist()) == ([1], [11])
    assert n.worker.send([answer(third, 12)])
    assert unpack(n.message(n.detokenizer, NewTokens).token_ids).tolist() == [12]
    assert n.message(n.detokenizer, Finished) == Finished(UID, 0, "length", 3)
    release = n.message(n.worker, StepPlan)
    assert unpack(release.release).tolist() == [0]
    assert n.worker.send([answer(release)])

    assert scheduler_report(n, lambda stats: stats.steps == 4).records == 1
    n.from_ingress(End(UID, 0))
    assert n.message(n.detokenizer, End) == End(UID, 0)
    stats = scheduler_report(n, lambda stats: stats.steps == 4 and stats.records == 0)
    assert (stats.running, stats.blocks_used, stats.generated) == (0, 0, 3)


def test_a_new_worker_group_computes_again(neighbours: Neighbours) -> None:
    n = neighbours
    n.up(n.ingress, n.detokenizer, n.worker)
    assert not n.message(n.ingress, EngineState).ready
    assert n.worker.send([GroupReady(32, 4)])
    n.message(n.worker, Reset)
    assert n.message(n.ingress, EngineState).ready
    n.from_ingress(Held(b"", b""), submit(max_tokens=20))
    plan = n.message(n.worker, StepPlan)
    assert n.worker.send([answer(plan, 10)])
    n.message(n.detokenizer, Begin)

    n.close(n.worker)
    assert not n.message(n.ingress, EngineState).ready
    n.worker = n.connect(Peer("gpu_worker", 0, 6), list[SchedulerToWorker])
    n.up(n.worker)
    assert n.worker.send([GroupReady(16, 4)])
    reset = n.message(n.worker, Reset)
    again = n.message(n.worker, StepPlan)
    assert again.number == reset.number == 4
    assert unpack(again.admit[0].tokens).tolist() == [1, 2, 3, 4, 5, 10]
    assert n.message(n.ingress, EngineState).ready


def test_each_connection_of_the_ingress_says_what_is_to_be_here(neighbours: Neighbours) -> None:
    n = neighbours
    n.up(n.ingress)
    n.from_ingress(Held(b"", b""), submit(UID), submit(UID + 1))
    scheduler_report(n, lambda stats: stats.records == 2)
    for incarnation, held in ((77, {UID: 0, UID + 9: 3}), (78, {UID + 9: 4})):
        n.close(n.ingress)
        n.events.clear()
        n.ingress = n.bind_ingress(incarnation)
        n.up(n.ingress)
        n.from_ingress(Held(pack_int64(held), pack(held.values())))
        assert n.message(n.ingress, Missing) == Missing(
            pack_int64([UID + 9]), pack([held[UID + 9]])
        )
        assert n.message(n.ingress, EngineState) == EngineState(False, 4, 0, 4)
    scheduler_report(n, lambda stats: stats.records == 0)
