"""From what a program writes to the protocol's `Generate`."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from nanovllm.protocol import ChatMessage, Generate
from nanovllm.sampling_params import SamplingParams
from nanovllm.wording import mistake

Messages = Sequence[Mapping[str, str] | ChatMessage]
# Text, token ids, or chat messages.
Prompt = str | Sequence[int] | Messages


def generate_message(
    request_id: str,
    prompt: Prompt,
    sampling_params: SamplingParams | None = None,
    *,
    stream: bool,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    cache_salt: str | None = None,
) -> Generate:
    """The request for `prompt`: text, token ids or chat messages.

    Raises:
        TypeError: the prompt is none of these, or a parameter of another type.
        ValueError: it is empty or not valid Unicode, or a value in it is of the wrong type or out
            of range.
    """
    if not isinstance(sampling_params, SamplingParams | None):
        raise TypeError(
            f"sampling_params is a SamplingParams, not {type(sampling_params).__name__}"
        )
    values: dict[str, Any] = _prompt(prompt)
    if chat_template_kwargs is not None:
        if "messages" not in values:
            raise ValueError("chat_template_kwargs go with chat messages only")
        values["chat_template_kwargs"] = dict(chat_template_kwargs)
    if cache_salt is not None:
        values["cache_salt"] = cache_salt
    try:
        message = msgspec.convert({"type": "generate", "id": request_id, **values}, Generate)
    except msgspec.ValidationError as error:
        raise ValueError(mistake(error)) from None
    message.stream = stream
    message.sampling = (sampling_params or SamplingParams()).to_wire()
    try:
        msgspec.msgpack.encode(message)  # as it will be: only this finds what cannot be
    except UnicodeEncodeError as error:
        found = error.object[error.start]
        raise ValueError(f"the text is not valid Unicode (UTF-8): it holds {found!r}") from None
    return message


def as_messages(messages: str | Messages) -> Messages:
    """Chat messages; a string is one message of the user's."""
    if isinstance(messages, str):
        return [ChatMessage(role="user", content=messages)]
    return messages


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        if not prompt:
            raise ValueError("the prompt is empty")
        return {"prompt": prompt}
    if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | Mapping):
        raise TypeError(
            f"a prompt is a str, token ids or chat messages, not {type(prompt).__name__}"
        )
    items: list[Any] = list(prompt)
    if not items:
        raise ValueError("the prompt is empty")
    if isinstance(items[0], Mapping | ChatMessage):
        return {"messages": items}
    try:
        return {"prompt_token_ids": [operator.index(item) for item in items]}
    except TypeError:
        kinds = sorted({type(item).__name__ for item in items})
        raise TypeError(
            f"a prompt is a str, token ids (int) or chat messages (dict), not a list of"
            f" {', '.join(kinds)}"
        ) from None
