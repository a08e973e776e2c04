"""`nanovllm-launch`: checks its options, and runs the pipeline."""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import shutil
import sys
import time
from collections.abc import Set
from functools import partial
from pathlib import Path
from typing import Any

import click

from nanovllm import __version__
from nanovllm.checkpoint import CheckpointError, ModelConfig, model_name, resolve_model
from nanovllm.exit_codes import EXIT_INTERRUPTED
from nanovllm.hints import LAUNCH_HINTS, HintingCommand
from nanovllm.keys import PipelineKeys
from nanovllm.launch.console import passed_on
from nanovllm.launch.gpus import Gpus
from nanovllm.launch.http import Listener
from nanovllm.launch.join import JoinedAnew, Membership, check_to_join, offer, settings_to_join
from nanovllm.launch.machines import Machines
from nanovllm.launch.notify import Notifier
from nanovllm.launch.runtime_dir import runtime_dir
from nanovllm.launch.supervisor import ServiceFailed, Supervisor
from nanovllm.log import EventFormatter
from nanovllm.options import config_option, given_options, settings_from, settings_options
from nanovllm.progress import LoadingBar
from nanovllm.service import LIFELINE_VARIABLE, settled
from nanovllm.settings import (
    DEFAULT_INGRESS,
    ENDPOINT_VARIABLE,
    RUNTIME_DIR_VARIABLE,
    Settings,
    SettingsError,
    default_runtime_dir,
)
from nanovllm.tracing import check_environment
from nanovllm.transport.curve import is_tcp
from nanovllm.transport.endpoints import EndpointUnusable, check_free, connectable, is_local
from nanovllm.wording import counted

log = logging.getLogger(__name__)

# They may name another pipeline to the commands that are proposed.
_VARIABLES = {ENDPOINT_VARIABLE, RUNTIME_DIR_VARIABLE}


@click.command(
    cls=HintingCommand,
    hints=LAUNCH_HINTS,
    help="""Serve a Qwen3 or Qwen2.5 model: ingress, tokenizers, scheduler, GPU workers,
    detokenizers and HTTP servers, each a process of its own.

    MODEL is a checkpoint directory or a hub id; without it a small demo model is served, which
    needs no GPU.

    Ctrl-C or SIGTERM lets unfinished requests finish, for --drain-timeout seconds at most; a second
    one ends everything at once.

    \b
    Examples:
      nanovllm-launch
      nanovllm serve                            (the same command)
      nanovllm-launch Qwen/Qwen3-0.6B --tp 2
      nanovllm-launch Qwen/Qwen3-0.6B --engines 4
      nanovllm-launch ./checkpoint --device cpu --max-model-len 2048
      nanovllm-launch --config pipeline.toml --log-level debug

    Services on other machines join a pipeline that says where, and take its options:

    \b
      nanovllm-launch Qwen/Qwen3-0.6B --services tcp://10.0.0.1:5600 --keys ./keys
      nanovllm-launch --join tcp://10.0.0.1:5600 --engines 2 --keys ./keys
    """,
    context_settings={"max_content_width": 100},
)
@click.version_option(__version__)
@click.argument("model", default="")
@config_option
@settings_options(without=("model",))
def main(model: str, **options: Any) -> None:
    options = {"model": model, **options}
    settings, given = settings_from(options), given_options(options).keys()
    lifeline = os.environ.pop(LIFELINE_VARIABLE, None)
    notifier = Notifier(os.environ)
    with passed_on():
        bar = LoadingBar()
        handler = _AboveTheBar(bar)
        handler.setFormatter(EventFormatter("supervisor", settings.log_format))
        logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
        try:
            owner = None if lifeline is None else int(lifeline)
            if settings.otlp:
                _check_opentelemetry()
            if settings.join:
                _join(settings, given, bar, notifier, owner)
            else:
                _launch(settings, bar, notifier, owner)
        except (CheckpointError, SettingsError, ServiceFailed, OSError) as error:
            if settings.log_format == "text":
                click.echo(f"nanovllm-launch: {error}", err=True)
            else:
                log.critical("%s", error)
            sys.exit(1)
        except KeyboardInterrupt:  # before the supervisor took over
            sys.exit(EXIT_INTERRUPTED)


def _check_opentelemetry() -> None:
    try:
        check_environment()
    except ValueError as error:
        raise SettingsError(f"--otlp: the environment of OpenTelemetry: {error}") from None


class _AboveTheBar(logging.Handler):
    def __init__(self, bar: LoadingBar) -> None:
        super().__init__()
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.write(self.format(record))


