"""From what a program writes to the protocol's `Generate`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar, overload

import msgspec

from nanovllm.client.results import new_id
from nanovllm.plain import check_sendable, plain, sendable
from nanovllm.protocol import Generate, Sampling
from nanovllm.sampling_params import SamplingParams
from nanovllm.wording import mistake

Messages = Sequence[Mapping[str, Any]]
# Functions that the chat template tells the model of, as OpenAI's API describes them.
Tools = Sequence[Mapping[str, Any]]
# Text, token ids, or chat messages.
Prompt = str | Sequence[int] | Messages

WholeT = TypeVar("WholeT")
StreamT = TypeVar("StreamT")


class GenerateCalls(ABC, Generic[WholeT, StreamT]):
    """The calls that `Client` and `AsyncClient` share.

    They return a `WholeT`, or with `stream=True` a `StreamT`.
    """

    @abstractmethod
    def _start(self, message: Generate) -> WholeT | StreamT:
        """Submits a request."""

    @overload
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
        cache_salt: str | None = None,
        traceparent: str | None = None,
    ) -> WholeT: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
        cache_salt: str | None = None,
        traceparent: str | None = None,
    ) -> StreamT: ...

    def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
        cache_salt: str | None = None,
        traceparent: str | None = None,
    ) -> WholeT | StreamT:
        """Generates from text, token ids or chat messages.

        Args:
            prompt: a str, a list of token ids, or a list of `{"role": …, "content": …}`.
            sampling_params: how; the defaults of SamplingParams if not given.
            stream: return a stream of Deltas at once, instead of the Completion at its end.
            chat_template_kwargs: for chat messages; passed to the chat template.
            tools: for chat messages; the functions that the chat template tells the model of.
            cache_salt: prefix-cache entries are shared only among requests with the same salt.
            traceparent: the trace that it belongs to, as W3C's header says it.

        Raises:
            TypeError, ValueError: the prompt or a parameter is not valid.
            RequestError: the pipeline refused it (from a stream: when it is read).
            PipelineUnavailable: no pipeline answers.
        """
        message = generate_message(
            prompt,
            sampling_of(sampling_params),
            stream=stream,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
            cache_salt=cache_salt,
            traceparent=traceparent,
        )
        return self._start(message)

    @overload
    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[False] = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
    ) -> WholeT: ...

    @overload
    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: Literal[True],
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
    ) -> StreamT: ...

    def chat(
        self,
        messages: str | Messages,
        sampling_params: SamplingParams | None = None,
        *,
        stream: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Tools | None = None,
    ) -> WholeT | StreamT:
        """`generate` from chat messages; a str is one message of the user's."""
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        kwargs = chat_template_kwargs
        if stream:
            return self.generate(
                messages, sampling_params, stream=True, chat_template_kwargs=kwargs, tools=tools
            )
        return self.generate(messages, sampling_params, chat_template_kwargs=kwargs, tools=tools)


def params_of(given: SamplingParams | None) -> SamplingParams:
    """The parameters given, or the defaults. Raises TypeError for anything else."""
    if not isinstance(given, SamplingParams | None):
        raise TypeError(f"sampling_params is a SamplingParams, not {type(given).__name__}")
    return given or SamplingParams()


def sampling_of(given: SamplingParams | None) -> Sampling:
    """The parameters of one request. Raises TypeError or ValueError if these are not valid."""
    params = params_of(given)
    if params.n != 1:
        raise ValueError("n is for LLM.generate; ask n times, with seeds of your own")
    return params.to_wire()


def generate_message(
    prompt: Prompt,
    sampling: Sampling,
    *,
    stream: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    tools: Tools | None = None,
    cache_salt: str | None = None,
    traceparent: str | None = None,
) -> Generate:
    """The request for `prompt`: text, token ids or chat messages.

    Raises:
        TypeError: the prompt is none of the three, or a parameter has another type.
        ValueError: the prompt is empty; or a value is of the wrong type, out of range, or cannot be
            sent, see `check_sendable`.
    """
    values: dict[str, Any] = _prompt(plain(prompt))
    check_sendable(values)
    for name, value in (("chat_template_kwargs", chat_template_kwargs), ("tools", tools)):
        if value is not None:
            if "messages" not in values:
                raise ValueError(f"{name} go with chat messages only")
            values[name] = sendable(name, value)
    for name, text in (("cache_salt", cache_salt), ("traceparent", traceparent)):
        if text is not None:
            values[name] = sendable(name, text)
    try:
        message = msgspec.convert({"type": "generate", "id": new_id(), **values}, Generate)
    except msgspec.ValidationError as error:
        raise ValueError(mistake(error)) from None
    message.stream = stream
    message.sampling = sampling
    return message


def _prompt(prompt: Any) -> dict[str, Any]:
    """The field of `Generate` that `prompt`, in built-in types, goes into, and its value."""
    if not isinstance(prompt, str | list):
        raise TypeError(
            f"a prompt is a str, token ids or chat messages, not {type(prompt).__name__}"
        )
    if not prompt:
        raise ValueError("the prompt is empty")
    if isinstance(prompt, str):
        return {"prompt": prompt}
    if isinstance(prompt[0], dict):
        return {"messages": prompt}
    kinds = set(map(type, prompt))
    if kinds == {int}:
        return {"prompt_token_ids": prompt}
    names = ", ".join(sorted(kind.__name__ for kind in kinds))
    raise TypeError(
        f"a prompt is a str, token ids (int) or chat messages (dict), not a list of {names}"
    )
