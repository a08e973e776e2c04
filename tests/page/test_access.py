"""Who may kill a service from the page: only the page itself, and where there are keys an admin."""

from __future__ import annotations

import asyncio
import http.client
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner
from starlette.applications import Starlette
from starlette.types import Message

from benchmarks.support.pipeline import END_TIMEOUT_S, LOOK_AGAIN_S, Pipeline
from nanovllm.client.cli import main
from nanovllm.control import ServiceStatus, Status
from nanovllm.names import ServiceId
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.page.access import TOKEN_HEADER, Access
from nanovllm.services.http.page.feed import Feed
from nanovllm.services.http.page.routes import page_routes
from tests.http.server import TIMEOUT_S, Answer, Server
from tests.machines.ports import free_services
from tests.recovery.streams import services, wait_for_another, wait_until_ready

SIM = ("--device", "sim", "--sim-step-ms", "4", "--http", "127.0.0.1:0")
SCHEDULER, TOKENIZER = ServiceId("scheduler"), ServiceId("tokenizer")
HERE = ("127.0.0.1", 8000)


def headers(host: str = "127.0.0.1:8000", scheme: str = "http", **others: str) -> dict[str, str]:
    return {
        "host": host,
        "origin": f"{scheme}://{host}",
        "content-type": "application/json",
        TOKEN_HEADER: "secret",
        **others,
    }


def access(bound: str = "127.0.0.1", *, locked: bool = False, admin: str = "") -> Access:
    return Access("secret", bound, locked, [admin] if admin else [])


@pytest.mark.parametrize(
    ("host", "server", "scheme", "bound"),
    [
        ("127.0.0.1:8000", HERE, "http", "127.0.0.1"),
        ("LocalHost:8000", HERE, "http", "localhost"),
        ("[::1]:8000", ("::1", 8000), "https", "::1"),
        ("localhost:8000", ("::ffff:127.0.0.1", 8000), "http", "::1"),
        ("localhost", ("127.0.0.1", 80), "http", "127.0.0.1"),
    ],
)
def test_the_servers_own_names(host: str, server: tuple[str, int], scheme: str, bound: str) -> None:
    assert access(bound).token_for(host, server, scheme) == "secret"
    access(bound).check(headers(host, scheme), server, scheme)


@pytest.mark.parametrize(
    "host", ["", "evil.example:8000", "127.0.0.1.evil.example:8000", "127.0.0.1:8001", "127.0.0.1"]
)
def test_a_name_that_was_bound_to_our_address_is_not_ours(host: str) -> None:
    assert access().token_for(host, HERE, "http") == ""
    with pytest.raises(ApiError, match="not this server's name") as caught:
        access().check(headers(host), HERE, "http")
    assert caught.value.status == 403


def test_beyond_loopback_and_beside_api_keys_an_admin_key_is_needed() -> None:
    there, host = ("10.1.2.3", 8000), "10.1.2.3:8000"
    for bound, locked in (("", False), ("10.1.2.3", False), ("127.0.0.1", True)):
        assert access(bound, locked=locked).token_for(host, there, "http") == ""
        with pytest.raises(ApiError, match="--admin-key-file"):
            access(bound, locked=locked).check(headers(host), there, "http")
        with_key = access(bound, locked=locked, admin="boss")
        assert with_key.token_for(host, there, "http") == "secret"
        with pytest.raises(ApiError, match="needs an admin key") as caught:
            with_key.check(headers(host, authorization="Bearer user"), there, "http")
        assert caught.value.status == 401
        with_key.check(headers(host, authorization="Bearer boss"), there, "http")
    access("llm.example", admin="b").check(
        headers("llm.example:8000", authorization="Bearer b"), there, "http"
    )


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    with Pipeline("", *SIM, "--cors", "*") as running:
        yield running


@pytest.fixture(scope="module")
def door(pipeline: Pipeline) -> Server:
    return Server(pipeline.http_port)


def token(door: Server) -> str:
    found = re.search(rb'name="page-token" content="([^"]*)"', door.get("/").body)
    assert found is not None
    return found[1].decode()


