"""Requests that no honest client makes."""

from __future__ import annotations

import json
import random
import socket
import struct
from typing import Any, Final

TIMEOUT_S: Final = 30.0
VALID: dict[str, Any] = {"model": "demo", "prompt": "Once", "max_tokens": 4, "ignore_eos": True}
CHAT: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
RESPONSE: dict[str, Any] = {"model": "demo", "input": "hello", "max_output_tokens": 4}
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"),
    *("/v1/responses", "/v1/messages", "/v1/messages/count_tokens"),
)
RESET = struct.pack("ii", 1, 0)


class Hostile:
    """Draws hostile requests, and makes them.

    Attributes:
        held: connections that are left open, with half a request said.
        answers: how many requests got each status; 0 is none.
    """

    def __init__(self, port: int, seed: int) -> None:
        self.held: list[socket.socket] = []
        self.answers: dict[int, int] = {}
        self._port = port
        self._draw = random.Random(seed)

    def attack(self) -> None:
        draw = self._draw
        raw = draw.choice(
            (self._torn, self._bad_head, self._smuggled, self._bad_json, self._huge, self._noise)
        )()
        connection = socket.create_connection(("127.0.0.1", self._port), TIMEOUT_S)
        try:
            connection.sendall(raw)
            if draw.random() < 0.1 and len(self.held) < 100:
                self.held.append(connection)
                return
            if draw.random() < 0.2:  # it leaves without a look at the answer, by a reset
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            else:
                connection.shutdown(socket.SHUT_WR)
                self._note(connection.recv(65536))
        except OSError:  # it was disconnected, or nothing was said
            self._note(b"")
        if connection not in self.held:
            connection.close()

    def _note(self, answer: bytes) -> None:
        status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
        self.answers[status] = self.answers.get(status, 0) + 1

    def _request(self, body: bytes, *lines: bytes, path: str | None = None) -> bytes:
        path = path or self._draw.choice(PATHS)
        named = [b"host: x", *lines]
        if not any(line.lower().startswith((b"content-length", b"transfer")) for line in lines):
            named.append(b"content-length: %d" % len(body))
        return b"POST %s HTTP/1.1\r\n%s\r\n\r\n" % (path.encode(), b"\r\n".join(named)) + body

    def _valid(self) -> bytes:
        return json.dumps(self._draw.choice((VALID, CHAT | {"max_tokens": 4}, RESPONSE))).encode()

    def _torn(self) -> bytes:
        raw = self._request(self._valid())
        return raw[: self._draw.randrange(len(raw))]

    def _bad_head(self) -> bytes:
        draw = self._draw
        body = self._valid()
        return draw.choice(
            (
                b"\r\n\r\n\r\n",
                b"GET\r\n\r\n",
                b"GET / HTTP/9.9\r\n\r\n",
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
                b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\n\r\n",
                b"GET http://[::1/ HTTP/1.1\r\nhost: x\r\n\r\n",
                b"GET /%00%0a%ff HTTP/1.1\r\nhost: x\r\n\r\n",
                "GET /ü HTTP/1.1\r\nhost: x\r\n\r\n".encode("latin-1"),
                b"GET //x/../../etc/passwd?\x7f HTTP/1.1\r\nhost: x\r\n\r\n",
                b"GET / HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\nx",
                b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + draw.randbytes(500),
                self._request(body, b"content-length: -5"),
                self._request(body, b"content-length: +%d" % len(body)),
                self._request(body, b"content-length: 99999999999999999999999999"),
                self._request(body, b"content-length: %d" % (len(body) + 50)),
                self._request(body, b"content-length: %d" % (len(body) // 2)),
                self._request(body, b"expect: 100-continue", b"content-length: 5000000"),
                self._request(body, b"x-request-id: " + b"\xff\xfe" * 10),
                self._request(body, b"authorization: Bearer \xff\x00"),
                self._request(body, b"x y: z"),
                self._request(body, b": z"),
                self._request(body, b"x: a\nb: c"),
                self._request(body, b"x: a\r\n folded"),
            )
        )

    def _smuggled(self) -> bytes:
        second = self._request(self._valid())
        body = b"0\r\n\r\n" + second
        return self._draw.choice(
            (
                self._request(body, b"content-length: 5", b"transfer-encoding: chunked"),
                self._request(body, b"transfer-encoding: chunked", b"content-length: 5"),
                self._request(body, b"transfer-encoding: xchunked"),
                self._request(body, b"transfer-encoding: chunked, identity"),
                self._request(body, b"transfer-encoding:\x0bchunked"),
                self._request(body, b"content-length: 5", b"content-length: %d" % len(body)),
                self._request(b"5;" + b"x" * 200 + b"\r\nhello\r\n", b"transfer-encoding: chunked"),
                self._request(b"ffffffffffffffffff\r\nx", b"transfer-encoding: chunked"),
                self._request(b"-1\r\nx\r\n0\r\n\r\n", b"transfer-encoding: chunked"),
                self._request(b"5\nhello\n0\n\n", b"transfer-encoding: chunked"),
                second * 30,
            )
        )

    def _bad_json(self) -> bytes:
        draw = self._draw
        deep = draw.choice((100, 10_000, 100_000))
        nested: Any = "x"
        for _ in range(draw.choice((5, 40, 200))):
            nested = draw.choice(({"role": nested}, [nested]))
        return self._request(
            draw.choice(
                (
                    b"",
                    b"null",
                    b"{",
                    b"[" * deep,
                    b'{"a":' * deep,
                    b'{"messages":' + b"[" * deep + b"]" * deep + b"}",
                    b'{"model": "demo", "prompt": "\xff\xfe"}',
                    b'{"model": "demo", "prompt": "\\ud800"}',
                    b'{"model": "demo", "prompt": "x", "max_tokens": 1e999}',
                    b'{"model": "demo", "prompt": [-1, 99999999999999999999]}',
                    b'{"model": "demo", "prompt": "x", "seed": 123456789012345678901234567890}',
                    json.dumps(CHAT | {"messages": nested}).encode(),
                    json.dumps(CHAT | {"tools": [nested]}).encode(),
                    json.dumps(CHAT | {"max_tokens": 4, "system": nested}).encode(),
                    json.dumps(RESPONSE | {"input": nested}).encode(),
                    json.dumps(CHAT | {"chat_template_kwargs": {"messages": nested}}).encode(),
                    json.dumps(VALID | {"stop": ["x" * 10_000]}).encode(),
                    json.dumps(VALID | {"prompt": ["x"] * 20_000}).encode(),
                    json.dumps(VALID | {"n": 10**9}).encode(),
                    json.dumps(VALID | {"model": "x" * 100_000}).encode(),
                    draw.randbytes(300),
                )
            )
        )

    def _huge(self) -> bytes:
        draw = self._draw
        return draw.choice(
            (
                self._request(self._valid(), b"x: " + b"y" * draw.choice((60_000, 300_000))),
                self._request(self._valid(), *[b"x%d: y" % number for number in range(5000)]),
                b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
                b"X" * 100_000,
                self._request(b'{"prompt": "' + b"x" * (1 << 20) + b'"}'),
                self._request(b" " * (1 << 20)),
            )
        )

    def _noise(self) -> bytes:
        raw = bytearray(self._request(self._valid()))
        for _ in range(self._draw.randint(1, 8)):
            raw[self._draw.randrange(len(raw))] = self._draw.randrange(256)
        return bytes(raw)
