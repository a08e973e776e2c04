"""HTTP servers as the launcher runs them: keys, limits, restarts, drains, deaths behind them."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from benchmarks.support.pipeline import END_TIMEOUT_S, LOOK_AGAIN_S, Pipeline
from nanovllm.client.cli import main
from nanovllm.control import HttpStats
from nanovllm.names import ServiceId
from tests.http.server import TIMEOUT_S, Server
from tests.recovery.streams import kill, services, wait_for_another, wait_until_ready
from tests.recovery.test_poison import FAULT

SIM = ("--device", "sim", "--sim-step-ms", "4", "--kvcache-block-size", "16")
HTTP = ("--http", "127.0.0.1:0")
DOOR = ServiceId("http", 0)
FILE_KEY, VARIABLE_KEY = "key-of-the-file", "key-of-the-variable"
LONG: dict[str, Any] = {"prompt": "Once", "max_tokens": 300, "ignore_eos": True, "seed": 1}
ENDLESS = {**LONG, "max_tokens": 4000}


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """A pipeline whose HTTP servers need a key."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"# for the tests\n\n{FILE_KEY}\n")
    arguments = (*SIM, *HTTP, "--api-key-file", str(file), "--cors", "https://page.example")
    pipeline = Pipeline("", *arguments, "--max-message-bytes", "65536")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOVLLM_API_KEY", f"{VARIABLE_KEY},another")
        pipeline.start()
    yield pipeline
    pipeline.stop()


@pytest.fixture(scope="module")
def door(locked: Pipeline) -> Server:
    return Server(locked.http_port, {"authorization": f"Bearer {VARIABLE_KEY}"})


def command(pipeline: Pipeline, *words: str) -> Result:
    return CliRunner().invoke(main, [*words, "--runtime-dir", str(pipeline.runtime_dir)])


def test_everything_but_health_needs_a_key(door: Server) -> None:
    anyone = Server(door.port)
    assert anyone.get("/health").status == 200
    assert anyone.get("/ready").status == 200
    for path in ("/metrics", "/v1/models", "/openapi.json", "/nowhere"):
        refused = anyone.get(path)
        assert refused.status == 401
        assert refused.json["error"]["code"] == "invalid_api_key"
    for header in ("Bearer wrong", f"Basic {FILE_KEY}", "Bearer", "Bearer \xe9"):
        asked = anyone.ask("POST", "/v1/completions", {}, {"authorization": header})
        assert asked.status == 401
    for key in (FILE_KEY, VARIABLE_KEY, "another"):
        named = {"authorization": f"Bearer {key}"}
        assert anyone.ask("GET", "/v1/models", headers=named).status == 200
        assert anyone.ask("GET", "/v1/models", headers={"x-api-key": key}).status == 200
    for headers in ({}, {"x-api-key": "wrong"}):
        refused = anyone.ask("POST", "/v1/messages", {}, headers)
        assert (refused.status, refused.json["type"]) == (401, "error")
        assert refused.json["error"]["type"] == "authentication_error"


def test_keys_are_with_http_servers_alone(locked: Pipeline, door: Server) -> None:
    assert door.complete(prompt="Once", max_tokens=2).status == 200
    for process in [locked.process, *psutil.Process(locked.process.pid).children()]:
        command_line = " ".join(psutil.Process(process.pid).cmdline())
        assert VARIABLE_KEY not in command_line
        assert FILE_KEY not in command_line
    for service, process in services(locked).items():
        assert (VARIABLE_KEY in str(process.environ())) == (service.role == "http")
        assert (FILE_KEY in str(process.environ())) == (service.role == "http")
    for key in (FILE_KEY, VARIABLE_KEY):
        assert key not in locked.transcript


def test_the_launch_says_a_curl_line_with_a_key(locked: Pipeline, door: Server) -> None:
    line = next(line for line in locked.output if "curl" in line)
    assert f"{door.url}/v1/chat/completions" in line
    assert '-H "Authorization: Bearer ${NANOVLLM_API_KEY%%,*}"' in line  # the first of several


