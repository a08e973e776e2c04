"""nano-vLLM's offline benchmark through the whole pipeline: random prompts, random lengths.

python -m benchmarks.offline --random-weights qwen3-0.6b.json
python -m benchmarks.offline /path/to/checkpoint --num-seqs 16 --max-input 64 --max-output 64
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT, ModelConfig, resolve_model


@click.command(help=__doc__)
@click.argument("model", default="")
@click.option(
    "--random-weights",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A config.json: a model of this shape with random weights instead of MODEL.",
)
@click.option("--num-seqs", default=256, show_default=True)
@click.option("--min-input", default=100, show_default=True, help="Shortest prompt, in tokens.")
@click.option("--max-input", default=1024, show_default=True)
@click.option("--min-output", default=100, show_default=True)
@click.option("--max-output", default=1024, show_default=True)
@click.option("--temperature", default=0.6, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--tp", "tensor_parallel_size", default=1, show_default=True)
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
    device: str,
    dtype: str,
    max_model_len: int,
) -> None:
    with _checkpoint(model, random_weights) as directory:
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
        with LLM(
            str(directory),
            tensor_parallel_size=tensor_parallel_size,
            device=device,
            dtype=dtype,
            max_model_len=max_model_len,
        ) as llm:
            llm.generate(["warm-up"], SamplingParams(max_tokens=4), use_tqdm=False)
            start = time.perf_counter()
            outputs = llm.generate(prompts, sampling)
            seconds = time.perf_counter() - start
    tokens = sum(len(output["token_ids"]) for output in outputs)
    click.echo(
        json.dumps(
            {
                "sequences": num_seqs,
                "prompt_tokens": sum(len(prompt) for prompt in prompts),
                "output_tokens": tokens,
                "seconds": round(seconds, 2),
                "output_tokens_per_s": round(tokens / seconds, 1),
            }
        )
    )


@contextlib.contextmanager
def _checkpoint(model: str, config: Path | None) -> Iterator[Path]:
    if config is None:
        yield resolve_model(model)
        return
    with tempfile.TemporaryDirectory(prefix="nanovllm-random-") as directory:
        write_random_checkpoint(config, Path(directory))
        yield Path(directory)


def write_random_checkpoint(config: Path, directory: Path) -> None:
    """Writes a checkpoint of `config`'s shape: random bf16 weights, the demo's tokenizer."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = Qwen3Config.from_json_file(str(config))
    Qwen3ForCausalLM(shape).to(torch.bfloat16).save_pretrained(str(directory))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_CHECKPOINT / name, directory)


if __name__ == "__main__":
    main()
