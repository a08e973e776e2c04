"""POST /v1/completions."""

from __future__ import annotations

import secrets
import time

from starlette.requests import Request
from starlette.responses import Response

from nanovllm.client.results import Completion, Delta
from nanovllm.protocol import Generate, Logprobs
from nanovllm.services.http.calls import Calls, client_name
from nanovllm.services.http.context import DoorContext, ServedModel
from nanovllm.services.http.errors import ApiError, check_model, json_response
from nanovllm.services.http.logprobs import CompletionLogprobsWriter
from nanovllm.services.http.requests import MAX_CHOICES, CompletionRequest, parse
from nanovllm.services.http.responses import TextChoice, TextCompletion, usage_of
from nanovllm.services.http.sampling import copies, sampling
from nanovllm.services.http.streams import EventStream


async def complete(request: Request, context: DoorContext) -> Response:
    """Continues prompts, whole or as a stream; raises what `chat` raises."""
    ask = parse(await request.body(), CompletionRequest)
    model = context.model
    check_model(ask.model, model.name)
    prompts, choices = ask.prompts, ask.n or 1
    if len(prompts) * choices > MAX_CHOICES:
        message = f"prompt: {len(prompts)} prompts of {choices} choices; {MAX_CHOICES} at most"
        raise ApiError(400, message, "prompt")
    params = sampling(ask, model, ask.max_tokens, ask.logprobs)
    messages = [
        Generate(
            id="",
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=None if isinstance(prompt, str) else prompt,
            sampling=params,
            stream=bool(ask.stream),
            cache_salt=ask.cache_salt,
            client=client_name(request),
        )
        for prompt in prompts
    ]
    calls = Calls(context, request, copies(context, messages, choices))
    outputs = [TextOutput(index, model) for index in range(len(calls.streams))]
    answer = TextCompletion(
        id=f"cmpl-{secrets.token_hex(12)}", created=int(time.time()), model=model.name, choices=[]
    )
    if ask.stream:
        await calls.answered()
        return EventStream(
            answer,
            calls,
            outputs,
            context.observer,
            choices=choices,
            include_usage=bool(ask.stream_options and ask.stream_options.include_usage),
        )
    completions = await calls.results()
    answer.choices = [o.whole(c) for o, c in zip(outputs, completions, strict=True)]
    answer.usage = usage_of([completion.usage for completion in completions], choices)
    return json_response(answer)


class TextOutput:
    """One choice of a completion."""

    def __init__(self, index: int, model: ServedModel) -> None:
        self._index = index
        self._writer = CompletionLogprobsWriter(model.token_text, model.silent)
        self._logprobs: Logprobs = []  # of tokens that no chunk was made of yet

    def begin(self) -> list[TextChoice]:
        return []

    def news(self, delta: Delta) -> list[TextChoice]:
        self._logprobs += delta.logprobs or ()
        return [self._choice(delta.text)] if delta.text else []

    def end(self, completion: Completion) -> list[TextChoice]:
        last = self._choice("")
        last.finish_reason = "length" if completion.finish_reason == "length" else "stop"
        return [last]

    def whole(self, completion: Completion) -> TextChoice:
        self._logprobs = completion.logprobs or []
        choice = self._choice(completion.text)
        choice.finish_reason = "length" if completion.finish_reason == "length" else "stop"
        return choice

    def _choice(self, text: str) -> TextChoice:
        logprobs = self._writer.write(self._logprobs) if self._logprobs else None
        self._logprobs = []
        return TextChoice(self._index, text, None, logprobs)
