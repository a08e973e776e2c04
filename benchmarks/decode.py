"""Decode steps through the whole pipeline, against the least that the memory allows.

    python -m benchmarks.decode --random-weights benchmarks/shapes/qwen3-0.6b.json
    python -m benchmarks.decode --random-weights benchmarks/shapes/qwen3-8b.json --tp 4 \\
        --input 128 --output 512 --num-seqs 64

For each number of sequences: all have a prompt of the same length and decode together, greedily or
not, and are measured once every one of them has begun. Needs a GPU for each rank. Prints one JSON
line each:

    step_ms        from one step's end to the next one's
    floor_ms       bytes of weights and of keys and values that a rank reads in a step, over the
                   bandwidth of a large copy on the device (bytes read and written), measured before
    ratio          of the two
    device_busy    share of the time for which the device had work, by its own clock

With --output all sequences run to their end, and step_ms is the whole time over --output: prefills
count, too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
from safetensors import safe_open

from benchmarks.support.bandwidth import copy_bandwidth
from benchmarks.support.help import help_of
from benchmarks.support.load import empty_load, run_for, run_until, send
from benchmarks.support.outputs import ENDLESS_JSON
from benchmarks.support.pipeline import Pipeline, Reported
from benchmarks.support.random_model import checkpoint, random_weights_option
from nanovllm.bench.client import SocketClient
from nanovllm.bench.prompts import random_ids
from nanovllm.bench.report import arrived
from nanovllm.checkpoint import DEMO_CHECKPOINT, ModelConfig
from nanovllm.client.control import NEXT_REPORT_S
from nanovllm.protocol import Sampling
from nanovllm.settings import Settings

BYTES_PER_VALUE = 2
BYTES_IN_FP8 = 1


@click.command(help=help_of(__doc__))
@click.argument("model", default="")
@random_weights_option
@click.option(
    "--num-seqs",
    "sizes",
    type=int,
    multiple=True,
    default=(1, 8, 32, 64, 128, 256, 512),
    show_default=True,
)
@click.option("--input", "prompt_tokens", default=1024, show_default=True, help="Prompt tokens.")
@click.option("--output", "output_tokens", type=int, help="Output tokens, run to the end.")
@click.option("--temperature", default=0.6, show_default=True)
@click.option("--top-k", default=0, show_default=True)
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--penalties", is_flag=True, help="All three penalties for every sequence.")
@click.option("--structured", is_flag=True, help="Every output is JSON of a schema.")
@click.option(
    "--tokenizer",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=DEMO_CHECKPOINT,
    help="Beside random weights: the directory of another tokenizer than the demo's.",
)
@click.option("--tp", "tensor_parallel_size", default=1, show_default=True)
@click.option("--seconds", default=1.0, show_default=True, help="Length of each measurement.")
@click.option("--attention", default="auto", show_default=True)
def main(
    model: str,
    random_weights: Path | None,
    sizes: tuple[int, ...],
    prompt_tokens: int,
    output_tokens: int | None,
    temperature: float,
    top_k: int,
    top_p: float,
    penalties: bool,
    structured: bool,
    tokenizer: Path,
    tensor_parallel_size: int,
    seconds: float,
    attention: str,
) -> None:
    bandwidth = copy_bandwidth()
    with checkpoint(model, random_weights, tokenizer) as directory:
        config = ModelConfig.from_checkpoint(directory)
        arguments = f"--device cuda --tp {tensor_parallel_size} --attention {attention}"
        arguments += " --log-level warning"
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            presence_penalty=0.1 * penalties,
            frequency_penalty=0.1 * penalties,
            repetition_penalty=1 + 0.1 * penalties,
            ignore_eos=not structured,
            max_tokens=output_tokens or Settings().max_model_len,
            structured_outputs=ENDLESS_JSON if structured else None,
        )
        weights = weight_bytes(directory, config)
        with Pipeline(directory, *arguments.split()) as pipeline:
            click.echo(
                json.dumps(
                    {"start_s": round(pipeline.start_s, 1), "copy_gb_per_s": round(bandwidth / 1e9)}
                )
            )
            for size in sizes:
                prompts = random_prompts(size, prompt_tokens)
                figures: dict[str, Any]
                if output_tokens is not None:
                    took_s = whole(pipeline, prompts, sampling)
                    figures = {
                        "output": output_tokens,
                        "step_ms": round(took_s / output_tokens * 1000, 3),
                        "tokens_per_s": round(size * output_tokens / took_s),
                    }
                else:
                    before, after, context = measure(pipeline, prompts, sampling, seconds)
                    read = weights + size * context * kv_bytes(config)
                    floor_s = read / tensor_parallel_size / bandwidth
                    figures = {
                        "mean_context": round(context),
                        **_figures(before, after, floor_s),
                    }
                click.echo(json.dumps({"sequences": size, **figures}))


def measure(
    pipeline: Pipeline, prompts: list[list[int]], sampling: Sampling, seconds: float
) -> tuple[Reported, Reported, float]:
    """Two reports while all of them decode, and the mean context between the two."""
    load = empty_load()
    with SocketClient(pipeline.endpoint) as client:
        records = send(load, client, prompts, sampling)
        run_until(load, client, lambda: all(record.arrived_s for record in records))
        run_for(load, client, NEXT_REPORT_S)
        before = pipeline.reported()
        run_for(load, client, seconds)
        after = pipeline.reported()
    middle_s = (before.at_s + after.at_s) / 2 - load.begins_at
    generated = np.count_nonzero(arrived(records) <= middle_s) / len(prompts)
    while pipeline.settled().scheduler.records:
        continue
    return before, after, len(prompts[0]) + generated


def whole(pipeline: Pipeline, prompts: list[list[int]], sampling: Sampling) -> float:
    """Seconds from the requests to the end of the last of them."""
    load = empty_load()
    with SocketClient(pipeline.endpoint) as client:
        records = send(load, client, prompts, sampling)
        run_until(load, client, lambda: all(record.ended_s is not None for record in records))
    return max(record.ended_s or 0.0 for record in records)


def random_prompts(count: int, length: int) -> list[list[int]]:
    draw = np.random.default_rng(0)
    return [random_ids(draw, length) for _ in range(count)]


def weight_bytes(directory: Path, config: ModelConfig) -> int:
    """Of the weights that a step reads whole: of the embedding it reads a row a token, unless it
    is the head as well."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118  # no mapping
                tensor = opened.get_slice(name)
                size = BYTES_IN_FP8 if tensor.get_dtype().startswith("F8") else BYTES_PER_VALUE
                if name != "model.embed_tokens.weight" or config.tie_word_embeddings:
                    total += size * math.prod(tensor.get_shape())
    return total


def kv_bytes(config: ModelConfig) -> int:
    """Of one token's keys and values."""
    values = config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return 2 * values * BYTES_PER_VALUE


def _figures(before: Reported, after: Reported, floor_s: float) -> dict[str, Any]:
    seconds = after.at_s - before.at_s
    steps = after.worker.steps - before.worker.steps
    step_s = seconds / steps
    return {
        "step_ms": round(step_s * 1000, 3),
        "floor_ms": round(floor_s * 1000, 3),
        "ratio": round(step_s / floor_s, 3),
        "device_busy": round((after.worker.busy_s - before.worker.busy_s) / seconds, 3),
        "tokens_per_s": round((after.scheduler.generated - before.scheduler.generated) / seconds),
    }


if __name__ == "__main__":
    main()