def test_the_launch_says_the_sampling_defaults(locked: Pipeline) -> None:
    assert "http 0 | ready: generation_config.json's temperature 0.7, unless" in locked.transcript


def test_a_request_has_one_name_in_response_and_log(locked: Pipeline, door: Server) -> None:
    given = door.ask("GET", "/v1/models?secret=1", headers={"x-request-id": "mine-1"})
    assert given.headers["x-request-id"] == "mine-1"
    line = locked.wait_for("mine-1", TIMEOUT_S)
    assert "GET /v1/models: 200 in " in line
    assert "for key " in line
    assert "secret" not in line
    refused = {"x-request-id": "mine-2", "authorization": "Bearer wrong"}
    assert door.ask("GET", "/v1/models", headers=refused).status == 401
    assert locked.wait_for("mine-2", TIMEOUT_S).rstrip().endswith(", for 127.0.0.1")
    bad = door.ask("GET", "/v1/models", headers={"x-request-id": "a b"})
    drawn = bad.headers["x-request-id"]
    assert drawn != "a b"
    locked.wait_for(drawn, TIMEOUT_S)
    assert sum(drawn in line for line in locked.output) == 1


def test_a_large_body_is_refused(door: Server) -> None:
    whole = door.complete(prompt="x" * 70_000)
    assert whole.status == 413
    assert "65536 bytes" in whole.json["error"]["message"]
    with socket.create_connection(("127.0.0.1", door.port), TIMEOUT_S) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
            + f"authorization: Bearer {FILE_KEY}\r\n\r\n".encode()
        )
        for _ in range(5):
            connection.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_pages_of_named_origins_may_ask(door: Server) -> None:
    asks = {"access-control-request-method": "POST", "access-control-request-headers": "x"}
    for origin, allowed in (("https://page.example", True), ("https://other.example", False)):
        answer = Server(door.port).ask(
            "OPTIONS", "/v1/chat/completions", headers={"origin": origin, **asks}
        )
        assert (answer.headers["access-control-allow-origin"] == origin) == allowed
    refused = Server(door.port).ask("GET", "/v1/models", headers={"origin": "https://page.example"})
    assert refused.status == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_connections_wait_while_an_http_server_starts_again(locked: Pipeline, door: Server) -> None:
    (before,) = [process for name, process in services(locked).items() if name == DOOR]
    before.kill()
    before.wait(TIMEOUT_S)
    assert door.complete(prompt="Once", max_tokens=2).status == 200
    wait_for_another(locked, DOOR, before)


def test_http_servers_are_scaled_and_restarted(locked: Pipeline, door: Server) -> None:
    ran = command(locked, "scale", "http", "2")
    assert (ran.exit_code, ran.stdout) == (0, "2 HTTP servers running\n")
    before = services(locked)
    assert ServiceId("http", 1) in before
    with door.send("/v1/completions", {"model": "demo", **LONG, "stream": True}) as connection:
        stream = connection.makefile("rb")
        next(line for line in stream if line.startswith(b"data: "))
        ran = command(locked, "restart", "http")
        assert ran.exit_code == 0, ran.output
        assert stream.read().endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), "it was cut off"
    after = services(locked)
    assert all(after[name].pid != before[name].pid for name in (DOOR, ServiceId("http", 1)))
    assert command(locked, "scale", "http", "1").exit_code == 0
    assert door.complete(prompt="Once", max_tokens=2).status == 200
    assert "http 0" in command(locked, "status").output


