"""nano-vLLM's offline benchmark through the whole pipeline: random prompts, random lengths.

    python -m benchmarks.offline --random-weights benchmarks/shapes/qwen3-0.6b.json
    python -m benchmarks.offline /path/to/checkpoint --num-seqs 16 --max-input 64 --max-output 64
    python -m benchmarks.offline /path/to/checkpoint --num-seqs 1024 --engines 4

Prints one JSON line. `device_busy_decoding` has a share for each engine.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import click

from benchmarks.support.help import help_of
from benchmarks.support.pipeline import Pipeline, Reported
from benchmarks.support.random_model import checkpoint, random_weights_option
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import ModelConfig


@click.command(help=help_of(__doc__))
@click.argument("model", default="")
@random_weights_option
@click.option("--num-seqs", default=256, show_default=True)
@click.option("--min-input", default=100, show_default=True, help="Shortest prompt, in tokens.")
@click.option("--max-input", default=1024, show_default=True)
@click.option("--min-output", default=100, show_default=True)
@click.option("--max-output", default=1024, show_default=True)
@click.option("--temperature", default=0.6, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--tp", "tensor_parallel_size", default=1, show_default=True)
@click.option("--engines", default=1, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--dtype", default="auto", show_default=True)
@click.option("--max-model-len", default=4096, show_default=True)
def main(
    model: str,
    random_weights: Path | None,
    num_seqs: int,
    min_input: int,
    max_input: int,
    min_output: int,
    max_output: int,
    temperature: float,
    seed: int,
    tensor_parallel_size: int,
    engines: int,
    device: str,
    dtype: str,
    max_model_len: int,
) -> None:
    with checkpoint(model, random_weights) as directory:
        vocabulary = min(10_000, ModelConfig.from_checkpoint(directory).vocab_size - 1)
        draw = random.Random(seed)
        prompts = [
            [draw.randint(0, vocabulary) for _ in range(draw.randint(min_input, max_input))]
            for _ in range(num_seqs)
        ]
        sampling = [
            SamplingParams(
                temperature=temperature,
                ignore_eos=True,
                max_tokens=draw.randint(min_output, max_output),
            )
            for _ in range(num_seqs)
        ]
        arguments = f"--tp {tensor_parallel_size} --engines {engines}"
        arguments += f" --device {device} --dtype {dtype}"
        arguments += f" --max-model-len {max_model_len} --log-level warning"
        with (
            Pipeline(directory, *arguments.split()) as pipeline,
            LLM(endpoint=pipeline.endpoint) as llm,
        ):
            warm_up = prompts[: 2 * engines]
            llm.generate(warm_up, SamplingParams(max_tokens=4), use_tqdm=False)
            reports: list[list[Reported]] = []
            with pipeline.watched(reports):
                start = time.perf_counter()
                outputs = llm.generate(prompts, sampling)
                seconds = time.perf_counter() - start
    tokens = sum(len(output["token_ids"]) for output in outputs)
    click.echo(
        json.dumps(
            {
                "engines": engines,
                "sequences": num_seqs,
                "prompt_tokens": sum(len(prompt) for prompt in prompts),
                "output_tokens": tokens,
                "start_s": round(pipeline.start_s, 1),
                "seconds": round(seconds, 2),
                "output_tokens_per_s": round(tokens / seconds, 1),
                "device_busy_decoding": [
                    _busy_decoding(engine) for engine in zip(*reports, strict=True)
                ],
            }
        )
    )


def _busy_decoding(reports: Sequence[Reported]) -> float | None:
    """The share of the time for which an engine's device had work, once none of its requests waited
    to be admitted and until the first report of nobody running; None if that was over within a
    report."""
    decoding = [r for r in reports if r.scheduler.running and not r.scheduler.waiting]
    if len(decoding) < 2:
        return None
    first, last = decoding[0], decoding[-1]
    return round((last.worker.busy_s - first.worker.busy_s) / (last.at_s - first.at_s), 3)


if __name__ == "__main__":
    main()
