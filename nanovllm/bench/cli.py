"""`nanovllm bench`: the command's options."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from nanovllm.bench.work import Lengths, Work
from nanovllm.client.where import Where, pipeline_options
from nanovllm.sampling_params import SamplingParams

DEFAULT_REQUESTS: Final = 100
DEFAULT_CONCURRENCY: Final = 16
DEFAULT_WARM_UP_S: Final = 2.0


class _LengthsType(click.ParamType[Lengths]):
    """`512`, or `100:1024` for any length between the two."""

    name = "TOKENS"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Lengths:
        if isinstance(value, Lengths):
            return value
        low, _, high = str(value).partition(":")
        try:
            lengths = Lengths(int(low), int(high or low))
        except ValueError:
            self.fail(f"{value!r} is neither TOKENS nor SHORTEST:LONGEST", param, ctx)
        if not 1 <= lengths.low <= lengths.high:
            self.fail(f"{value!r}: give at least 1, and the shorter one first", param, ctx)
        return lengths


@click.command(
    help="""Load a running pipeline, and measure what its clients see.

    Requests arrive as others end (--concurrency), at random times whatever the pipeline does
    (--rate), or as a file says (--trace). Prompts are random token ids, or come from a file:
    ShareGPT's JSON, or JSON lines with "prompt" or "messages".

    Times count from when a request was due. The warm-up is not measured. Ctrl-C ends the run, and
    shows what there is.

    \b
    Examples:
      nanovllm bench --concurrency 64 --input 100:1024 --output 100:1024
      nanovllm bench --rate 5 --seconds 60 --prompts sharegpt.json
      nanovllm bench --trace arrivals.jsonl --json run.json --plot run.png
    """,
    short_help="Load a running pipeline, and measure it.",
)
@pipeline_options
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    show_default=str(DEFAULT_CONCURRENCY),
    help="So many conversations at any time: as one ends, the next begins.",
)
@click.option(
    "--rate",
    type=click.FloatRange(0, min_open=True),
    help="Conversations a second on average, at random times (Poisson), never held back.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help='Arrivals as JSON lines: "at_s" or "timestamp" in seconds; "input" and "output" lengths.',
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    show_default=f"all of the trace, or {DEFAULT_REQUESTS}, unless --seconds says",
    help="Measure so many conversations, of one request each unless there are --turns.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    help="Measure what is sent in so many seconds, and wait for its answers.",
)
@click.option(
    "--warm-up",
    type=click.FloatRange(0),
    show_default=f"{DEFAULT_WARM_UP_S:g}, and 0 for a trace",
    help="The first seconds of the load are not measured.",
)
@click.option("--prompts", type=click.Path(path_type=Path), help="Prompts, instead of random ids.")
@click.option(
    "--input",
    type=_LengthsType(),
    default="512",
    show_default=True,
    help="Tokens that a turn adds to random prompts; SHORTEST:LONGEST draws.",
)
@click.option(
    "--output",
    type=_LengthsType(),
    default="128",
    show_default=True,
    help="Output tokens at most; with random prompts exactly.",
)
@click.option(
    "--shared-prefix",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Tokens in front of each random conversation that others begin with too.",
)
@click.option(
    "--prefixes",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="How many different shared prefixes there are.",
)
@click.option(
    "--turns",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Requests of a conversation, each after the answer to the one before; at most.",
)
@click.option("--temperature", default=0.6, show_default=True, help="0 is greedy.")
@click.option("--top-p", default=1.0, show_default=True)
@click.option("--top-k", default=0, show_default=True, help="0 is off.")
@click.option("--min-p", default=0.0, show_default=True)
@click.option(
    "--ignore-eos/--no-ignore-eos",
    default=None,
    show_default="only with random prompts",
    help="Go on after an end-of-sequence token.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="The same seed sends the same requests, at the same times unless by --concurrency.",
)
@click.option(
    "--json",
    "json_path",
    type=click.Path(path_type=Path),
    help="Write all figures, settings, and every request, as JSON.",
)
@click.option(
    "--plot",
    "plot_path",
    type=click.Path(path_type=Path),
    help="Draw latencies and throughput over time (needs matplotlib: nanovllm[plot]).",
)
def bench(
    where: Where,
    json_path: Path | None,
    plot_path: Path | None,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    ignore_eos: bool | None,
    **options: Any,
) -> None:
    from nanovllm.bench.command import run
    from nanovllm.client.cli import told_in_one_line

    chosen = [f"--{name}" for name in ("concurrency", "rate", "trace") if options[name]]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(chosen)} exclude one another: give one")
    if not chosen:
        options["concurrency"] = DEFAULT_CONCURRENCY
    if options["warm_up"] is None:
        options["warm_up"] = 0.0 if options["trace"] else DEFAULT_WARM_UP_S
    if options["requests"] is None and options["seconds"] is None and not options["trace"]:
        options["requests"] = DEFAULT_REQUESTS
    with told_in_one_line():
        sampling = SamplingParams(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            ignore_eos=options["prompts"] is None if ignore_eos is None else ignore_eos,
        )
        run(where, Work(sampling=sampling.to_wire(), **options), json_path, plot_path)