def test_a_death_behind_the_door_is_a_pause(locked: Pipeline, door: Server) -> None:
    body = {**LONG, "max_tokens": 600}  # several reports come meanwhile
    expected = door.complete(**body).json["choices"]
    roles = ("ingress", "scheduler", "gpu_worker", "tokenizer", "detokenizer")
    with ThreadPoolExecutor(8) as pool:
        for role in roles:
            running = [pool.submit(lambda: door.complete(**body)) for _ in range(8)]
            locked.stats_once(HttpStats, lambda stats: stats.running > 0)
            kill(locked, ServiceId(role))
            for answer in running:
                assert answer.result().status == 200, role
                assert answer.result().json["choices"] == expected, role
            wait_until_ready(locked, [ServiceId(role)])


def test_without_http_there_is_nothing_to_scale(pipeline: Pipeline) -> None:
    for words in (("scale", "http", "2"), ("restart", "http")):
        ran = command(pipeline, *words)
        assert ran.exit_code == 1
        assert "launch it with --http" in ran.output


@pytest.fixture
def own() -> Iterator[Pipeline]:
    with Pipeline("", *SIM, *HTTP, lifeline=False) as running:
        yield running


def test_a_drain_lets_streams_end_and_takes_no_requests(own: Pipeline) -> None:
    door = Server(own.http_port)
    undisturbed = door.complete(**LONG)
    assert undisturbed.status == 200, undisturbed.body
    text = undisturbed.json["choices"][0]["text"]
    kept = http.client.HTTPConnection("127.0.0.1", door.port, timeout=TIMEOUT_S)
    kept.connect()
    with door.send("/v1/completions", {"model": "demo", **LONG, "stream": True}) as connection:
        stream = connection.makefile("rb")
        first = next(line for line in stream if line.startswith(b"data: "))
        own.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + TIMEOUT_S
        while door.get("/ready").status == 200:
            assert time.monotonic() < deadline, "it takes requests"
            time.sleep(LOOK_AGAIN_S)
        kept.request("POST", "/v1/completions", json.dumps({"model": "demo", **LONG}))
        refused = kept.getresponse()
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert json.loads(refused.read())["error"]["code"] == "shutting_down"
        kept.close()
        assert door.get("/health").status == 200
        lines = [first, *stream]
        assert b"data: [DONE]\n" in lines
    events = [line[6:] for line in lines if line.startswith(b"data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text
    assert own.process.wait(END_TIMEOUT_S) == 0


def test_a_drain_ends_http_streams_at_its_timeout(
    start_pipeline: Callable[..., Pipeline],
) -> None:
    pipeline = start_pipeline("", *SIM, *HTTP, "--drain-timeout", "0.5")
    door = Server(pipeline.http_port)
    with ThreadPoolExecutor(1) as pool:
        body = {"model": "demo", **ENDLESS, "stream": True}
        with door.send("/v1/completions", body) as connection:
            stream = connection.makefile("rb")
            next(line for line in stream if line.startswith(b"data: "))
            whole = pool.submit(lambda: door.complete(**ENDLESS))
            pipeline.stats_once(HttpStats, lambda stats: stats.running == 2)
            pipeline.process.send_signal(signal.SIGTERM)
            pipeline.wait_for("unfinished end here", TIMEOUT_S)
            *_, last, done = [line for line in stream if line.startswith(b"data: ")]
        assert json.loads(last[6:])["error"]["code"] == "shutting_down"
        assert done == b"data: [DONE]\n"
        answer = whole.result()
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.json["error"]["code"] == "shutting_down"
    assert pipeline.process.wait(END_TIMEOUT_S) == 0


def test_an_event_loop_that_stands_still_is_found(
    start_pipeline: Callable[..., Pipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(FAULT), prepend=":")
    monkeypatch.setenv("NANOVLLM_TEST_FAULT", "http:/hang")
    pipeline = start_pipeline("", *SIM, *HTTP)
    door = Server(pipeline.http_port)
    with door.send("/hang", {}):
        pipeline.wait_for("http 0 is killed: it has given no sign for 10 s", 2 * TIMEOUT_S)
    assert door.complete(prompt="Once", max_tokens=2).status == 200
