"""The events of OpenAI's streams of chats and completions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from nanovllm.client.results import Usage as PipelineUsage
from nanovllm.services.http.errors import ApiError, ErrorAnswer
from nanovllm.services.http.openai.answers import ChatChunk, TextCompletion, Usage

DONE: Final = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode


class Chunks:
    """An event is a chunk with one choice.

    Args:
        chunk: a chunk without choices.
        usage: the answer's, of the requests' in order, which comes in a chunk of its own at the
            end; None for no such chunk.
    """

    waiting: Final = b": waiting\n\n"

    def __init__(
        self,
        chunk: ChatChunk | TextCompletion,
        usage: Callable[[list[PipelineUsage]], Usage] | None,
    ) -> None:
        self._chunk = chunk
        if usage is not None:
            chunk.usage = None
        before, mark, after = _encode(chunk).partition(b'"choices":[')
        self._head, self._tail = b"data: " + before + mark, after + b"\n\n"
        self._usage = usage

    def event(self, made: msgspec.Struct) -> bytes:
        return self._head + _encode(made) + self._tail

    def last(self, usages: list[PipelineUsage]) -> bytes:
        if self._usage is None:
            return DONE
        self._chunk.usage = self._usage(usages)
        return b"data: " + _encode(self._chunk) + b"\n\n" + DONE

    def failed(self, error: ApiError) -> bytes:
        return b"data: " + _encode(ErrorAnswer(error.body)) + b"\n\n" + DONE
