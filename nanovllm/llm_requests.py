"""What `LLM.generate` asks for its prompts, and what it returns for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple, NotRequired, TypedDict

import msgspec

from nanovllm.client.requests import Prompt, params_of
from nanovllm.client.results import PendingRequest, RequestError, new_id
from nanovllm.protocol import FinishReason, Generate, Logprobs, PromptLogprobs, Sampling
from nanovllm.sampling_params import SamplingParams, following_seed
from nanovllm.wording import counted


class LLMOutput(TypedDict):
    """What `LLM.generate` returns for a prompt: a dict, ready for JSON.

    Its keys are `Completion`'s fields, its usage has the counts of `Usage`. `logprobs` and
    `prompt_logprobs` are there only if asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: dict[str, int]
    seed: int | None
    logprobs: NotRequired[Logprobs]
    prompt_logprobs: NotRequired[PromptLogprobs]


def as_list(prompts: str | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Iterable) or isinstance(prompts, bytes | Mapping):
        raise TypeError(f"prompts is a list of prompts, or one text, not {type(prompts).__name__}")
    return list(prompts)


class Ask(NamedTuple):
    """A request for the prompt with this index, or why there is none."""

    prompt: int
    message: Generate | RequestError


def asks_for(
    prompts: Sequence[Prompt],
    sampling_params: Any,
    ask: Callable[[Prompt, Sampling], Generate],
    return_errors: bool,
) -> list[Ask]:
    """The requests for all prompts, in order. A prompt that is not valid raises, or has an error in
    its place."""
    one_each = isinstance(sampling_params, Sequence) and not isinstance(sampling_params, str)
    params: Sequence[SamplingParams | None] = sampling_params if one_each else [sampling_params]
    if one_each and len(params) != len(prompts):
        raise ValueError(
            f"{counted(len(prompts), 'prompt')} but {len(params)} sampling_params: give one"
            " for each, or a single one for all"
        )
    samplings = [_one_by_one(params_of(one)) for one in params]
    if not one_each:
        samplings *= len(prompts)
    asks: list[Ask] = []
    for index, (prompt, (first, *others)) in enumerate(zip(prompts, samplings, strict=True)):
        try:
            message = ask(prompt, first)
        except (TypeError, ValueError) as error:
            part = isinstance(prompt, Integral | Mapping)
            hint = "; one prompt alone goes into a list, too: [prompt]" * part
            reason = f"prompts[{index}]: {error}{hint}"
            if not return_errors:
                raise type(error)(reason) from None
            refused = Ask(index, RequestError("invalid_request", reason))
            asks += [refused] * (1 + len(others))
            continue
        asks.append(Ask(index, message))
        for sampling in others:
            copy = msgspec.structs.replace(message, id=new_id(), sampling=sampling)
            asks.append(Ask(index, copy))
    return asks


def _one_by_one(params: SamplingParams) -> list[Sampling]:
    """The parameters of the requests for the n outputs of one prompt."""
    sampling = params.to_wire()
    return [sampling] + [
        msgspec.structs.replace(sampling, seed=following_seed(sampling.seed, i))
        for i in range(1, params.n)
    ]


def output_of(request: PendingRequest, index: int) -> LLMOutput | RequestError:
    """What to return for prompt `index`; raises what concerns all prompts."""
    try:
        completion = request.result()
    except RequestError as error:
        return RequestError(error.code, f"prompts[{index}]: {error.message}")
    usage = completion.usage
    output = LLMOutput(
        text=completion.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        usage={
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "cached_tokens": usage.cached_tokens,
        },
        seed=completion.seed,
    )
    if completion.logprobs is not None:
        output["logprobs"] = completion.logprobs
    if completion.prompt_logprobs is not None:
        output["prompt_logprobs"] = completion.prompt_logprobs
    return output
