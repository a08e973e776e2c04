"""POST /tokenize and /detokenize; the token ids of prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from tokenizers import Tokenizer

from nanovllm.checkpoint.chat_template import ChatTemplate, ChatTemplateError
from nanovllm.checkpoint.tokenizer import load_tokenizer, read_chat_template
from nanovllm.checkpoint.tokenizer_config import TokenizerConfig
from nanovllm.client.results import RequestError
from nanovllm.messages import Chat
from nanovllm.services.http.context import ServedModel
from nanovllm.services.http.errors import ApiError, api_error, check_model, json_response
from nanovllm.services.http.openai.answers import Text, Tokens
from nanovllm.services.http.openai.chat import template_keys
from nanovllm.services.http.openai.requests import (
    DetokenizeRequest,
    TokenizeRequest,
    is_continued,
)
from nanovllm.services.http.parsing import parse


class PromptTokens:
    """Tells the token ids of prompts, in a thread of its own: the event loop goes on meanwhile.

    The tokenizer is loaded when it is first needed.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._files = _TokenizerFiles(model.directory)
        self._thread = ThreadPoolExecutor(1, "tokenizer")

    async def tokenize(self, request: Request) -> Response:
        """Raises ApiError if the request is not valid, or the chat template does not take it."""
        body = await request.body()
        ask = parse(body, TokenizeRequest)
        if ask.model is not None:
            check_model(ask.model, self._model.name)
        ids = await self._in_thread(partial(self._ids, ask, body))
        texts = None
        if ask.return_token_strs:
            text_of = self._model.token_text
            texts = [text_of.get(token, b"").decode(errors="replace") for token in ids]
        return json_response(Tokens(len(ids), self._model.max_model_len, ids, texts))

    async def detokenize(self, request: Request) -> Response:
        """Raises ApiError if the request is not valid, or a token unknown."""
        ask = parse(await request.body(), DetokenizeRequest)
        if ask.model is not None:
            check_model(ask.model, self._model.name)
        text_of = self._model.token_text
        for index, token in enumerate(ask.tokens):
            if token not in text_of:
                key = f"tokens[{index}]"
                raise ApiError(400, f"{key}: the vocabulary has no token {token}", key)
        return json_response(
            Text(b"".join(text_of[token] for token in ask.tokens).decode(errors="replace"))
        )

    async def ids(self, text: str) -> list[int]:
        """The token ids of a prompt that is text."""
        return await self._in_thread(partial(self._encode, text, True))

    async def chat_ids(self, chat: Chat) -> list[int]:
        """The token ids of a chat's prompt.

        Raises ApiError if the chat template does not take it.
        """
        return await self._in_thread(partial(self._chat_ids, chat))

    async def _in_thread(self, work: Callable[[], list[int]]) -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _ids(self, ask: TokenizeRequest, body: bytes) -> list[int]:
        if ask.prompt is not None:
            return self._encode(ask.prompt, ask.add_special_tokens)
        messages, tools = template_keys(body)
        kwargs = ask.chat_template_kwargs or {}
        return self._chat_ids(Chat(messages, tools, kwargs, is_continued(ask)))

    def _chat_ids(self, chat: Chat) -> list[int]:
        return self._encode(self._render(chat), add_special_tokens=False)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        (encoding,) = self._files.tokenizer.encode_batch_fast(
            [text], add_special_tokens=add_special_tokens
        )
        ids: list[int] = encoding.ids
        return ids

    def _render(self, chat: Chat) -> str:
        """The text of a chat, as a tokenizer of the pipeline makes it."""
        template = self._files.chat_template
        if template is None:
            raise ApiError(400, "messages: this model has no chat template", "messages")
        try:
            return template.render(chat)
        except ChatTemplateError as error:
            raise api_error(RequestError("invalid_request", str(error))) from None


class _TokenizerFiles:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._config = TokenizerConfig.from_checkpoint(directory)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self._directory, self._config)

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        source = read_chat_template(self._directory, self._config)
        return None if source is None else ChatTemplate(source, self._config.special_tokens())
