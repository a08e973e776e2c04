"""What the pipeline costs: its rate over that of its model runner alone, in a bare loop.

    python -m benchmarks.tax

Both generate for the same sequences, in turns: a round of the pipeline, a round of the loop, and
so on, each pair of rounds with prompts of its own. The loop runs in this process, without a link,
a scheduler or text: it hands plans to the executor that the worker has, under the same budgets and
with as many threads. Prints one JSON line, of medians over the rounds but for the first, which
warms up:

    ratio           the pipeline's rate over the loop's; `ratios` has each round's
    tokens_per_s    output tokens, over the time from the first request to the last output
    steps           a round
    device_busy     share of the pipeline's time for which its device had work
"""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import statistics
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import msgspec

from benchmarks.support.help import help_of
from benchmarks.support.pipeline import Pipeline
from benchmarks.support.random_model import checkpoint, random_weights_option
from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import ModelConfig, resolve_model
from nanovllm.messages import Admission, StepPlan, pack
from nanovllm.protocol import Sampling
from nanovllm.service import settled
from nanovllm.services.gpu_worker.loop import spin_briefly
from nanovllm.settings import Settings, flag

if TYPE_CHECKING:
    from nanovllm.services.gpu_worker.results import PendingResult

Prompts = list[list[int]]


class Work(NamedTuple):
    """What a round generates."""

    sequences: int
    prompt_tokens: int
    output_tokens: int
    temperature: float

    def prompts(self, seed: int, vocab_size: int) -> Prompts:
        draw = random.Random(seed)
        return [
            draw.choices(range(vocab_size), k=self.prompt_tokens) for _ in range(self.sequences)
        ]

    def blocks_each(self, block_size: int) -> int:
        return -(-(self.prompt_tokens + self.output_tokens) // block_size)


class Round(NamedTuple):
    """What a round took; `busy_s` is the device's part of it."""

    seconds: float
    steps: int
    busy_s: float


@click.command(help=help_of(__doc__))
@click.argument("model", default="")
@random_weights_option
@click.option("--num-seqs", type=click.IntRange(1, 512), default=64, show_default=True)
@click.option("--input", "prompt_tokens", default=64, show_default=True, help="Prompt tokens each.")
@click.option("--output", "output_tokens", default=128, show_default=True)
@click.option("--temperature", default=0.6, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto")
def main(
    model: str,
    random_weights: Path | None,
    num_seqs: int,
    prompt_tokens: int,
    output_tokens: int,
    temperature: float,
    rounds: int,
    device: str,
) -> None:
    work = Work(num_seqs, prompt_tokens, output_tokens, temperature)
    with checkpoint(model, random_weights) as directory:
        config = ModelConfig.from_checkpoint(directory)
        options = {
            "device": device,
            "max_model_len": prompt_tokens + output_tokens,
            # Twice what they take, so that none waits for a block.
            "num_kvcache_blocks": 2 * num_seqs * work.blocks_each(Settings().kvcache_block_size),
            "log_level": "warning",
        }
        settings = msgspec.convert({"model": str(directory), **options}, Settings)
        arguments = [word for name, value in options.items() for word in (flag(name), str(value))]
        bare = BareLoop(settled(settings, directory, config), config)
        piped_rounds, bare_rounds = [], []
        with (
            Pipeline(directory, *arguments) as pipeline,
            contextlib.closing(Piped(pipeline)) as piped,
        ):
            for number in range(rounds + 1):
                prompts = work.prompts(number, config.vocab_size)
                piped_rounds.append(piped.run(prompts, work))
                bare_rounds.append(bare.run(prompts, work))
    click.echo(json.dumps(_figures(work, piped_rounds[1:], bare_rounds[1:])))


class Piped:
    """A pipeline, and one client of it."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._llm = LLM(endpoint=pipeline.endpoint)

    def run(self, prompts: Prompts, work: Work) -> Round:
        sampling = SamplingParams(
            temperature=work.temperature, max_tokens=work.output_tokens, ignore_eos=True
        )
        before = self._pipeline.settled().worker
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        if any(len(output["token_ids"]) != work.output_tokens for output in outputs):
            raise RuntimeError(f"an output has not {work.output_tokens} tokens")
        after = self._pipeline.settled().worker
        return Round(seconds, after.steps - before.steps, after.busy_s - before.busy_s)

    def close(self) -> None:
        self._llm.close()


class BareLoop:
    """The worker's executor, in this process."""

    def __init__(self, settings: Settings, config: ModelConfig) -> None:
        spin_briefly()
        from nanovllm.services.gpu_worker import startup
        from nanovllm.services.gpu_worker.model.parallel import TensorParallel

        directory = resolve_model(settings.model)
        device = startup.choose_device(settings, rank=0)
        self._executor, _ = startup.load(
            directory, config, settings, device, TensorParallel(), lambda *_: None
        )
        self._settings = settings

    def run(self, prompts: Prompts, work: Work) -> Round:
        in_flight: deque[PendingResult] = deque()
        steps = tokens = 0
        start = time.perf_counter()
        for plan in _plans(prompts, work, self._settings):
            in_flight.append(self._executor.step(plan))
            if len(in_flight) == self._settings.pipeline_depth:
                tokens += _count_tokens(in_flight.popleft())
            steps += 1
        tokens += sum(_count_tokens(pending) for pending in in_flight)
        seconds = time.perf_counter() - start
        self._executor.reset()
        if tokens != work.sequences * work.output_tokens:
            raise RuntimeError(f"{tokens} tokens were sampled")
        return Round(seconds, steps, seconds)


def _count_tokens(pending: PendingResult) -> int:
    pending.wait()
    return len(pending.result(0, 0).token_ids) // 4


def _plans(prompts: Prompts, work: Work, settings: Settings) -> Iterator[StepPlan]:
    """All plans of a round: decodes first, then prefill chunks, in the order of the prompts."""
    sampling = Sampling(temperature=work.temperature, seed=0)
    each = work.blocks_each(settings.kvcache_block_size)
    admit = [
        Admission(
            slot,
            pack(prompt),
            len(prompt),
            pack(range(slot * each, (slot + 1) * each)),
            0,
            sampling,
        )
        for slot, prompt in enumerate(prompts)
    ]
    computed = [0] * work.sequences
    left = [work.output_tokens] * work.sequences
    for number in itertools.count():
        decode = [s for s in range(work.sequences) if computed[s] == work.prompt_tokens and left[s]]
        budget = settings.max_num_batched_tokens - len(decode)
        if decode:
            budget = min(budget, settings.max_prefill_tokens)
        chunks = []
        for slot in range(work.sequences):
            length = min(budget, work.prompt_tokens - computed[slot])
            if length:
                chunks.append((slot, computed[slot], length))
                computed[slot] += length
                budget -= length
        if not decode and not chunks:
            return
        yield StepPlan(
            number=number,
            release=b"",
            admit=admit,
            append=b"",
            prefill=pack(itertools.chain.from_iterable(chunks)),
            decode=pack(decode),
        )
        admit = []
        for slot in decode:
            left[slot] -= 1
        for slot, _, _ in chunks:
            left[slot] -= computed[slot] == work.prompt_tokens


def _figures(work: Work, piped: list[Round], bare: list[Round]) -> dict[str, Any]:
    output_tokens = work.sequences * work.output_tokens

    def rate(rounds: list[Round]) -> float:
        return round(statistics.median(output_tokens / entry.seconds for entry in rounds), 1)

    def steps(rounds: list[Round]) -> int:
        return statistics.median_low(entry.steps for entry in rounds)

    ratios = [loop.seconds / pipeline.seconds for pipeline, loop in zip(piped, bare, strict=True)]
    return {
        **work._asdict(),
        "rounds": len(ratios),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "tokens_per_s": {"pipeline": rate(piped), "bare": rate(bare)},
        "steps": {"pipeline": steps(piped), "bare": steps(bare)},
        "device_busy": round(statistics.median(entry.busy_s / entry.seconds for entry in piped), 3),
    }


if __name__ == "__main__":
    main()