def kill(door: Server, service: ServiceId, **changed: str | None) -> Answer:
    sent: dict[str, str | None] = {
        "Host": f"127.0.0.1:{door.port}",
        "Origin": door.url,
        "Content-Type": "application/json",
        "X-Page-Token": token(door),
        **{name.replace("_", "-"): value for name, value in changed.items()},
    }
    body = {"role": service.role, "index": service.index, "engine": service.engine}
    given = {name: value for name, value in sent.items() if value is not None}
    return door.ask("POST", "/pipeline/kill", body, given)


FORGED: list[dict[str, str | None]] = [
    {"Origin": None},
    {"Origin": "null"},
    {"Origin": "https://evil.example"},
    {"Host": "evil.example", "Origin": "http://evil.example"},
    {"X_Page_Token": None},
    {"X_Page_Token": "guessed"},
    {"Content_Type": None},
    {"Content_Type": "text/plain"},
    {"Content_Type": "application/x-www-form-urlencoded"},
]


def test_a_forged_request_kills_nothing(pipeline: Pipeline, door: Server) -> None:
    before = services(pipeline)
    for changed in FORGED:
        assert kill(door, SCHEDULER, **changed).status == 403, changed
    rebound = door.ask("GET", "/", headers={"Host": f"evil.example:{door.port}"})
    assert token(door).encode() not in rebound.body
    assert door.ask("OPTIONS", "/pipeline/kill", headers={"Origin": door.url}).status == 405
    assert {process.pid for process in services(pipeline).values()} == {
        process.pid for process in before.values()
    }
    assert all(service.restarts == 0 for service in pipeline.status().services)


def test_the_page_kills_one_process(pipeline: Pipeline, door: Server) -> None:
    before = services(pipeline)
    assert kill(door, SCHEDULER).status == 202
    wait_for_another(pipeline, SCHEDULER, before[SCHEDULER])
    assert "scheduler 0 is killed: the page was asked to" in pipeline.transcript
    assert "scheduler 0 was killed by SIGKILL" in pipeline.transcript
    wait_until_ready(pipeline, [SCHEDULER])
    others = {name: process.pid for name, process in services(pipeline).items()}
    assert {n for n, process in before.items() if others[n] != process.pid} == {SCHEDULER}
    unknown = kill(door, ServiceId("scheduler", engine=7))
    assert (unknown.status, unknown.json["error"]["message"]) == (404, "there is no scheduler 7")
    assert door.complete(prompt="Once", max_tokens=2).status == 200


def test_a_server_answers_before_its_own_kill() -> None:
    """A browser that gets no answer asks again, and would kill the next server, too."""
    http = ServiceId("http")
    done: list[str] = []

    async def ask() -> Status:
        process = ServiceStatus("http", 0, 0, 1, "ready", None, 0, 0, 0, 0, None)
        return Status("demo", "", "", [process])

    def killed(service: ServiceId) -> bool:
        done.append(f"kill {service}")
        return True

    async def receive() -> Message:
        return {"type": "http.request", "body": b'{"role": "http", "index": 0, "engine": 0}'}

    async def send(message: Message) -> None:
        done.append(str(message.get("status", message["type"])))

    app = Starlette(routes=page_routes(access(), Feed(ask), ask, killed, http))
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/pipeline/kill",
        "query_string": b"",
        "scheme": "http",
        "server": HERE,
        "headers": [(name.encode(), value.encode()) for name, value in headers().items()],
    }
    asyncio.run(app(scope, receive, send))
    assert done == ["202", "http.response.body", "kill http 0"]


def test_a_service_that_starts_is_left_alone(pipeline: Pipeline, door: Server) -> None:
    """Otherwise a few clicks would have the supervisor give it up, and the pipeline with it."""
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: kill(door, TOKENIZER).status, range(36)))
    assert 202 in answers
    assert set(answers) <= {202, 409}
    wait_until_ready(pipeline, [TOKENIZER])
    restarts = {service.service: service.restarts for service in pipeline.status().services}
    assert 1 <= restarts[TOKENIZER] < 5
    assert door.complete(prompt="Once", max_tokens=2).status == 200


