"""Services that join a running pipeline, under a supervisor of their own; here on one machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.request import Request, urlopen

import pytest
import zmq
from click.testing import CliRunner, Result

from benchmarks.support.pipeline import END_TIMEOUT_S, LOOK_AGAIN_S, Pipeline
from nanovllm import Client, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT
from nanovllm.client.cli import main
from nanovllm.client.control import Control
from nanovllm.control import Join, Joined, NotJoined, ServiceStatus, ToMachine
from nanovllm.keys import PipelineKeys, make_keys
from nanovllm.launch.machines import Machines
from nanovllm.names import ServiceId
from nanovllm.transport.links import ConnectedLink, Peer, Received, Up
from tests.machines.ports import free_services
from tests.pipeline.leftovers import wait_until_nothing_is_left
from tests.pipeline.wire import Wire
from tests.recovery.streams import (
    TIMEOUT_S,
    Outcome,
    Streams,
    kill,
    living,
    mixed_cases,
    undisturbed,
    wait_until_ready,
)
from tests.recovery.test_poison import FAULT, GUILTY

SIM = ("--device", "sim", "--sim-step-ms", "4", "--kvcache-block-size", "16")
CASES = mixed_cases(["ree", "old "])
SCHEDULER, WORKER = ServiceId("scheduler", 0, 100), ServiceId("gpu_worker", 0, 100)
TOKENIZER, DETOKENIZER = ServiceId("tokenizer", 100), ServiceId("detokenizer", 100)
DOOR = ServiceId("http", 100)
TOKENIZER_2 = ServiceId("tokenizer", 200)
HERE = [ServiceId("scheduler"), ServiceId("gpu_worker"), ServiceId("detokenizer")]


class Two(NamedTuple):
    """A pipeline, and a machine's services that have joined it."""

    main: Pipeline
    joined: Pipeline

    @property
    def joins(self) -> tuple[str, ...]:
        """What another machine says to join."""
        start = self.joined.arguments.index("--join")
        return tuple(self.joined.arguments[start : start + 4])

    def status(self) -> dict[ServiceId, ServiceStatus]:
        with Control(str(self.main.runtime_dir)) as control:
            return {status.service: status for status in control.status().services}

    def wait_for(self, *there: ServiceId) -> None:
        """Returns when the pipeline knows exactly these services of the other machine, ready."""
        deadline = time.monotonic() + TIMEOUT_S
        while True:
            status = self.status().items()
            ready = {s for s, one in status if one.machine and one.state == "ready"}
            if ready == set(there):
                return
            assert time.monotonic() < deadline, (ready, self.main.transcript)
            time.sleep(LOOK_AGAIN_S)

    def command(self, *words: str) -> Result:
        return CliRunner().invoke(main, [*words, "--runtime-dir", str(self.main.runtime_dir)])


ALL = (SCHEDULER, WORKER, TOKENIZER, DETOKENIZER, DOOR)
BRINGS = (
    *("--engines", "1", "--tokenizers", "1", "--detokenizers", "1"),
    *("--http-servers", "1", "--http", "127.0.0.1:0"),
)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    services, keys = free_services(), tmp_path_factory.mktemp("keys")
    make_keys(keys, None)
    binds = ("--services", services, "--ingress", free_services())
    with (
        Pipeline("", *SIM, *binds, "--keys", str(keys)) as pipeline,
        Pipeline("", "--join", services, "--keys", str(keys), *BRINGS) as joined,
    ):
        both = Two(pipeline, joined)
        both.wait_for(*ALL)
        yield both


@pytest.fixture(scope="module")
def expected(two: Two) -> list[Outcome]:
    return undisturbed(two.main.endpoint, CASES)


def check(two: Two, streams: Streams, expected: list[Outcome]) -> None:
    for number, outcome, _ in streams.finish():
        assert outcome == expected[number], f"case {number}\n{two.main.transcript}"
    wait_until_nothing_is_left(two.main)


