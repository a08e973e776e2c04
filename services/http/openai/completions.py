"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from nanovllm.client.results import Completion, Delta
from nanovllm.protocol import Generate
from nanovllm.services.http.calls import Calls, client_name
from nanovllm.services.http.context import DoorContext, ServedModel
from nanovllm.services.http.errors import ApiError, check_model, json_response
from nanovllm.services.http.openai.answers import (
    PromptLogprobs,
    TextChoice,
    TextCompletion,
    usage_of,
)
from nanovllm.services.http.openai.chunks import Chunks
from nanovllm.services.http.openai.formats import asked_format
from nanovllm.services.http.openai.logprobs import (
    CompletionLogprobsWriter,
    prompt_logprobs,
    text_of,
)
from nanovllm.services.http.openai.requests import MAX_CHOICES, CompletionRequest, asked_sampling
from nanovllm.services.http.parsing import parse
from nanovllm.services.http.sampling import copies
from nanovllm.services.http.streams import respond
from nanovllm.services.http.tracing import asked_of


class Echo(NamedTuple):
    """A prompt that its choices begin with."""

    text: str
    token_ids: list[int]


async def complete(
    request: Request, context: DoorContext, tokenize: Callable[[str], Awaitable[list[int]]]
) -> Response:
    """Continues prompts, whole or as a stream; raises what `chat` raises.

    Args:
        tokenize: tells the token ids of a text.
    """
    body = await request.body()
    ask = parse(body, CompletionRequest)
    model = context.model
    check_model(ask.model, model.name)
    prompts, choices = ask.prompts, ask.n or 1
    if len(prompts) * choices > MAX_CHOICES:
        message = f"prompt: {len(prompts)} prompts of {choices} choices; {MAX_CHOICES} at most"
        raise ApiError(400, message, "prompt")
    # The pipeline gives one token at least, also where none is asked for.
    answer = asked_format(ask)
    max_tokens = 1 if ask.max_tokens == 0 else ask.max_tokens
    params = asked_sampling(ask, model, max_tokens, ask.logprobs, answer.outputs)
    echoes: list[Echo | None] = [None] * len(prompts)
    if ask.echo:
        ids = [await tokenize(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        texts = [p if isinstance(p, str) else text_of(p, model.token_text) for p in prompts]
        echoes = [Echo(*echo) for echo in zip(texts, ids, strict=True)]
        prompts = [*ids]
        if params.prompt_logprobs is None:
            params.prompt_logprobs = ask.logprobs
    messages = [
        Generate(
            id="",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=None if isinstance(prompt, str) else prompt,
            sampling=params,
            stream=bool(ask.stream),
            cache_salt=ask.cache_salt,
            client=client_name(request),
            **asked_of(request),
        )
        for prompt in prompts
    ]
    calls = Calls(context, request, copies(context, messages, choices, body), answer.key)
    outputs = [
        TextOutput(index, ask, model, echoes[index // choices])
        for index in range(len(calls.streams))
    ]
    chunk = TextCompletion(
        id=f"cmpl-{secrets.token_hex(12)}", created=int(time.time()), model=model.name, choices=[]
    )
    usage = partial(usage_of, choices=choices, prompt_only=ask.max_tokens == 0)

    def whole(completions: list[Completion]) -> Response:
        chunk.usage = usage([completion.usage for completion in completions])
        chunk.choices = [o.whole(c) for o, c in zip(outputs, completions, strict=True)]
        return json_response(chunk)

    return await respond(
        Chunks(chunk, usage if ask.include_usage else None),
        calls,
        outputs,
        context,
        whole,
        stream=bool(ask.stream),
        large=params.logprobs is not None or params.prompt_logprobs is not None,
    )


class TextOutput:
    """One choice of a completion.

    Args:
        echo: the prompt, if the choice begins with it.
    """

    def __init__(
        self, index: int, ask: CompletionRequest, model: ServedModel, echo: Echo | None
    ) -> None:
        self._index = index
        self._ask = ask
        self._token_text = model.token_text
        self._echo = echo  # until it was given
        silent = frozenset[int]() if ask.skip_special_tokens is False else model.silent
        self._writer = CompletionLogprobsWriter(model.token_text, silent)
        self._prompt_logprobs: PromptLogprobs | UnsetType = UNSET  # until they were given

    def begin(self) -> list[TextChoice]:
        return []

    def news(self, delta: Delta) -> list[TextChoice]:
        text = self._take(delta)
        return [self._choice(text)] if text else []

    def end(self, completion: Completion) -> list[TextChoice]:
        return [self._last("", completion)]

    def whole(self, completion: Completion) -> TextChoice:
        return self._last(self._take(completion), completion)

    def _take(self, output: Delta | Completion) -> str:
        """Keeps the logprobs of new output; returns its text, the prompt's before it."""
        text, echo, self._echo = "", self._echo, None
        if echo is not None:
            text = echo.text
        if output.prompt_logprobs is not None:
            if self._ask.prompt_logprobs is not None:
                self._prompt_logprobs = prompt_logprobs(output.prompt_logprobs, self._token_text)
            if echo is not None and self._ask.logprobs is not None:
                self._writer.add_prompt(text, echo.token_ids[0], output.prompt_logprobs)
        if self._ask.max_tokens != 0:
            self._writer.add(output.logprobs or [])
            text += output.text
        return text

    def _choice(self, text: str) -> TextChoice:
        choice = TextChoice(self._index, text, None, self._writer.take(), self._prompt_logprobs)
        self._prompt_logprobs = UNSET
        return choice

    def _last(self, text: str, completion: Completion) -> TextChoice:
        choice = self._choice(text)
        length = completion.finish_reason == "length" or self._ask.max_tokens == 0
        choice.finish_reason = "length" if length else "stop"
        return choice