def test_the_pages_headers_are_strict(door: Server) -> None:
    for path in ("/", "/page/main.js", "/page/page.css", "/page/icon.svg"):
        answer = door.get(path)
        assert answer.status == 200, path
        policy = answer.headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
    for path in ("/page/nothing.js", "/page/index.html", "/page/..%2Faccess.py", "/page/../app.py"):
        assert door.get(path).status == 404, path
    written = b"".join(
        door.get(path).body for path in ("/", "/page/main.js", "/page/page.css", "/page/server.js")
    )
    assert not re.search(rb"(src|href)=\"(https?:)?//|style=\"|onclick=\"|innerHTML", written)


def test_the_page_is_not_for_other_origins_to_read(door: Server) -> None:
    other = {"Origin": "https://evil.example"}
    for path in ("/", "/page/main.js"):
        answer = door.ask("GET", path, headers=other)
        assert "access-control-allow-origin" not in answer.headers, path
    assert door.ask("GET", "/v1/models", headers=other).headers["access-control-allow-origin"]


def test_with_keys_the_page_is_open_and_what_it_asks_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    admin = tmp_path / "admin"
    admin.write_text("boss\n")
    monkeypatch.setenv("NANOVLLM_API_KEY", "user")
    with Pipeline("", *SIM, "--admin-key-file", str(admin)) as locked:
        anyone, before = Server(locked.http_port), services(locked)
        assert "boss" not in str(before[SCHEDULER].environ())
        assert {anyone.get(path).status for path in ("/", "/page/main.js")} == {200}
        assert anyone.get("/pipeline").status == 401
        assert kill(anyone, SCHEDULER).status == 401
        assert kill(anyone, SCHEDULER, Authorization="Bearer user").json["error"]["code"] == (
            "invalid_admin_key"
        )
        assert services(locked)[SCHEDULER].pid == before[SCHEDULER].pid
        owner = {"authorization": "Bearer boss"}
        assert anyone.ask("GET", "/v1/models", headers=owner).status == 200
        assert kill(anyone, SCHEDULER, Authorization="Bearer boss").status == 202
        wait_for_another(locked, SCHEDULER, before[SCHEDULER])


def test_the_main_machines_pages_reach_services_of_others() -> None:
    beside, there = free_services(), ServiceId("tokenizer", 100)
    brings = ("--tokenizers", "1", "--http-servers", "1", "--http", "127.0.0.1:0")
    with (
        Pipeline("", *SIM, "--services", beside, "--ingress", free_services()) as first,
        Pipeline("", "--join", beside, *brings) as joined,
    ):
        (line,) = [line for line in joined.output if " joined the pipeline" in line]
        door, its_door = (
            Server(first.http_port),
            Server(int(line.partition("http://127.0.0.1:")[2].split()[0])),
        )
        for through in (door, its_door):
            before = ready_process(first, joined, there)
            assert kill(through, there).status == 202
            wait_for_another(joined, there, before)
        refused = kill(its_door, SCHEDULER)
        assert (refused.status, "main machine" in refused.json["error"]["message"]) == (409, True)
        assert not any(s.restarts for s in first.status().services if s.service == SCHEDULER)


def ready_process(first: Pipeline, joined: Pipeline, service: ServiceId) -> psutil.Process:
    """The process of a service that has joined, once the pipeline knows that it is ready."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        process = services(joined).get(service)
        for status in first.status().services:
            ready = status.service == service and status.state == "ready"
            if process is not None and ready and status.pid == process.pid:
                return process
        assert time.monotonic() < deadline, f"{service} is not ready:\n{joined.transcript}"
        time.sleep(LOOK_AGAIN_S)


def test_an_open_page_keeps_no_server_from_its_end() -> None:
    """Neither a restart nor the end of the pipeline waits for its stream."""
    with Pipeline("", *SIM, "--drain-timeout", "600", lifeline=False) as own:
        assert f"open http://127.0.0.1:{own.http_port} in a browser" in own.output
        restart = ["restart", "http", "--runtime-dir", str(own.runtime_dir)]
        for end in (
            lambda: CliRunner().invoke(main, restart, catch_exceptions=False),
            lambda: own.process.send_signal(signal.SIGTERM),
        ):
            page = http.client.HTTPConnection("127.0.0.1", own.http_port, timeout=TIMEOUT_S)
            page.request("GET", "/pipeline")
            stream = page.getresponse()
            while not stream.readline().startswith(b"data: "):
                pass
            end()
            stream.read()
            page.close()
        assert own.process.wait(END_TIMEOUT_S) == 0
