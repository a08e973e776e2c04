"""The synchronous client."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

from nanovllm.client.requests import GenerateCalls
from nanovllm.client.results import Completion, Delta, PendingPing, PendingRequest, StreamClosed
from nanovllm.client.thread import ConnectionThread, Waiters
from nanovllm.protocol import Generate, Pong
from nanovllm.settings import DEFAULT_INGRESS


class Client(GenerateCalls[Completion, "Stream"]):
    """A client of a running pipeline, for any number of threads.

    A client survives disconnections and restarts of the pipeline: streams go on where they stood.
    Several streams may be open at the same time. A forked process makes a client of its own.

    Args:
        endpoint: where the pipeline serves.
        timeout: seconds without any sign of life from the pipeline after which calls raise
            PipelineUnavailable. An answer may take longer. If nothing listens at `endpoint` when
            the client is first used, calls raise it after a second.
        keys: a client's key file (or the directory of a pipeline's keys), for a pipeline that takes
            TCP connections with keys only; if None, the variable NANOVLLM_KEYS says which.

    Raises:
        ValueError: `endpoint` is not an endpoint, or `keys` is no file of keys.
    """

    def __init__(
        self, endpoint: str = DEFAULT_INGRESS, timeout: float = 10.0, keys: str | None = None
    ) -> None:
        self._thread = ConnectionThread(endpoint, timeout, keys)
        self._closing = weakref.finalize(self, self._thread.close)

    def _start(self, message: Generate) -> Completion | Stream:
        stream = Stream(self, message)
        return stream if message.stream else stream.result()

    def ping(self) -> Pong:
        """Asks the pipeline for its model and version, and whether it is ready.

        Raises:
            PipelineUnavailable: no pipeline answers.
        """
        changed = Waiters()
        ping = PendingPing(changed.notify)
        try:
            self._thread.submit(ping)
            changed.wait_for(lambda: ping.ended)
        finally:
            self._thread.abandon(ping)
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

    def __init__(self, client: Client, message: Generate) -> None:
        self._client = client
        self._changed = Waiters()
        # Without a reference to the stream, so that a stream can be dropped.
        self._request = PendingRequest(message, self._changed.notify)
        self._client._thread.submit(self._request)

    def __next__(self) -> Delta:
        """
        Raises:
            RequestError: the pipeline refused it or gave it up.
            PipelineUnavailable: the pipeline is gone.
            StreamClosed: the program has closed the stream.
        """
        request = self._request
        if isinstance(request.failure, StreamClosed):
            raise request.failure
        while request.deltas or not request.ended:
            self._changed.wait_for(lambda: request.deltas or request.ended)
            with contextlib.suppress(IndexError):  # another thread took the delta
                return request.deltas.popleft()
        request.result()
        raise StopIteration

    def result(self) -> Completion:
        """Waits for the end; the whole output, including the Deltas that were iterated over.

        Raises what iterating raises. An interruption (Ctrl-C) aborts the request.
        """
        try:
            self._changed.wait_for(lambda: self._request.ended)
        finally:
            self.close()
        return self._request.result()

    def close(self) -> None:
        """Aborts the request, unless it has ended."""
        if not self._request.ended:
            self._request.failure = StreamClosed("the stream is closed")
            self._client._thread.abandon(self._request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