def test_status_says_which_service_is_where(two: Two) -> None:
    machines = {status.machine for status in two.status().values()}
    assert len(machines) == 2
    for pipeline in two:
        words = ["status", "--runtime-dir", str(pipeline.runtime_dir)]
        shown = CliRunner().invoke(main, words).output
        assert "MACHINE" in shown
        assert "scheduler 0" in shown
        assert "scheduler 100" in shown


@pytest.mark.parametrize(
    "victims",
    [[SCHEDULER], [WORKER], [DETOKENIZER], [TOKENIZER], [SCHEDULER, DETOKENIZER]],
    ids=lambda victims: " and ".join(map(str, victims)),
)
def test_streams_survive_the_deaths_of_services_that_have_joined(
    two: Two, expected: list[Outcome], victims: list[ServiceId]
) -> None:
    streams = Streams(two.main.endpoint, CASES)
    streams.wait_for_news()
    kill(two.joined, *victims)
    streams.wait_for_news()
    streams.wait_for_news()
    check(two, streams, expected)
    two.wait_for(*ALL)


def test_what_has_joined_serves_while_the_others_are_gone(
    two: Two, expected: list[Outcome]
) -> None:
    """Nothing but the ingress is left of the main machine."""
    streams = Streams(two.main.endpoint, CASES)
    streams.wait_for_news()
    stopped = living(two.main, [*HERE, ServiceId("tokenizer")])
    for process in stopped:
        process.kill()
    streams.wait_for_news()
    check(two, streams, expected)
    wait_until_ready(two.main, HERE)


def test_a_door_that_has_joined_serves_and_knows_all_machines(two: Two) -> None:
    (line,) = [line for line in two.joined.output if "joined the pipeline" in line]
    url = next(word for word in line.split() if word.startswith("http"))
    ask = {"model": "demo", "prompt": "Once", "max_tokens": 5}
    headers = {"Content-Type": "application/json"}
    question = Request(f"{url}/v1/completions", json.dumps(ask).encode(), headers)
    with urlopen(question, timeout=TIMEOUT_S) as answer:
        assert json.load(answer)["usage"]["completion_tokens"]
    with urlopen(f"{url}/metrics", timeout=TIMEOUT_S) as answer:
        metrics = answer.read().decode()
    assert 'nanovllm_service_restarts_total{engine="0",index="0",role="scheduler"}' in metrics
    assert 'engine="100"' in metrics


def test_commands_reach_all_machines(two: Two, expected: list[Outcome]) -> None:
    streams = Streams(two.main.endpoint, CASES)
    streams.wait_for_news()
    before = two.status()
    for words in (["restart", "gpu_worker"], ["restart", "engine"]):
        ran = two.command(*words)
        assert ran.exit_code == 0, ran.output
    two.wait_for(*ALL)
    after = two.status()
    for service in (SCHEDULER, WORKER, ServiceId("scheduler"), ServiceId("gpu_worker")):
        assert after[service].pid != before[service].pid
    assert after[TOKENIZER].pid == before[TOKENIZER].pid
    name = after[SCHEDULER].machine
    ran = two.command("scale", "engine", "2", "--machine", name)
    assert ran.exit_code == 0, ran.output
    more = ServiceId("scheduler", 0, 101), ServiceId("gpu_worker", 0, 101)
    assert all(two.status()[service].state == "ready" for service in more)
    streams.wait_for_news()
    ran = two.command("scale", "engine", "1", "--machine", name)
    assert ran.exit_code == 0, ran.output
    two.wait_for(*ALL)
    ran = two.command("scale", "engine", "2", "--machine", "nowhere")
    assert ran.exit_code == 1
    assert name in ran.output
    there = ("--runtime-dir", str(two.joined.runtime_dir))
    ran = CliRunner().invoke(main, ["scale", "engine", "2", "--machine", "nowhere", *there])
    assert ran.exit_code == 1
    assert "--machine nowhere" in ran.output
    two.wait_for(*ALL)
    check(two, streams, expected)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_machine_leaves_and_streams_go_on(
    two: Two, expected: list[Outcome], number: signal.Signals
) -> None:
    brings = ("--engines", "2", "--detokenizers", "1")
    leaving = Pipeline("", *two.joins, *brings, lifeline=False)
    streams = Streams(two.main.endpoint, CASES)
    streams.wait_for_news()
    leaving.start()
    second = [ServiceId("scheduler", 0, 200), ServiceId("gpu_worker", 0, 200)]
    second += [ServiceId("scheduler", 0, 201), ServiceId("gpu_worker", 0, 201)]
    two.wait_for(*ALL, *second, ServiceId("detokenizer", 200))
    for _ in range(2):
        streams.wait_for_news()
    leaving.process.send_signal(number)
    assert leaving.process.wait(END_TIMEOUT_S) == 0
    two.wait_for(*ALL)
    streams.wait_for_news()
    check(two, streams, expected)
    leaving.stop()


