"""Scaling, restarts and the end of a pipeline, while streams run."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from benchmarks.support.pipeline import END_TIMEOUT_S, READY_TIMEOUT_S, Pipeline
from nanovllm import Client, RequestError, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT
from nanovllm.client.cli import main
from nanovllm.control import Done, FromSupervisor, Restart, Status, StatusRequest
from nanovllm.launch.groups import MAX_FAILED_STARTS
from nanovllm.names import ServiceId
from nanovllm.settings import Settings
from tests.peer import Neighbourhood
from tests.recovery.streams import Streams, check, mixed_cases, services, undisturbed
from tests.terminal import ENTER, terminal

SIM = ("--device", "sim", "--sim-step-ms", "4", "--kvcache-block-size", "16")
LONG = SamplingParams(max_tokens=300, ignore_eos=True, seed=1)
ENDLESS = SamplingParams(max_tokens=4000, ignore_eos=True)


@pytest.fixture(scope="module")
def sim() -> Iterator[Pipeline]:
    with Pipeline("", *SIM) as running:
        yield running


def command(pipeline: Pipeline, *words: str) -> Result:
    return CliRunner().invoke(main, [*words, "--runtime-dir", str(pipeline.runtime_dir)])


def test_scaling_and_restarts_while_streams_run(sim: Pipeline) -> None:
    cases = mixed_cases(["lantern", "kettle"])
    expected = undisturbed(sim.endpoint, cases)
    streams = Streams(sim.endpoint, cases)
    streams.wait_for_news()
    for role, count in [("tokenizer", 3), ("detokenizer", 3), ("detokenizer", 1), ("tokenizer", 1)]:
        ran = command(sim, "scale", role, str(count))
        assert ran.exit_code == 0, ran.output
        assert sum(found.role == role for found in services(sim)) == count
        streams.wait_for_news()
    before = services(sim)
    for role in ("scheduler", "all"):
        ran = command(sim, "restart", role)
        assert ran.exit_code == 0, ran.output
        streams.wait_for_news()
    check(streams.finish(), expected, sim)
    after = services(sim)
    assert after.keys() == before.keys()
    assert all(after[service].pid != before[service].pid for service in before)
    restarts = {service.role: service.restarts for service in sim.status().services}
    assert restarts == {s.role: 1 + (s.role == "scheduler") for s in before}
    assert "RESTARTS" in command(sim, "status").output


def test_a_chat_goes_on_while_services_are_killed(sim: Pipeline, tmp_path: Path) -> None:
    chat = [sys.executable, "-m", "nanovllm", "chat", "--runtime-dir", str(sim.runtime_dir)]
    roles = sorted(service.role for service in services(sim))
    with terminal([*chat, "--max-tokens", "300"], XDG_STATE_HOME=str(tmp_path)) as shown:
        shown.wait_for("\n>")
        for role in roles:
            shown.press("Tell me more." + ENTER)
            shown.wait_for("\n")
            shown.wait_for(" ")
            services(sim)[ServiceId(role)].kill()
            sim.wait_for(f"{ServiceId(role)} was killed by SIGKILL", END_TIMEOUT_S)
            shown.wait_for("[300 tokens, ")
            shown.wait_for("\n>")
            sim.status()  # once all are there again
            services(sim)[ServiceId(role)].kill()
            sim.wait_for(f"{ServiceId(role)} was killed by SIGKILL", END_TIMEOUT_S)
        shown.press("/exit" + ENTER)
        assert shown.wait() == 0


def control_endpoint(pipeline: Pipeline) -> str:
    return Settings(runtime_dir=str(pipeline.runtime_dir)).control_endpoint


def test_a_command_is_done_once_however_often_it_is_asked_for(sim: Pipeline) -> None:
    """Its connection ends while it is being done, and with its answer."""

    def restarts() -> int:
        return sum(s.restarts for s in sim.status().services if s.role == "tokenizer")

    before = restarts()
    with Neighbourhood() as here:
        asker = here.connects("command", control_endpoint(sim), list[FromSupervisor])
        for number in (1, 2):
            restart = Restart("tokenizer", number)
            asker.send(restart, StatusRequest())
            asker.expect(Status)  # it is being done
            for _ in range(2):
                asker.come_back(reborn=False)
                asker.send(restart)
                assert asker.expect(Done) == Done(None, number)
            assert restarts() == before + number


def test_commands_explain_mistakes(sim: Pipeline, tmp_path: Path) -> None:
    assert "is not one of" in command(sim, "scale", "scheduler", "2").output
    assert "to 1 to 64" in command(sim, "scale", "tokenizer", "0").output
    assert "x<=64" in command(sim, "scale", "tokenizer", "65").output
    assert "is not one of" in command(sim, "restart", "everything").output
    nowhere = CliRunner().invoke(main, ["restart", "all", "--runtime-dir", str(tmp_path)])
    assert nowhere.exit_code == 1
    assert "no pipeline runs" in nowhere.output


def test_a_launcher_that_is_stopped_does_not_answer(sim: Pipeline) -> None:
    sim.process.send_signal(signal.SIGSTOP)
    try:
        for words in (("status",), ("health",), ("restart", "all")):
            ran = command(sim, *words)
            assert ran.exit_code == 1
            assert "does not answer: it is stopped, or the machine is very busy" in ran.output
    finally:
        sim.process.send_signal(signal.SIGCONT)
    assert command(sim, "health").exit_code == 0


@pytest.fixture
def own() -> Iterator[Pipeline]:
    with Pipeline("", *SIM, lifeline=False) as running:
        yield running


def signalled(pipeline: Pipeline) -> None:
    pipeline.process.send_signal(signal.SIGTERM)


def test_a_command_hears_of_the_end_of_the_pipeline(own: Pipeline) -> None:
    with Neighbourhood() as here:
        asker = here.connects("command", control_endpoint(own), list[FromSupervisor])
        asker.send(Restart("all", 1), StatusRequest())
        asker.expect(Status)  # it is being done
        signalled(own)
        own.wait_for("stopping", END_TIMEOUT_S)
        signalled(own)
        assert asker.expect(Done) == Done("the pipeline ended before it was done", 1)
        assert own.process.wait(END_TIMEOUT_S) == 0


def test_the_first_signal_drains(own: Pipeline) -> None:
    with Client(own.endpoint) as client, Client(own.endpoint) as late:
        whole = client.generate("Once", LONG)
        assert whole.usage.completion_tokens == 300
        stream = client.generate("Once", LONG, stream=True)
        next(stream)
        signalled(own)
        while late.ping().ready:
            pass
        with pytest.raises(RequestError, match="shutting down") as refused:
            late.generate("Once", LONG)
        assert refused.value.code == "shutting_down"
        assert stream.result().token_ids == whole.token_ids
        assert own.process.wait(END_TIMEOUT_S) == 0


def test_a_drain_ends_at_its_timeout(start_pipeline: Callable[..., Pipeline]) -> None:
    pipeline = start_pipeline("", *SIM, "--drain-timeout", "0.5")
    with Client(pipeline.endpoint) as client:
        next(client.generate("Once", ENDLESS, stream=True))
        stream = client.generate("Once", ENDLESS, stream=True)
        next(stream)
        signalled(pipeline)
        assert pipeline.process.wait(END_TIMEOUT_S) == 0
    pipeline.wait_for("unfinished", 5)


def test_a_second_signal_ends_at_once(own: Pipeline) -> None:
    with Client(own.endpoint) as client:
        stream = client.generate("Once", ENDLESS, stream=True)
        next(stream)
        signalled(own)
        own.wait_for("draining: 1 request unfinished, 30 s at most", END_TIMEOUT_S)
        signalled(own)
        assert own.process.wait(END_TIMEOUT_S) == 0


def test_an_ingress_that_dies_while_it_drains_loses_nothing(own: Pipeline) -> None:
    with Client(own.endpoint) as client:
        whole = client.generate("Once", LONG)
        stream = client.generate("Once", LONG, stream=True)
        next(stream)
        signalled(own)
        while client.ping().ready:
            pass
        services(own)[ServiceId("ingress")].kill()
        assert stream.result().token_ids == whole.token_ids
        assert own.process.wait(END_TIMEOUT_S) == 0


def test_why_a_service_cannot_start_again_is_said_each_time(
    start_pipeline: Callable[..., Pipeline], tmp_path: Path
) -> None:
    model = shutil.copytree(DEMO_CHECKPOINT, tmp_path / "model")
    pipeline = start_pipeline(model, *SIM)
    (model / "tokenizer.json").unlink()
    services(pipeline)[ServiceId("tokenizer")].kill()
    reason = f"tokenizer 0 cannot start: {model} has no tokenizer.json"
    for _ in range(MAX_FAILED_STARTS - 1):
        pipeline.wait_for(f"supervisor | {reason}", END_TIMEOUT_S)
    pipeline.wait_for(f"nanovllm-launch: {reason}", END_TIMEOUT_S)


def test_a_service_that_cannot_start_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Python that is to run the detokenizer ends as it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'nanovllm.services.detokenizer' in ' '.join(sys.orig_argv):\n"
        "    sys.exit('the shelf is empty')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    pipeline = Pipeline("", *SIM)
    process = pipeline.launch()
    assert process.wait(READY_TIMEOUT_S) == 1
    line = pipeline.wait_for("nanovllm-launch: ", END_TIMEOUT_S)
    assert "detokenizer 0 ended with code 1 before it was ready, 5 times in a row" in line
    assert "the shelf is empty" in line
    assert not pipeline.runtime_dir.exists()


def test_in_json_a_line_is_an_event_and_a_traceback_is_in_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'nanovllm.services.detokenizer' in sys.orig_argv:\n"
        "    print('no event')\n"
        "    from nanovllm.service import Service\n"
        "    Service.run = lambda self, *_: int('the shelf is empty')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    pipeline = Pipeline("", *SIM, "--log-format", "json")
    assert pipeline.launch().wait(READY_TIMEOUT_S) == 1
    with pytest.raises(RuntimeError, match="the launcher ended"):
        pipeline.wait_for("no such line", END_TIMEOUT_S)
    events = [json.loads(line) for line in pipeline.output]
    said = {(event["service"], event["level"], event["message"]) for event in events}
    assert ("detokenizer 0", None, "no event") in said
    assert ("supervisor", "warning", "detokenizer 0 ended with code 1") in said
    (first, *_) = [event for event in events if "traceback" in event]
    assert (first["service"], first["level"]) == ("detokenizer 0", "critical")
    *_, last = first["traceback"].splitlines()
    assert "the shelf is empty" in last
    assert events[-1]["level"] == "critical"
    assert last in events[-1]["message"]
    times = [datetime.datetime.fromisoformat(event["time"]) for event in events]
    assert all(time.tzinfo is not None for time in times)
