"""`nanovllm bench`: the command's options."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from nanovllm.api_keys import API_KEY_VARIABLE, api_keys
from nanovllm.bench.work import MAX_LENGTH, Lengths, Work
from nanovllm.client.terminal import told_in_one_line
from nanovllm.client.where import Where, pipeline_options

if TYPE_CHECKING:
    from nanovllm.bench.target import Target

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
        if lengths.high > MAX_LENGTH:
            self.fail(f"{value!r}: give at most {MAX_LENGTH}", param, ctx)
        return lengths


class _Finite(click.FloatRange):
    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


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
      nanovllm bench --http --concurrency 64
      nanovllm bench --http http://gpu:8000/v1 --prompts chats.jsonl
    """,
    short_help="Load a running pipeline, and measure it.",
)
@pipeline_options
@click.option(
    "--http",
    is_flag=False,
    flag_value="",
    metavar="[URL]",
    help="Load the pipeline's HTTP servers, or any server of OpenAI's API: its base URL.",
)
@click.option(
    "--model",
    show_default="the first that the server lists",
    help="The model to ask for over HTTP.",
)
@click.option(
    "--api-key-file",
    default="",
    help=f"File whose first key is sent over HTTP; else the first of {API_KEY_VARIABLE}.",
)
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    show_default=str(DEFAULT_CONCURRENCY),
    help="So many conversations at any time: as one ends, the next begins.",
)
@click.option(
    "--rate",
    type=_Finite(0, min_open=True),
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
    type=_Finite(0, min_open=True),
    help="Measure what is sent in so many seconds, and wait for its answers.",
)
@click.option(
    "--warm-up",
    type=_Finite(0),
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
    type=click.IntRange(0, MAX_LENGTH),
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
    type=click.IntRange(0),
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
    http: str | None,
    model: str | None,
    api_key_file: str,
    json_path: Path | None,
    plot_path: Path | None,
    **options: Any,
) -> None:
    chosen = [f"--{name}" for name in ("concurrency", "rate", "trace") if options[name]]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(chosen)} exclude one another: give one")
    if options["prompts"]:
        source = click.get_current_context().get_parameter_source
        for name in ("input", "shared_prefix", "prefixes"):
            if source(name) is ParameterSource.COMMANDLINE:
                option = name.replace("_", "-")
                raise click.UsageError(f"--{option} is for random prompts: not with --prompts")
    if options["prefixes"] > 1 and not options["shared_prefix"]:
        raise click.UsageError("--prefixes needs --shared-prefix")
    if not chosen:
        options["concurrency"] = DEFAULT_CONCURRENCY
    if options["warm_up"] is None:
        options["warm_up"] = 0.0 if options["trace"] else DEFAULT_WARM_UP_S
    if options["ignore_eos"] is None:
        options["ignore_eos"] = options["prompts"] is None
    if options["requests"] is None and options["seconds"] is None and not options["trace"]:
        options["requests"] = DEFAULT_REQUESTS
    if http is None and (model or api_key_file):
        raise click.UsageError("--model and --api-key-file go with --http")
    if http is not None and options["turns"] > 1 and options["prompts"] is None:
        raise click.UsageError(
            "--turns over HTTP needs --prompts with chats: the token ids of answers are not told"
        )
    with told_in_one_line():
        from nanovllm.bench.command import run  # takes a while: Ctrl-C may come
        from nanovllm.bench.target import http_target, socket_target

        def find() -> Target:
            if http is None:
                return socket_target(where)
            variable = "" if api_key_file else os.environ.get(API_KEY_VARIABLE, "")
            key = next(iter(api_keys(variable, api_key_file)), "")
            return http_target(where, http, key, model)

        run(find, Work(**options), json_path, plot_path)