def test_a_machine_whose_supervisor_died_is_the_same_again(two: Two) -> None:
    second = [TOKENIZER_2]
    for _ in range(2):
        dying = Pipeline("", *two.joins, "--tokenizers", "1").start()
        two.wait_for(*ALL, *second)
        name = two.status()[TOKENIZER_2].machine
        dying.process.kill()
        dying.stop()
        two.main.wait_for(f"{name} cannot be reached", TIMEOUT_S)
        gone = two.status()[TOKENIZER_2]
        assert (gone.state, gone.stats) == ("unreachable", None)
        ran = two.command("scale", "tokenizer", "2", "--machine", name)
        assert ran.exit_code == 1
        assert f"{name} cannot be reached" in ran.output
    leaving = Pipeline("", *two.joins, "--tokenizers", "1").start()
    two.wait_for(*ALL, *second)
    assert leaving.stop() == 0
    two.wait_for(*ALL)


def refusal(two: Two, *arguments: str) -> str:
    refused = Pipeline(*arguments[:1], *two.joins, *arguments[1:])
    with pytest.raises(RuntimeError) as raised:
        refused.start()
    assert refused.stop() in (1, 2)
    return str(raised.value)


def test_what_does_not_fit_is_refused(two: Two, tmp_path: Path) -> None:
    shutil.copytree(DEMO_CHECKPOINT, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + " ")
    assert "name what joins" in refusal(two, "")
    assert "--max-model-len" in refusal(two, "", "--engines", "1", "--max-model-len", "100")
    assert "--device cpu" in refusal(two, "", "--engines", "1", "--device", "cpu")
    assert "not the pipeline's model" in refusal(two, str(tmp_path), "--engines", "1")
    two.wait_for(*ALL)


def test_a_machine_with_wrong_keys_is_told_so(tmp_path: Path) -> None:
    """What listens refuses it, or only ends its connections."""
    ours, others = tmp_path / "ours", tmp_path / "others"
    make_keys(ours, None)
    make_keys(others, None)
    with_keys, without = free_services(), free_services()
    listening = [
        Machines(endpoint, Joined(0, b"", ""), keys)
        for endpoint, keys in ((with_keys, PipelineKeys(str(ours))), (without, None))
    ]
    wrong = ("--keys", str(others)), str(others / "services.key")
    joining = []
    for endpoint, (given, named) in (
        (with_keys, wrong),
        (with_keys, ((), "--keys")),
        (without, wrong),
    ):
        pipeline = Pipeline("", "--join", endpoint, "--engines", "1", *given)
        pipeline.launch()
        joining.append((pipeline, f"--join {endpoint}: what listens there ", named))
    for pipeline, what, named in joining:
        assert named in pipeline.wait_for(what, TIMEOUT_S)
        assert pipeline.process.wait(TIMEOUT_S) == 1
        pipeline.stop()
    for machines in listening:
        machines.close()


def test_a_command_line_that_fits_no_pipeline_is_refused_without_one() -> None:
    """No pipeline is waited for."""
    for host, options, why in (
        ("127.0.0.1", [], "name what joins"),
        ("127.0.0.1", ["--engines", "1", "--max-model-len", "9"], "--max-model-len"),
        ("no-such-host.invalid", ["--engines", "1"], "no-such-host.invalid"),
    ):
        refused = Pipeline("", "--join", f"tcp://{host}:1", "--insecure", *options)
        with pytest.raises(RuntimeError, match=why):
            refused.start()
        assert refused.stop() == 1


