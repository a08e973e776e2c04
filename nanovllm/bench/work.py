"""What a run sends: its options, as `--json` tells them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from nanovllm.protocol import Sampling


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
    sampling: Sampling
