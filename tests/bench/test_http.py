"""`nanovllm bench --http`, against a pipeline's HTTP servers and against servers of other kinds."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm.bench.http import HttpClient, Url
from nanovllm.client.results import PipelineUnavailable
from nanovllm.names import ServiceId
from nanovllm.protocol import Delta, Error, Finish, Generate, Sampling, ServerMessage
from tests.bench.test_command import QUICK, TIMEOUT_S, command, run
from tests.recovery.streams import services, wait_for_another
from tests.terminal import CTRL_C, terminal

KEY = "key-of-the-bench"
Serve = Callable[..., HttpClient]


@pytest.fixture(scope="module")
def door() -> Iterator[Pipeline]:
    """A pipeline whose HTTP server needs a key."""
    pipeline = Pipeline("", "--device", "sim", "--sim-step-ms", "2", "--http", "127.0.0.1:0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOVLLM_API_KEY", KEY)
        pipeline.start()
    yield pipeline
    pipeline.stop()


def entries(path: Path) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(path.read_bytes())["requests"]
    return found


def test_the_pipelines_own_http_server(
    door: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOVLLM_API_KEY", f"{KEY},another")
    document = tmp_path / "run.json"
    ran = run(
        *("--http", "--runtime-dir", str(door.runtime_dir), "--json", str(document)),
        *("--concurrency", "3", "--requests", "7", *QUICK),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "7 sent, 7 finished (7 length)" in ran.stdout
    found = json.loads(document.read_bytes())
    assert found["model"] == "demo"
    assert found["device"].startswith("sim")
    assert found["server_version"] == found["version"]
    assert found["endpoint"] == f"http://127.0.0.1:{door.http_port}/v1"
    assert [entry["output_tokens"] for entry in found["requests"]] == [4] * 7
    assert found["report"]["tokens"]["input"] == 7 * 8


def test_chats_of_several_turns_by_url(door: Pipeline, tmp_path: Path) -> None:
    key, prompts, document = (tmp_path / name for name in ("key", "prompts", "run.json"))
    key.write_text(f"# the first\n{KEY}\n")
    spoken = [{"from": "human", "value": "Hi"}, {"from": "human", "value": "Go on"}]
    prompts.write_text(json.dumps([{"conversations": spoken}]))
    ran = run(
        *("--http", f"http://127.0.0.1:{door.http_port}", "--api-key-file", str(key)),
        *("--prompts", str(prompts), "--turns", "2", "--requests", "3", "--output", "6"),
        *("--warm-up", "0", "--ignore-eos", "--json", str(document)),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    found = entries(document)
    assert [entry["output_tokens"] for entry in found] == [6] * 6
    by_turn = [
        [entry["usage"]["prompt_tokens"] for entry in found if entry["turn"] == turn]  # type: ignore[index]
        for turn in (0, 1)
    ]
    assert max(by_turn[0]) < min(by_turn[1])  # the second turn has the first and its answer


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("--http {url}", "lists no model (status 401: no valid API key"),
        ("--http {url} --model other --requests 2", "no request succeeded: model_not_found: "),
        ("--http http://127.0.0.1:1", "no server answers at http://127.0.0.1:1/ready: "),
        ("--http tcp://127.0.0.1:1", "--http 'tcp://127.0.0.1:1' is no URL as http://"),
        ("--http http://127.0.0.1:99999", "--http 'http://127.0.0.1:99999' is no URL as http://"),
        ("--http http://[::1", "--http 'http://[::1' is no URL as http://"),
        ("--http {url} --api-key-file /nowhere", "--api-key-file /nowhere cannot be read"),
        ("--http {url} --turns 2", "--turns over HTTP needs --prompts with chats"),
        ("--model demo", "--model and --api-key-file go with --http"),
    ],
)
def test_a_mistake_is_told_in_a_line(
    door: Pipeline, monkeypatch: pytest.MonkeyPatch, arguments: str, says: str
) -> None:
    if "other" in arguments:
        monkeypatch.setenv("NANOVLLM_API_KEY", KEY)
    words = arguments.format(url=f"http://127.0.0.1:{door.http_port}/v1").split()
    ran = run(*words, "--warm-up", "0")
    assert ran.returncode in (1, 2)
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("Error: ")]
    assert says in line
    assert "Traceback" not in ran.stderr


def test_ctrl_c_and_kills_behind_the_server(door: Pipeline) -> None:
    """A death behind the HTTP server is a pause to the run; Ctrl-C shows what there is."""
    words = ("--http", "--runtime-dir", str(door.runtime_dir), "--seconds", "100", *QUICK)
    ingress = ServiceId("ingress")
    with terminal(command(*words), NANOVLLM_API_KEY=KEY) as running:
        running.wait_for("first token")
        before = services(door)[ingress]
        before.kill()
        wait_for_another(door, ingress, before)
        running.wait_for("first token")
        running.press(CTRL_C)
        code = running.wait()
        assert "interrupted" in running.shown
        assert "error" not in running.shown.lower()
        assert "Traceback" not in running.shown
        assert code == 130


# Servers of other kinds ---------------------------------------------------------------------------


@pytest.fixture
def serve() -> Iterator[Serve]:
    """A client of a server that answers each request with the next of the given bytes, on whichever
    connection it comes, and closes behind an answer of None."""
    closing: list[HttpClient | socket.socket] = []

    def start(*answers: list[bytes], closes: bool = False) -> HttpClient:
        listening = socket.create_server(("127.0.0.1", 0))
        closing.append(listening)

        def answer() -> None:
            left = list(answers)
            while left:
                connection, _ = listening.accept()
                with connection:
                    while left and b"\r\n\r\n" in connection.recv(1 << 16):
                        for piece in left.pop(0):
                            connection.sendall(piece)
                            time.sleep(0)
                        if closes:
                            break

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        client = HttpClient(Url.parse(url), "m", "")
        closing.append(client)
        return client

    yield start
    for one in reversed(closing):
        one.close()


def head(status: str = "200 OK", *lines: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode()


def chunked(body: bytes, size: int) -> list[bytes]:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return [head("200 OK", "Transfer-Encoding: chunked")] + [
        b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""]
    ]


EVENTS = (
    b': a comment\n\ndata: {"choices": [{"index": 0, "text": "a\xc3\xa4"}]}\n\n'
    b'data:{"choices":[{"index":0,"text":"b"}],"usage":null}\r\n\r\n'
    b'data: {"choices": [{"text": "", "finish_reason": "stop"}]}\n\n'
    b'data: {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 5}}\n\n'
    b"data: [DONE]\n\n"
)


def ask(client: HttpClient, request_id: str = "0") -> list[ServerMessage]:
    """All that comes of one request."""
    client.submit(Generate(id=request_id, prompt="x", sampling=Sampling(max_tokens=5)))
    deadline = time.monotonic() + TIMEOUT_S
    found: list[ServerMessage] = []
    while not found or not isinstance(found[-1], Finish | Error):
        assert time.monotonic() < deadline, found
        found += client.receive(deadline)
    return found


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_events_are_read_however_they_are_torn(serve: Serve, size: int) -> None:
    client = serve(chunked(EVENTS, size), chunked(EVENTS, size))
    for request_id in ("first", "second"):  # over the same connection
        *deltas, finish = ask(client, request_id)
        assert [delta.text for delta in deltas if isinstance(delta, Delta)] == ["aä", "b", ""]
        # The tokens that no event told of come with the end.
        assert [len(d.token_ids) for d in deltas if isinstance(d, Delta)] == [1, 1, 3]
        assert isinstance(finish, Finish)
        assert (finish.id, finish.finish_reason) == (request_id, "stop")
        assert (finish.usage.prompt_tokens, finish.usage.completion_tokens) == (9, 5)


def test_it_closes_amid_answers(serve: Serve) -> None:
    """Of which one has come, one comes over a kept connection, and one has not begun."""
    client = serve(chunked(EVENTS, 50), [head(), b'data: {"choices": [{"text": "a"}]}\n\n'])
    ask(client)
    for request_id in ("1", "2"):
        client.submit(Generate(id=request_id, prompt="x"))
    assert client.receive(time.monotonic() + TIMEOUT_S)
    client.close()
    client.close = lambda: None  # type: ignore[method-assign]


def test_an_answer_may_end_with_its_connection(serve: Serve) -> None:
    client = serve([head(), EVENTS], [head(), EVENTS], closes=True)
    for _ in range(2):
        assert isinstance(ask(client)[-1], Finish)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ([head("429 Busy", "Content-Length: 4"), b"full"], "http_429"),
        (
            [head("400 Bad", "Content-Length: 24"), b'{"error":{"code":"too"}}'],
            "too",
        ),
        (chunked(b'data: {"error": {"message": "no", "code": 500}}\n\n', 9), "error"),
        (chunked(b"data: [DONE]\n\n", 50), "incomplete"),
        (chunked(b"data: nonsense\n\n", 50), "invalid_answer"),
        ([b"SMTP ready\r\n"], "invalid_answer"),
        ([head("200 OK", "Content-Length: 500"), b"data: "], "connection_lost"),
    ],
)
def test_what_goes_wrong_is_an_error_of_the_request(
    serve: Serve, answer: list[bytes], code: str
) -> None:
    client = serve(answer, chunked(EVENTS, 50), closes=True)
    (error,) = ask(client)
    assert isinstance(error, Error)
    assert error.code == code
    assert isinstance(ask(client)[-1], Finish)


def test_a_server_that_is_gone_ends_the_run(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with HttpClient(Url.parse(url), "m", "") as client:
        client.submit(Generate(id="0", prompt="x"))
        with pytest.raises(PipelineUnavailable, match="no server answers"):
            client.receive(time.monotonic() + TIMEOUT_S)
