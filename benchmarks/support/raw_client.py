"""A client as any language has it: a socket and MessagePack, nothing of the client library."""

from __future__ import annotations

from typing import Any, Final, Self

import msgspec
import zmq

from nanovllm.protocol import ServerMessage

SEND_TIMEOUT_S: Final = 30.0


class RawClient:
    """One connection to an ingress.

    Args:
        endpoint: the ingress.
        options: of the socket, by their names in ZeroMQ.
    """

    def __init__(self, endpoint: str, **options: int) -> None:
        self.socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        for name, value in {"SNDTIMEO": int(SEND_TIMEOUT_S * 1000), **options}.items():
            self.socket.setsockopt(getattr(zmq, name), value)
        self.socket.connect(endpoint)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(list[ServerMessage])

    def say(self, *messages: Any) -> None:
        """Sends messages, each in a frame of its own."""
        for message in messages:
            self.socket.send(self._encoder.encode(message))

    def send(self, *frames: bytes) -> None:
        """Sends one ZeroMQ message."""
        self.socket.send_multipart(frames)

    def receive(self, timeout_s: float = 0.0) -> list[ServerMessage]:
        """The messages of the next frame; none if no frame comes in time."""
        if not self.socket.poll(int(timeout_s * 1000)):
            return []
        return self._decoder.decode(self.socket.recv())

    def close(self) -> None:
        """Goes away without a word."""
        self.socket.close(linger=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
