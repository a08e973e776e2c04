"""What carries a load: the Protocol, and the client of the ingress' socket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

import msgspec
import zmq

from nanovllm.client.connection import ZMTP_HEARTBEAT_MS, ZMTP_TIMEOUT_MS
from nanovllm.client.results import PipelineUnavailable
from nanovllm.keys import client_keys
from nanovllm.protocol import Generate, ServerMessage
from nanovllm.timer import Timer
from nanovllm.transport.curve import secure_to_connect
from nanovllm.transport.router_monitor import readable


class LoadClient(Protocol):
    """Carries requests to a pipeline, and the answers back.

    A client of another protocol than the ingress' turns what comes into `Delta`, `Finish` and
    `Error`.
    """

    def submit(self, request: Generate) -> None:
        """Sends, and never waits for the server."""

    def receive(self, until: float) -> Sequence[ServerMessage]:
        """What has come; if nothing has, waits for it, but no longer than `until`
        (`time.monotonic()`).

        Raises:
            PipelineUnavailable: the server has gone.
        """


class SocketClient:
    """One connection to an ingress, which is not made anew when it breaks.

    Raises:
        ValueError: `endpoint` is not an endpoint, or `keys` (see `client_keys`) is no file of keys.
    """

    def __init__(self, endpoint: str, keys: str | None = None) -> None:
        curve = client_keys(endpoint, keys)
        self._endpoint = endpoint
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(list[ServerMessage]).decode
        self._timer = Timer()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, ZMTP_HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, ZMTP_TIMEOUT_MS)
        self._monitor = self._socket.get_monitor_socket(
            # The latter: nobody listens, where a pipeline answered a moment ago.
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CONNECT_RETRIED
        )
        secure_to_connect(self._socket, endpoint, curve)
        try:
            self._socket.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(f"cannot connect to {endpoint!r}: {error.strerror}") from None
        self._poller = zmq.Poller()
        for source in (self._socket, self._monitor, self._timer.descriptor):
            self._poller.register(source, zmq.POLLIN)

    def submit(self, request: Generate) -> None:
        self._socket.send(self._encode(request))

    def receive(self, until: float) -> list[ServerMessage]:
        if not readable(self._socket):
            self._wait(until)
            if not readable(self._socket):
                return []
        try:
            return self._decode(self._socket.recv())
        except msgspec.DecodeError as error:
            raise PipelineUnavailable(
                f"what answers at {self._endpoint} does not speak this protocol: {error}"
            ) from None

    def _wait(self, until: float) -> None:
        self._timer.clear()
        self._timer.set(until)
        self._poller.poll()
        if readable(self._monitor) and not readable(self._socket):
            raise PipelineUnavailable(
                f"the pipeline at {self._endpoint} is gone: the connection has ended"
            )

    def close(self) -> None:
        """Disconnects; the ingress then aborts what is unfinished."""
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._context.destroy(linger=0)
        self._timer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
