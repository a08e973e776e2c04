"""From what an HTTP client asks to the pipeline's requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Final, TypeVar

import msgspec
from msgspec import Meta

from nanovllm.protocol import (
    BadWords,
    Generate,
    Int64,
    LogitBias,
    MinTokens,
    NonEmptyStr,
    Penalty,
    RepetitionPenalty,
    Sampling,
    StopString,
    TokenId,
    TokenIds,
)
from nanovllm.sampling_params import following_seed
from nanovllm.services.http.context import DoorContext, ServedModel
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.parsing import Keys

T = TypeVar("T")

# An HTTP request for several outputs gets so many log-probabilities of prompts at most: the server
# holds them all at once, at about 100 bytes each.
MAX_PROMPT_LOGPROBS: Final = 4 << 20


StopStrings = Annotated[list[StopString], Meta(max_length=16)]


class DrawKeys(Keys, kw_only=True):
    """The keys of every request for output."""

    model: str
    stream: bool | None = None
    temperature: Annotated[float, Meta(ge=0, le=10)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Int64 | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: LogitBias | None = None
    min_tokens: MinTokens | None = None
    bad_words: BadWords | None = None
    allowed_token_ids: TokenIds | None = None
    skip_special_tokens: bool | None = None
    cache_salt: NonEmptyStr | None = None


def sampling(ask: DrawKeys, model: ServedModel, max_tokens: int | None) -> Sampling:
    """How to sample: as the request says, else the model's defaults, else the protocol's.

    Args:
        max_tokens: None for as many as fit.
    """
    defaults, own = model.defaults, Sampling()
    top_k = None if ask.top_k is None else max(ask.top_k, 0)  # -1 is off, too
    return Sampling(
        temperature=_first(ask.temperature, defaults.temperature, own.temperature),
        top_p=_first(ask.top_p, defaults.top_p, own.top_p),
        top_k=_first(top_k, defaults.top_k, own.top_k),
        min_p=_first(ask.min_p, defaults.min_p, own.min_p),
        # The pipeline cuts `max_tokens` to what fits. MessagePack has no larger numbers.
        max_tokens=min(max_tokens or model.max_model_len, 2**31 - 1),
        stop_token_ids=ask.stop_token_ids or [],
        ignore_eos=bool(ask.ignore_eos),
        seed=ask.seed,
        repetition_penalty=_first(
            ask.repetition_penalty, defaults.repetition_penalty, own.repetition_penalty
        ),
        frequency_penalty=ask.frequency_penalty or 0.0,
        presence_penalty=ask.presence_penalty or 0.0,
        logit_bias=ask.logit_bias or {},
        min_tokens=ask.min_tokens or 0,
        bad_words=ask.bad_words or [],
        allowed_token_ids=ask.allowed_token_ids,
        skip_special_tokens=_first(ask.skip_special_tokens, None, own.skip_special_tokens),
    )


def copies(
    context: DoorContext, messages: Sequence[Generate], count: int, body: bytes
) -> list[Generate]:
    """`count` requests for each message, with ids of their own and seeds seed, seed + 1, …

    Args:
        body: what the HTTP client has sent. The prompts have no more tokens than this has bytes.

    Raises ApiError if together they ask for too many log-probabilities of prompts.
    """
    likeliest = messages[0].sampling.prompt_logprobs
    if likeliest is not None and len(messages) * count > 1:
        tokens = count * min(len(body), len(messages) * context.model.max_model_len)
        if tokens * (1 + likeliest) > MAX_PROMPT_LOGPROBS:
            raise ApiError(
                400,
                "prompt_logprobs: too many at once, of all prompts and choices; ask for fewer"
                " likeliest tokens, or in several requests",
                "prompt_logprobs",
            )
    return [
        msgspec.structs.replace(
            message,
            id=context.client.new_id(),
            sampling=msgspec.structs.replace(
                message.sampling, seed=following_seed(message.sampling.seed, index)
            ),
        )
        for message in messages
        for index in range(count)
    ]


def _first(asked: T | None, default: T | None, own: T) -> T:
    return asked if asked is not None else default if default is not None else own
