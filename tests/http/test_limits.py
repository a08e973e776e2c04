"""Connections that bring no request, or not in time, or too much of it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm.services.http import gate, limits
from tests.http.server import TIMEOUT_S, Server, serving

POST = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\n"


@pytest.fixture
def hurried(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that waits neither for headers nor for bodies for long."""
    monkeypatch.setattr(limits, "HEADERS_S", 1.0)
    monkeypatch.setattr(gate, "BODY_S", 1.0)
    with serving(pipeline.endpoint) as running:
        yield running


def answer_to(server: Server, *pieces: bytes) -> bytes:
    """What the server says until it disconnects."""
    with socket.create_connection(("127.0.0.1", server.port), TIMEOUT_S) as connection:
        said = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            while received := connection.recv(65536):
                said += received
        except ConnectionError:  # it has disconnected before it had read all
            pass
        return said


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", 408),
        (b"\r\n", 408),
        (POST, 408),
        (b"GET /health HTTP/1.1\r\nhost: x\r\n\r\nGET ", 408),
        (POST + b"content-length: 10\r\n\r\nabc", 408),
        (POST + b"transfer-encoding: chunked\r\n\r\n3\r\nabc\r\n", 408),
    ],
)
def test_what_does_not_come_in_time_is_refused(hurried: Server, sent: bytes, status: int) -> None:
    assert f"HTTP/1.1 {status} ".encode() in answer_to(hurried, sent)


def test_whole_requests_before_garbage_are_answered(server: Server) -> None:
    body = b'{"model": "demo", "prompt": "Once", "max_tokens": 4}'
    whole = POST + b"content-length: %d\r\n\r\n" % len(body) + body
    answer = answer_to(server, whole * 2 + b"\0garbage\r\n\r\n")
    assert answer.count(b"HTTP/1.1 200 ") == answer.count(b'"finish_reason"') == 2


@pytest.mark.parametrize("chunk", [b"-3\r\n", b"f" * 20 + b"\r\n", b"3\nabc\n0\n\n", b"zz"])
def test_a_malformed_chunk_is_refused(server: Server, chunk: bytes) -> None:
    sent = POST + b"transfer-encoding: chunked\r\n\r\n" + chunk
    assert answer_to(server, sent).startswith(b"HTTP/1.1 400 ")


def test_http_1_0_gets_a_stream_without_chunked_encoding(server: Server) -> None:
    body = b'{"model": "demo", "prompt": "Once", "max_tokens": 3, "stream": true}'
    head = b"POST /v1/completions HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body)
    headers, _, events = answer_to(server, head + body).partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200 ")
    assert b"transfer-encoding" not in headers
    assert events.startswith(b"data: {")
    assert events.endswith(b"}\n\ndata: [DONE]\n\n")


def test_a_request_that_asks_for_http_2_is_served_as_http_1_1(server: Server) -> None:
    body = b'{"model": "demo", "prompt": "Once", "max_tokens": 3}'
    upgrade = b"connection: upgrade, http2-settings, close\r\nupgrade: h2c\r\n"
    head = POST + upgrade + b"content-length: %d\r\n\r\n" % len(body)
    assert answer_to(server, head, body).startswith(b"HTTP/1.1 200 ")


def test_a_stream_outlives_the_time_for_headers(hurried: Server) -> None:
    body = {"model": "demo", "prompt": "Once", "max_tokens": 400, "ignore_eos": True}
    with hurried.send("/v1/completions", {**body, "stream": True}) as connection:
        connection.sendall(b"GET ")  # the next request, which does not come
        stream = connection.makefile("rb")
        assert any(line == b"data: [DONE]\n" for line in stream)


@pytest.fixture(scope="module")
def small(pipeline: Pipeline) -> Iterator[Server]:
    """A server that takes bodies of 1 MiB."""
    with serving(pipeline.endpoint, max_body_bytes=1 << 20) as running:
        yield running


CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n"
CHUNK = b"100000\r\n" + b" " * (1 << 20) + b"\r\n"


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ([POST, b"x: " + b"y" * (1 << 20)], 431),
        ([POST, *[b"x: y\r\n" * 1000] * 40], 431),
        ([b"GET /" + b"y" * (1 << 20)], 431),
        ([POST, b"content-length: 99999999999\r\nconnection: close\r\n\r\n"], 413),
        ([CHUNKED, *[CHUNK] * 5], 413),
        ([CHUNKED, *[b"1\r\n \r\n" * 10_000] * 60], 413),
        ([CHUNKED, b"1\r\n \r\n0\r\n", *[b"x: y\r\n" * 10_000] * 60], 413),
    ],
    ids=["header", "headers", "path", "length", "chunks", "tiny chunks", "trailers"],
)
def test_what_is_too_large_is_refused(small: Server, pieces: list[bytes], status: int) -> None:
    said = answer_to(small, *pieces)
    assert not said or said.startswith(f"HTTP/1.1 {status} ".encode())
    assert small.get("/health").status == 200


def test_a_body_that_is_not_wanted_is_read_for_the_answer_to_arrive(small: Server) -> None:
    refused = small.complete(prompt="x" * (2 << 20))
    assert refused.status == 413
    assert "1048576 bytes" in refused.json["error"]["message"]
