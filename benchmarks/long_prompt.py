"""A long prompt arrives while others read their answers: what it waits, and what they do.

    python -m benchmarks.long_prompt --random-weights benchmarks/shapes/qwen3-0.6b.json

Prints one JSON line for each `--max-prefill-tokens`:

    first_token_ms    of the long prompt, from its sending
    longest_pause_ms  between two arrivals at one of the others, until then
    usual_pause_ms    the longest before it came
"""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import click

from benchmarks.decode import random_prompts
from benchmarks.support.help import help_of
from benchmarks.support.load import empty_load, run_for, run_until, send
from benchmarks.support.pipeline import Pipeline
from benchmarks.support.random_model import checkpoint, random_weights_option
from nanovllm.bench.client import SocketClient
from nanovllm.bench.load import Record
from nanovllm.checkpoint import ModelConfig
from nanovllm.protocol import Sampling

OTHERS_PROMPT = 256
BEFORE_S = 1.0


@click.command(help=help_of(__doc__))
@click.argument("model", default="")
@random_weights_option
@click.option("--others", default=128, show_default=True, help="Sequences that decode.")
@click.option("--input", "prompt_tokens", default=8000, show_default=True, help="Its length.")
@click.option(
    "--max-prefill-tokens",
    "budgets",
    type=int,
    multiple=True,
    default=(512, 2048, 8192),
    show_default=True,
)
@click.option("--device", default="auto", show_default=True)
def main(
    model: str,
    random_weights: Path | None,
    others: int,
    prompt_tokens: int,
    budgets: tuple[int, ...],
    device: str,
) -> None:
    with checkpoint(model, random_weights) as directory:
        config = ModelConfig.from_checkpoint(directory)
        if 2 * prompt_tokens > config.max_position_embeddings:
            raise click.ClickException(
                f"--input {prompt_tokens} is more than half of the {config.max_position_embeddings}"
                " tokens of this model's context: lower it, or take --random-weights"
            )
        prompts = random_prompts(others, OTHERS_PROMPT)
        *_, long_prompt, warm_up = random_prompts(others + 2, prompt_tokens)
        for budget in budgets:
            arguments = f"--device {device} --max-model-len {2 * prompt_tokens}"
            arguments += f" --max-prefill-tokens {budget} --log-level warning"
            with Pipeline(directory, *arguments.split()) as pipeline:
                _intrude(pipeline, prompts, warm_up)
                figures = _intrude(pipeline, prompts, long_prompt)
            click.echo(json.dumps({"max_prefill_tokens": budget, "others": others, **figures}))


def _intrude(
    pipeline: Pipeline, prompts: list[list[int]], long_prompt: list[int]
) -> dict[str, float]:
    load = empty_load()
    with SocketClient(pipeline.endpoint) as client:
        sampling = Sampling(ignore_eos=True, max_tokens=2 * len(long_prompt))
        others = send(load, client, prompts, sampling)
        run_until(load, client, lambda: all(record.arrived_s for record in others))
        begun_s = time.monotonic() - load.begins_at
        run_for(load, client, BEFORE_S)
        (intruder,) = send(load, client, [long_prompt], Sampling(ignore_eos=True, max_tokens=2))
        run_until(load, client, lambda: bool(intruder.arrived_s))
    sent_s, first_s = intruder.sent_s, intruder.arrived_s[0]
    while pipeline.settled().scheduler.records:
        continue
    return {
        "first_token_ms": round((first_s - sent_s) * 1000, 1),
        "longest_pause_ms": _longest_pause_ms(others, sent_s, first_s),
        "usual_pause_ms": _longest_pause_ms(others, begun_s, sent_s),
    }


def _longest_pause_ms(records: list[Record], start_s: float, end_s: float) -> float:
    pauses = [
        after - before
        for record in records
        for before, after in pairwise(record.arrived_s)
        if after > start_s and before < end_s
    ]
    return round(max(pauses) * 1000, 1)


if __name__ == "__main__":
    main()
