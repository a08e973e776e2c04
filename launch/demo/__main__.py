"""`make demo`: the pipeline on the demo checkpoint, watched while it answers."""

from __future__ import annotations

import time

import click

from nanovllm import Client, SamplingParams
from nanovllm.client.answers import show
from nanovllm.client.control import Control
from nanovllm.client.private_pipeline import PrivatePipeline
from nanovllm.client.sync import Stream
from nanovllm.control import Status, WorkerStats
from nanovllm.progress import LoadingBar
from nanovllm.settings import Settings

STORY = "Once upon a time"
QUESTIONS = ("Tell me a story about a fox.", "Who lives in the harbour?")
TOOL_QUESTION = "What is the weather in Bern?"
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}
# Streams at the same time, to see them batched.
CROWD = 32
# The longest bar, in characters.
BAR = 30


@click.command(help=__doc__)
def main() -> None:
    click.echo("The demo model is tiny: its stories wander, and a chat does after a turn or two.")
    click.echo("Launching ingress, tokenizer, scheduler, gpu_worker and detokenizer …")
    pipeline = PrivatePipeline(Settings(ingress="", log_level="warning"))
    try:
        _watch_start(pipeline)
        with Client(pipeline.endpoint, timeout=60) as client:
            pipeline.wait_until_ready(client)
            with Control(pipeline.runtime_dir) as control:
                before = _reported(control)
                _answer(client)
                _crowd(client)
                # Services report once a second.
                after = _reported(control, later_than=time.monotonic())
        _show_time(before, after)
        last = "To talk to it: `make serve`, and in another terminal `.venv/bin/nanovllm chat`."
    except KeyboardInterrupt:
        last = "Stopped."
    finally:
        pipeline.close()
    click.echo(f"\n{last}")


def _watch_start(pipeline: PrivatePipeline) -> None:
    """Returns when all services are ready."""
    with LoadingBar() as bar:
        while not (services := pipeline.services()) or any(s.state != "ready" for s in services):
            pipeline.check(launching=True)
            bar.show(services)
            time.sleep(0.1)


def _answer(client: Client) -> None:
    """Streams a continuation, answers to a few questions, and a tool call."""
    sampling = SamplingParams(temperature=0.6, max_tokens=250, seed=7)
    click.secho(f"\n{STORY}", bold=True, nl=False)
    _show(client.generate(STORY, sampling, stream=True))
    for question in QUESTIONS:
        click.secho(f"\n> {question}", bold=True)
        _show(client.chat(question, sampling, stream=True))
    click.secho(f"\n> {TOOL_QUESTION} (with the tool get_weather)", bold=True)
    _show(client.chat(TOOL_QUESTION, sampling, stream=True, tools=[TOOL]))


def _crowd(client: Client) -> None:
    """Many streams at the same time, on one socket."""
    start = time.perf_counter()
    streams = [
        client.generate(STORY, SamplingParams(temperature=1.0, max_tokens=100), stream=True)
        for _ in range(CROWD)
    ]
    tokens = sum(len(stream.result().token_ids) for stream in streams)
    seconds = time.perf_counter() - start
    click.echo(
        f"\n{CROWD} more stories at the same time: {tokens} tokens in {seconds:.1f} s,"
        f" {tokens / seconds:.0f} tokens/s"
    )


def _show(stream: Stream) -> None:
    """Raises KeyboardInterrupt if Ctrl-C stopped the answer."""
    if show(stream).completion is None:
        raise KeyboardInterrupt


def _reported(control: Control, later_than: float = 0.0) -> Status:
    """The status, once every service has reported later than that time."""
    while True:
        status = control.status()
        if all(service.stats and service.at_s > later_than for service in status.services):
            return status
        time.sleep(0.1)


def _show_time(before: Status, after: Status) -> None:
    click.echo("\nWhat each process did with its time:")
    for was, now in zip(before.services, after.services, strict=True):
        share = (now.cpu_s - was.cpu_s) / (now.at_s - was.at_s)
        bar = "█" * round(BAR * min(1.0, share))
        click.echo(f"  {f'{now.role} {now.index}':14} {share:5.0%} of a core  {bar}")
    was, now = (
        next(s for s in status.services if isinstance(s.stats, WorkerStats))
        for status in (before, after)
    )
    if isinstance(was.stats, WorkerStats) and isinstance(now.stats, WorkerStats):
        busy = (now.stats.busy_s - was.stats.busy_s) / (now.at_s - was.at_s)
        click.echo(f"  the device had work for {busy:.0%} of the time")


if __name__ == "__main__":
    main()
