"""`SamplingParams`: how the tokens of a request are drawn."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from nanovllm.plain import plain, sendable
from nanovllm.protocol import Sampling, StructuredOutputs
from nanovllm.wording import key_and_reason


def following_seed(seed: int | None, index: int) -> int | None:
    """The seed `index` after this one, as an int64: after the largest comes the smallest."""
    return None if seed is None else (seed + index + 2**63) % 2**64 - 2**63


@dataclass(slots=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when its output ends.

    The first three keep nano-vLLM's positional order. Ranges are the protocol's. Scalars and
    arrays of numpy are taken for the values that they hold.

    Attributes:
        temperature: 0 to 10; 0 is greedy.
        max_tokens: output tokens at most; cut to what fits the model's length. None: the default.
        ignore_eos: go on after an end-of-sequence token.
        top_p: only the likeliest tokens that together have this probability.
        top_k: only the k likeliest tokens; 0 is off.
        min_p: only tokens at least this likely, relative to the likeliest.
        stop: up to 16 strings of at most 256 characters, any of which ends the output; the text
            ends before it.
        stop_token_ids: token ids that end the output.
        seed: makes the output repeatable; None draws one.
        logprobs: how many of the likeliest tokens to report beside each chosen one, 0 to 20;
            None reports nothing.
        prompt_logprobs: as many of the likeliest tokens to report beside each prompt token, 0 to
            20; None reports nothing.
        repetition_penalty: 0.01 to 10; logits of tokens in prompt or output are divided by it
            if they are positive, else multiplied. 1 is off.
        frequency_penalty: -2 to 2; subtracted from the logit of a token for each time that the
            token is in the output.
        presence_penalty: -2 to 2; subtracted from the logits of tokens that are in the output.
        logit_bias: of up to 300 token ids, what is added to their logits: -100 to 100.
        min_tokens: the output ends by no end-of-sequence token, stop token or stop string among so
            many tokens.
        bad_words: up to 64 words, or lists of up to 16 token ids, that do not come in the output.
            A word stands for two lists: its tokens at a line's begin, and its tokens after a space.
            The same letters may come as other tokens.
        allowed_token_ids: no other tokens come.
        include_stop_str_in_output: the text ends behind the stop string, not before it.
        skip_special_tokens: special tokens add nothing to the text.
        structured_outputs: what the whole answer must be, in a dict (or `StructuredOutputs`) of one
            key: {"json_schema": …} with a schema as a dict or as JSON text, {"json_object": True},
            {"regex": "…"}, {"choice": ["…", "…"]}, or {"grammar": "…"} in llguidance's Lark.
        n: how many outputs `LLM.generate` gives for a prompt: as many requests, with the seeds
            seed, seed + 1, …. Other clients ask n times.

    Raises:
        ValueError: a value of the wrong type or out of range; the message names it.
    """

    temperature: float = 1.0
    max_tokens: int | None = 64
    ignore_eos: bool = False
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop: str | Sequence[str] | None = ()
    stop_token_ids: Sequence[int] | None = ()
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    min_tokens: int = 0
    bad_words: Sequence[str | Sequence[int]] | None = ()
    allowed_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    structured_outputs: StructuredOutputs | Mapping[str, Any] | None = None
    n: int = 1

    def __post_init__(self) -> None:
        self.to_wire()

    def to_wire(self) -> Sampling:
        """The protocol's form.

        Raises:
            ValueError: as the constructor, for a field that was changed since.
        """
        given = {
            name: value
            for name, default in _DEFAULTS.items()
            if (value := getattr(self, name)) is not default
        }
        if type(n := sendable("n", given.pop("n", 1))) is not int or n < 1:
            raise ValueError(f"n={n!r}: a number of outputs, 1 or more")
        outputs = given.get("structured_outputs")
        if isinstance(outputs, Mapping) and isinstance(outputs.get("json_schema"), Mapping | bool):
            given["structured_outputs"] = {**outputs, "json_schema": _json(outputs["json_schema"])}
        values = {name: sendable(name, value) for name, value in given.items()}
        for name in ("max_tokens", "stop", "stop_token_ids", "bad_words"):
            if values.get(name, ()) is None:
                del values[name]
        if isinstance(stop := values.get("stop"), str):
            values["stop"] = [stop]
        for name, value in values.items():
            if isinstance(value, float) and math.isnan(value):
                raise ValueError(f"{name} is not a number")
        if type(max_tokens := values.get("max_tokens")) is int:
            # The pipeline cuts `max_tokens` to the model's length; no model is as long as this.
            values["max_tokens"] = min(max_tokens, 2**31 - 1)
        try:
            return msgspec.convert(values, Sampling)
        except msgspec.ValidationError as error:
            key, reason = key_and_reason(error)
            name = re.split(r"[.\[]", key)[0]
            raise ValueError(f"{name}={given[name]!r}: {reason}") from None


def _json(schema: Any) -> str:
    """The schema as JSON. Raises ValueError if it cannot be written as JSON."""
    try:
        return msgspec.json.encode(plain(schema)).decode()
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"structured_outputs: json_schema cannot be written as JSON: {error}"
        raise ValueError(reason) from None


# The protocol has the same defaults, so a value that is its default is not converted.
_DEFAULTS = {field.name: field.default for field in fields(SamplingParams)}