def _launch(asked: Settings, bar: LoadingBar, notifier: Notifier, lifeline: int | None) -> None:
    directory = resolve_model(asked.model)
    settings = _checked(asked, directory)
    name = model_name(directory)
    keys = PipelineKeys(settings.keys) if settings.keys else None
    for endpoint in filter(None, (settings.ingress, settings.services)):
        _warn_if_insecure(endpoint, keys)
    gpus = Gpus(settings)
    with runtime_dir(Path(settings.runtime_dir)), contextlib.ExitStack() as stack:
        _check_free("--ingress", settings.ingress)
        _check_free("--services", settings.services_beyond)
        listener = _listener(settings)
        machines = None
        if settings.services:
            try:
                told = offer(settings, asked.model, directory)
                machines = Machines(settings.services, told, keys)
            except EndpointUnusable as error:
                raise SettingsError(f"--services {error}") from None
            stack.callback(machines.close)
        announce = partial(_announce, settings, name, listener)
        Supervisor(
            *(settings, name, bar, gpus, listener, announce, notifier, lifeline), machines=machines
        ).run()


def _join(
    own: Settings, given: Set[str], bar: LoadingBar, notifier: Notifier, lifeline: int | None
) -> None:
    check_to_join(own, given)
    keys = PipelineKeys(own.keys) if own.keys else None
    _warn_if_insecure(own.join, keys)
    with (
        runtime_dir(Path(own.runtime_dir)),
        contextlib.closing(Membership(own.join, keys)) as membership,
    ):
        notifier.tell(time.monotonic(), f"waits for a pipeline at {own.join}")
        membership.join()
        listener = _listener(own)
        while True:
            settings, directory = settings_to_join(own, given, membership.joined)
            settings = _checked(settings, directory)
            name, gpus = model_name(directory), Gpus(settings)
            announce = partial(_announce_joined, settings, membership.joined.number, listener)
            try:
                Supervisor(
                    *(settings, name, bar, gpus, listener, announce, notifier, lifeline),
                    membership=membership,
                ).run()
            except JoinedAnew:
                log.warning("the pipeline is another one: services start anew")
            else:
                return


def _checked(settings: Settings, directory: Path) -> Settings:
    config = ModelConfig.from_checkpoint(directory, settings.quantization)
    if settings.device != "sim":
        config.check_tensor_parallel(settings.tensor_parallel_size)
    return settled(settings, directory, config)


def _listener(settings: Settings) -> Listener | None:
    return Listener(settings) if settings.http and settings.http_servers else None


def _warn_if_insecure(endpoint: str, keys: PipelineKeys | None) -> None:
    if keys is None and not is_local(endpoint):
        log.warning(
            "--insecure: whoever reaches %s may use the pipeline, and the network can read along",
            endpoint,
        )


def _check_free(option: str, endpoint: str) -> None:
    if endpoint:
        try:
            check_free(endpoint)
        except EndpointUnusable as error:
            raise SettingsError(f"{option} {error}") from None


def _announce(settings: Settings, name: str, listener: Listener | None) -> None:
    bound = settings.client_endpoints[0]
    endpoint = connectable(bound)
    where = ""
    by_keys = settings.keys and is_tcp(settings.ingress)  # this machine needs none
    if settings.runtime_dir != default_runtime_dir() or not settings.ingress or by_keys:
        where = f" --runtime-dir {shlex.quote(os.path.abspath(settings.runtime_dir))}"
    elif endpoint != DEFAULT_INGRESS or os.environ.keys() & _VARIABLES:
        where = f" --endpoint {shlex.quote(endpoint)}"
    nanovllm = _command()
    name = settings.served_model_name or name
    click.echo(f"nanovllm serves {name} at {bound}{f' and {listener.url}' if listener else ''}")
    if listener is not None:
        click.echo(f"open {listener.url} in a browser")
    click.echo(f"try:  {nanovllm} generate 'Once upon a time'{where}")
    click.echo(f"      {nanovllm} chat{where}")
    click.echo(f"      {nanovllm} status{where}")
    if listener is not None:
        click.echo(f"      {listener.curl(name)}")
    if settings.services:
        by = " --keys DIRECTORY" if settings.keys else " --insecure"
        by = by if settings.keys or not is_local(settings.services) else ""
        click.echo(f"join: nanovllm-launch --join {connectable(settings.services)} --engines 1{by}")
    click.echo("Ctrl-C stops the pipeline.")
    sys.stdout.flush()


def _announce_joined(settings: Settings, number: int, listener: Listener | None) -> None:
    counts = {
        "engine": settings.engines,
        "tokenizer": settings.tokenizers,
        "detokenizer": settings.detokenizers,
        "HTTP server": settings.http_servers if listener else 0,
    }
    joined = ", ".join(counted(count, what) for what, count in counts.items() if count)
    at = f" at {listener.url}" if listener else ""
    click.echo(f"machine {number}: {joined}{at} joined the pipeline at {settings.join}")
    click.echo("Ctrl-C takes them away again.")
    sys.stdout.flush()


def _command() -> str:
    """How a shell in this directory calls this installation's `nanovllm`."""
    python = Path(sys.executable)
    script = python.with_name("nanovllm")
    found = shutil.which("nanovllm")
    if found is not None and (found == str(script) or not script.exists()):
        return "nanovllm"
    if script.exists():
        here = Path.cwd()
        return shlex.quote(str(script.relative_to(here) if here in script.parents else script))
    return f"{shlex.quote(str(python))} -m nanovllm"


if __name__ == "__main__":
    main()
