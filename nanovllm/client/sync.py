"""The synchronous client."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Literal, overload

from nanovllm.client.connection import Connection
from nanovllm.client.requests import Messages, Prompt, as_messages, generate_message
from nanovllm.client.results import Completion, Delta
from nanovllm.client.tickets import Request
from nanovllm.protocol import Pong
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings import DEFAULT_INGRESS


class Client:
    """A client of a running pipeline.

    It survives disconnections and restarts of the pipeline: streams go on where they stood. Several
    streams may be open at the same time. A client belongs to one thread.

    Args:
        endpoint: where the pipeline serves.
        timeout: seconds without any sign of life from the pipeline after which calls raise
            PipelineUnavailable. How long an answer takes is not limited by it.

    Raises:
        ValueError: if `endpoint` is not one.
    """

    def __init__(self, endpoint: str = DEFAULT_INGRESS, timeout: float = 10.0) -> None:
        self._connection = Connection(endpoint, timeout)
        self._closing = weakref.finalize(self, self._connection.close)

    @overload
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> Stream: ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        cache_salt: str | None = None,
    ) -> Completion | Stream:
        """Generates from text, token ids or chat messages.

        Args:
            prompt: a str, a list of token ids, or a list of `{"role": …, "content": …}`.
            sampling_params: how; the defaults of SamplingParams if not given.
            stream: return a `Stream` at once, instead of the Completion at its end.
            chat_template_kwargs: for chat messages; passed to the chat template.
            cache_salt: prefix-cache entries are shared only among requests with the same salt.

        Raises:
            TypeError, ValueError: the prompt or a parameter is not valid.
            RequestError: the pipeline refused it (from a Stream: when it is read).
            PipelineUnavailable: no pipeline answers.
        """
        core = self._connection.core
        message = generate_message(
            core.new_id(),
            prompt,
            sampling_params,
            stream=stream,
            chat_template_kwargs=chat_template_kwargs,
            cache_salt=cache_salt,
        )
        reader = Stream(self._connection, core.submit(message))
        self._connection.pump()
        return reader if stream else reader.result()

    @overload
    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Completion: ...

    @overload
    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Stream: ...

    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Completion | Stream:
        """`generate` from chat messages; a str is one message of the user's."""
        prompt, kwargs = as_messages(messages), chat_template_kwargs
        if stream:
            return self.generate(prompt, sampling_params, stream=True, chat_template_kwargs=kwargs)
        return self.generate(prompt, sampling_params, chat_template_kwargs=kwargs)

    def ping(self) -> Pong:
        """Asks the pipeline which it is, and whether it is ready.

        Raises:
            PipelineUnavailable: no pipeline answers.
        """
        inquiry = self._connection.core.ping()
        try:
            while not inquiry.ended:
                self._connection.wait()
        finally:
            self._connection.core.abandon(inquiry)
        return inquiry.result()

    def close(self) -> None:
        """Disconnects; what is unfinished is aborted."""
        self._closing()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Stream(Iterator[Delta]):
    """The output of one request as it comes: an iterator of Deltas.

    Closing it before its end (`close`, the end of a `with` block, or dropping it) aborts the
    request.
    """

    def __init__(self, connection: Connection, request: Request) -> None:
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
        """Waits for the end; the whole output, with what has been iterated over already.

        Raises what iterating raises. If it is interrupted, the request is aborted.
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
