"""What a run sends: its options, as `--json` tells them."""

from __future__ import annotations

from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from nanovllm.protocol import Sampling
from nanovllm.sampling_params import SamplingParams

# Of a prompt or an output, in tokens: far more than any model's context.
MAX_LENGTH: Final = 10_000_000


class Lengths(NamedTuple):
    """From `low` to `high` tokens, any length as likely as any other."""

    low: int
    high: int


class Work(msgspec.Struct, kw_only=True):
    """The options of `nanovllm bench` that say what is sent, by their names."""

    concurrency: int | None
    rate: float | None
    trace: Path | None
    requests: int | None
    seconds: float | None
    warm_up: float
    prompts: Path | None
    input: Lengths
    output: Lengths
    shared_prefix: int
    prefixes: int
    turns: int
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    ignore_eos: bool

    @property
    def sampling(self) -> Sampling:
        """Raises ValueError if a value is out of its range."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            ignore_eos=self.ignore_eos,
        ).to_wire()
