"""One run of `nanovllm bench`, from the person's files to the figures."""

from __future__ import annotations

import contextlib
import math
import os
import platform
import secrets
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import click
import msgspec

from nanovllm import __version__
from nanovllm.bench.arrivals import Arrival, Arrivals, Concurrency, Poisson, Trace, read_trace
from nanovllm.bench.load import Load, Record
from nanovllm.bench.plot import check_plot, plot
from nanovllm.bench.prompts import (
    Conversation,
    Prompt,
    Shape,
    file_conversations,
    random_conversations,
    read_prompts,
)
from nanovllm.bench.report import Detail, Report, details, report
from nanovllm.bench.run import drive
from nanovllm.bench.show import Watch, print_report
from nanovllm.bench.target import Target
from nanovllm.bench.work import Work
from nanovllm.client.results import PipelineUnavailable, RequestError
from nanovllm.protocol import Sampling


class Document(msgspec.Struct):
    """What `--json` writes; of the server, as in `Target`."""

    version: str
    server_version: str | None
    model: str
    endpoint: str
    device: str | None
    machine: str
    began_at: str
    work: Work
    report: Report
    requests: list[Detail]


def run(
    find: Callable[[], Target], work: Work, json_path: Path | None, plot_path: Path | None
) -> None:
    """The whole command.

    Args:
        find: waits for what is to be loaded; called once the files are read.

    Raises:
        KeyboardInterrupt, PipelineUnavailable, RequestError: what ended the run before it was over,
            after what there is has been shown and written.
        ValueError: a file or an option is not what it should be.
        click.ClickException: no request succeeded.
    """
    sampling = work.sampling
    for path in filter(None, (json_path, plot_path)):
        _check_writable(path)
    if plot_path is not None:
        check_plot(plot_path)
    prompts = None if work.prompts is None else read_prompts(work.prompts)
    trace = None if work.trace is None else read_trace(work.trace)
    target = find()
    began_at = datetime.now(UTC).isoformat(timespec="seconds")
    run = _measure(work, sampling, target, prompts, trace)

    head = f"{target.model} at {target.name}" + (f", {target.device}" if target.device else "")
    # One of the three may fail, as where nobody reads the table: the others are there nevertheless.
    with contextlib.ExitStack() as after:
        if plot_path is not None:
            after.callback(_write, plot_path, lambda path: plot(run.records, path, head))
        if json_path is not None:
            document = Document(
                version=__version__,
                server_version=target.version,
                model=target.model,
                endpoint=target.name,
                device=target.device,
                machine=f"{platform.node()}, {os.cpu_count()} CPU cores",
                began_at=began_at,
                work=work,
                report=run.report,
                requests=details(run.records),
            )
            after.callback(_write, json_path, lambda path: path.write_bytes(_encoded(document)))
        print_report(run.report, head)
        for warning in run.report.generator.warnings:
            click.echo(f"Warning: {warning}.", err=True)
    if run.failure is not None:
        raise run.failure
    if run.report.requests.errors and not run.report.requests.finished:
        first = next(record for record in run.records if record.error is not None)
        raise click.ClickException(f"no request succeeded: {first.error}: {first.message}")


class _Run(NamedTuple):
    """`failure`: why the run ended before it was over."""

    report: Report
    records: list[Record]
    failure: KeyboardInterrupt | PipelineUnavailable | RequestError | None


def _measure(
    work: Work,
    sampling: Sampling,
    target: Target,
    prompts: list[list[Prompt]] | None,
    trace: list[Arrival] | None,
) -> _Run:
    requests, seconds = work.requests, work.seconds or math.inf
    arrivals: Arrivals
    if trace is not None:
        traced = sum(arrival.at_s >= work.warm_up for arrival in trace)
        if not traced:
            raise ValueError(f"--warm-up {work.warm_up:g} is longer than the whole trace")
        requests = min(traced, requests or traced)
        arrivals = Trace(trace, -work.warm_up)
    elif work.rate is not None:
        arrivals = Poisson(work.rate, -work.warm_up, work.seed)
    else:
        arrivals = Concurrency(work.concurrency or 1)
    failure = None
    with target.connect() as client:
        load = Load(
            arrivals,
            _conversations(work, sampling, prompts, trace, work.seed),
            time.monotonic() + work.warm_up,
            # So that what is measured does not depend on how much the warm-up has sent.
            warm_up=_conversations(work, sampling, prompts, None, work.seed + 1)
            if trace is None
            else None,
            requests=requests,
            seconds=seconds,
            salt=secrets.token_hex(8),
        )
        with Watch(load, requests, seconds) as watch:
            try:
                drive(load, client, tick=watch.tick)
            except (KeyboardInterrupt, PipelineUnavailable, RequestError) as error:
                failure = error
    figures = report(
        load.records,
        watch.used,
        time.monotonic() - load.begins_at,
        seconds,
        interrupted=failure is not None,
    )
    return _Run(figures, load.records, failure)


def _conversations(
    work: Work,
    sampling: Sampling,
    prompts: list[list[Prompt]] | None,
    trace: list[Arrival] | None,
    seed: int,
) -> Iterator[Conversation]:
    if prompts is not None:
        return file_conversations(prompts, seed, work.turns, work.output, sampling, trace)
    shape = Shape(work.input, work.output, work.shared_prefix, work.prefixes, work.turns)
    return random_conversations(seed, shape, sampling, trace)


def _encoded(document: Document) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document, enc_hook=str)) + b"\n"


def _write(path: Path, write: Callable[[Path], object]) -> None:
    try:
        write(path)
    except OSError as error:
        raise click.ClickException(f"cannot write {path}: {error.strerror}") from None


def _check_writable(path: Path) -> None:
    """Before the run, which may be long."""
    target = path if path.exists() else path.absolute().parent
    if path.is_dir() or not target.exists() or not os.access(target, os.W_OK):
        raise ValueError(f"cannot write {path}")
