"""`nanovllm-launch`: checks its options, and runs the pipeline."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from nanovllm import __version__
from nanovllm.__main__ import EXIT_INTERRUPTED
from nanovllm.checkpoint import CheckpointError, ModelConfig, model_name, resolve_model
from nanovllm.hints import LAUNCH_HINTS, HintingCommand
from nanovllm.keys import PipelineKeys
from nanovllm.launch.console import passed_on
from nanovllm.launch.gpus import Gpus
from nanovllm.launch.http import Listener
from nanovllm.launch.runtime_dir import runtime_dir
from nanovllm.launch.supervisor import ServiceFailed, Supervisor
from nanovllm.log import EventFormatter
from nanovllm.options import config_option, settings_from, settings_options
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
from nanovllm.transport.curve import is_tcp
from nanovllm.transport.endpoints import EndpointUnusable, check_free, connectable, is_local

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
    """,
    context_settings={"max_content_width": 100},
)
@click.version_option(__version__)
@click.argument("model", default="")
@config_option
@settings_options(without=("model",))
def main(model: str, **options: Any) -> None:
    settings = settings_from({"model": model, **options})
    lifeline = os.environ.pop(LIFELINE_VARIABLE, None)
    with passed_on():
        bar = LoadingBar()
        handler = _AboveTheBar(bar)
        handler.setFormatter(EventFormatter("supervisor", settings.log_format))
        logging.basicConfig(level=settings.log_level.upper(), handlers=[handler])
        try:
            _launch(settings, bar, None if lifeline is None else int(lifeline))
        except (CheckpointError, SettingsError, ServiceFailed, OSError) as error:
            if settings.log_format == "text":
                click.echo(f"nanovllm-launch: {error}", err=True)
            else:
                log.critical("%s", error)
            sys.exit(1)
        except KeyboardInterrupt:  # before the supervisor took over
            sys.exit(EXIT_INTERRUPTED)


class _AboveTheBar(logging.Handler):
    def __init__(self, bar: LoadingBar) -> None:
        super().__init__()
        self._bar = bar

    def emit(self, record: logging.LogRecord) -> None:
        self._bar.write(self.format(record))


def _launch(settings: Settings, bar: LoadingBar, lifeline: int | None) -> None:
    directory = resolve_model(settings.model)
    config = ModelConfig.from_checkpoint(directory, settings.quantization)
    if settings.device != "sim":
        config.check_tensor_parallel(settings.tensor_parallel_size)
    name = model_name(directory)
    settings = settled(settings, directory, config)
    if settings.keys:
        PipelineKeys(settings.keys)  # tells now what is wrong with them
    elif settings.ingress and not is_local(settings.ingress):
        log.warning(
            "--insecure: whoever reaches %s may use the pipeline, and the network can read along",
            settings.ingress,
        )
    gpus = Gpus(settings)
    with runtime_dir(Path(settings.runtime_dir)):
        _check_free(settings)
        listener = Listener(settings) if settings.http else None
        announce = partial(_announce, settings, name, listener)
        Supervisor(settings, name, bar, gpus, listener, announce, lifeline).run()


def _check_free(settings: Settings) -> None:
    if settings.ingress:
        try:
            check_free(settings.ingress)
        except EndpointUnusable as error:
            raise SettingsError(f"--ingress {error}") from None


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
    click.echo(f"nanovllm serves {name} at {bound}{f' and {listener.url}' if listener else ''}")
    click.echo(f"try:  {nanovllm} generate 'Once upon a time'{where}")
    click.echo(f"      {nanovllm} chat{where}")
    click.echo(f"      {nanovllm} status{where}")
    if listener is not None:
        click.echo(f"      {listener.curl(settings.served_model_name or name)}")
    click.echo("Ctrl-C stops the pipeline.")
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
