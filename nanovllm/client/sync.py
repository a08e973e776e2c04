"""The synchronous client."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from nanovllm.client.connection import Connection
from nanovllm.client.requests import GenerateCalls
from nanovllm.client.results import Completion, Delta, PendingRequest
from nanovllm.protocol import Generate, Pong
from nanovllm.settings import DEFAULT_INGRESS


class Client(GenerateCalls[Completion, "Stream"]):
    """A client of a running pipeline.

    A client survives disconnections and restarts of the pipeline: streams go on where they stood.
    Several streams may be open at the same time. A client belongs to one thread.

    Args:
        endpoint: where the pipeline serves.
        timeout: seconds without any sign of life from the pipeline after which calls raise
            PipelineUnavailable. An answer may take longer.

    Raises:
        ValueError: `endpoint` is not an endpoint.
    """

    def __init__(self, endpoint: str = DEFAULT_INGRESS, timeout: float = 10.0) -> None:
        self._connection = Connection(endpoint, timeout)
        self._closing = weakref.finalize(self, self._connection.close)

    def _start(self, message: Generate) -> Completion | Stream:
        stream = Stream(self._connection, self._connection.core.submit(message))
        self._connection.pump()
        return stream if message.stream else stream.result()

    def ping(self) -> Pong:
        """Asks the pipeline for its model and version, and whether it is ready.

        Raises:
            PipelineUnavailable: no pipeline answers.
        """
        ping = self._connection.core.ping()
        try:
            while not ping.ended:
                self._connection.wait()
        finally:
            self._connection.core.abandon(ping)
        return ping.result()

    def close(self) -> None:
        """Disconnects; what is unfinished is aborted."""
        self._closing()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[Delta]):
    """The output of one request as it comes: an iterator of Deltas.

    Closing a stream before its end (`close`, the end of a `with` block, or dropping it) aborts the
    request.
    """

    def __init__(self, connection: Connection, request: PendingRequest) -> None:
        self._connection = connection
        self._request = request

    def __next__(self) -> Delta:
        """
        Raises:
            RequestError: the pipeline refused it or gave it up.
            PipelineUnavailable: the pipeline is gone.
        """
        while not self._request.deltas and not self._request.ended:
            self._connection.wait()
        if self._request.deltas:
            return self._request.deltas.popleft()
        self._request.result()
        raise StopIteration

    def result(self) -> Completion:
        """Waits for the end; the whole output, including the Deltas that were iterated over.

        Raises what iterating raises. An interruption (Ctrl-C) aborts the request.
        """
        try:
            while not self._request.ended:
                self._connection.wait()
        finally:
            self.close()
        return self._request.result()

    def close(self) -> None:
        """Aborts the request, unless it has ended."""
        if not self._request.ended:
            self._request.failure = RuntimeError("the stream is closed")
            self._connection.abandon(self._request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