def test_another_version_is_told_so_and_nothing_else_happens(two: Two) -> None:
    _, endpoint, _, keys = two.joins
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    me, curve = Peer("machine", 7, 7), PipelineKeys(keys).services
    link = ConnectedLink(context, endpoint, me, list[ToMachine], curve)
    poller = zmq.Poller()
    for socket in link.sockets:
        poller.register(socket, zmq.POLLIN)
    answer: ToMachine | None = None
    while answer is None:
        assert poller.poll(int(TIMEOUT_S * 1000))
        for event in link.receive():
            if isinstance(event, Up):
                link.send([Join("0.0.1", "old", 0)])
            elif isinstance(event, Received):
                answer = event.message
    link.close()
    context.term()
    assert isinstance(answer, NotJoined)
    assert "0.0.1" in answer.why
    two.wait_for(*ALL)


def test_a_request_that_brings_down_what_has_joined_is_set_aside(
    start_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(FAULT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv("NANOVLLM_TEST_FAULT", f"gpu_worker:{GUILTY}")
    services = free_services()
    pipeline = start_pipeline("", *SIM, "--services", services, "--engines", "0")
    start_pipeline("", "--join", services, "--engines", "1")
    with Wire(pipeline.endpoint) as wire:
        guilty = wire.ask(prompt_token_ids=[5, GUILTY, 6])
        wire.results(guilty)
    assert guilty.error.code == "poisoned", guilty.error
    wait_until_nothing_is_left(pipeline)


def test_the_pipeline_dies_and_comes_back(tmp_path: Path) -> None:
    """What has joined keeps running, and joins again as what it was; it ends with the pipeline."""
    services = free_services()
    arguments = ("", *SIM, "--services", services, "--engines", "0")
    params = SamplingParams(max_tokens=20, ignore_eos=True, seed=1)
    first = Pipeline(*arguments).start()
    joined = Pipeline("", "--join", services, "--engines", "1").start()
    before = living(joined, [SCHEDULER, WORKER])
    with Client(first.endpoint) as client:
        tokens = client.generate("Once", params).token_ids
    first.process.kill()
    first.stop()
    second = Pipeline(*arguments).start()
    Two(second, joined).wait_for(SCHEDULER, WORKER)
    with Client(second.endpoint) as client:
        assert client.generate("Once", params).token_ids == tokens
    assert living(joined, [SCHEDULER, WORKER]) == before
    second.process.kill()
    second.stop()
    other = Pipeline(*arguments, "--max-model-len", "1000").start()
    joined.wait_for("services start anew", TIMEOUT_S)
    Two(other, joined).wait_for(SCHEDULER, WORKER)
    with Client(other.endpoint) as client:
        assert client.generate("Once", params).token_ids == tokens
    assert other.stop() == 0
    assert joined.process.wait(END_TIMEOUT_S) == 0
    joined.stop()


def test_a_machine_that_joins_a_drain_drains_too() -> None:
    """The pipeline ends with its last request, not with its --drain-timeout."""
    services = free_services()
    options = ("--ingress", free_services(), "--sim-step-ms", "50", "--drain-timeout", "3600")
    brings = ("--engines", "1", "--http-servers", "1", "--http", "127.0.0.1:0")
    with (
        Pipeline("", *SIM, *options, "--services", services, lifeline=False) as pipeline,
        Client(pipeline.endpoint) as client,
    ):
        params = SamplingParams(max_tokens=10_000, ignore_eos=True, seed=1)
        stream = client.generate("Once", params, stream=True)
        next(iter(stream))
        pipeline.process.send_signal(signal.SIGINT)
        pipeline.wait_for("draining", TIMEOUT_S)
        with Pipeline("", "--join", services, *brings) as joined:
            stream.close()
            assert pipeline.process.wait(END_TIMEOUT_S) == 0
            assert joined.process.wait(END_TIMEOUT_S) == 0
