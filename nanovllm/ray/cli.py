"""`nanovllm-ray`: a pipeline on a Ray cluster."""

from __future__ import annotations

import functools
import importlib.util
import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from nanovllm import __version__
from nanovllm.client import status as status_view
from nanovllm.client.control import NEXT_REPORT_S
from nanovllm.client.terminal import told_in_one_line
from nanovllm.hints import LAUNCH_HINTS, HintingCommand
from nanovllm.options import given_options, settings_from, settings_options
from nanovllm.progress import PATIENCE_S, LoadingBar, Shown, progress
from nanovllm.ray.plan import WAITS, EnginePlan, EngineState, HeadState, Plan, secrets_of
from nanovllm.settings import MAX_SERVICES, SettingsError
from nanovllm.wording import counted

if TYPE_CHECKING:
    from nanovllm.ray.cluster import Cluster

# What the actors say themselves, or Ray does.
_NOT_HERE = ("model", "services", "join", "advertise", "runtime_dir", "gpus")
_PORT = 5600
# So long an actor takes at most to start, where there is a node for it.
HEAD_PATIENCE_S = 30.0


def _on_a_cluster(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options to a command whose first parameter is a `Cluster`."""

    @click.option(
        "--address",
        envvar="RAY_ADDRESS",
        show_envvar=True,
        default="auto",
        show_default=True,
        help="The cluster, as HOST:PORT; auto: that of this machine.",
    )
    @click.option(
        "--name",
        default="nanovllm",
        show_default=True,
        help="The pipeline's name, which is its namespace in Ray.",
    )
    @functools.wraps(command)
    def connected(*, address: str, name: str, **others: Any) -> None:
        if not name:
            raise click.UsageError("--name is empty: name the pipeline")
        if importlib.util.find_spec("ray") is None:
            raise click.ClickException("Ray is not installed: pip install 'nanovllm[ray]'")
        from nanovllm.ray.cluster import Cluster

        with told_in_one_line():
            command(Cluster(address, name), **others)

    return connected


@click.group(
    help="""Serve a model on a running Ray cluster, with engines wherever there are GPUs.

    \b
    Examples:
      nanovllm-ray up Qwen/Qwen3-0.6B --engines 8 --tp 2
      nanovllm-ray scale engine 4
      nanovllm-ray status
      nanovllm-ray down
    """,
    context_settings={"max_content_width": 100},
)
@click.version_option(__version__)
def main() -> None:
    pass


@main.command(
    cls=HintingCommand,
    hints=LAUNCH_HINTS,
    help="""Serve MODEL on the cluster, until `nanovllm-ray down`; returns when all engines are
    ready. Ctrl-C before takes all away again.

    MODEL is a hub id, which each node fetches once, or a directory that is there on every node;
    without it a small demo model is served. Ray places each engine where --tp GPUs of a node are
    free, and anew where its node dies. Ingress, tokenizers, detokenizers and HTTP servers are on
    the node of this command, as long as that is there.

    Keys for the services are made and handed out. Clients elsewhere use HTTP; or name the
    pipeline's --keys, and an --ingress: without --keys there is none but ipc.

    \b
    Examples:
      nanovllm-ray up Qwen/Qwen3-0.6B --engines 8 --tp 2
      nanovllm-ray up --engines 2 --device cpu
      nanovllm-ray up Qwen/Qwen3-0.6B --http 0.0.0.0:8000 --api-key-file api-keys
    """,
    short_help="Serve a model on the cluster.",
)
@click.argument("model", default="")
@_on_a_cluster
@click.option(
    "--port",
    type=click.IntRange(1, 65534),
    default=_PORT,
    show_default=True,
    help="Where engines meet the head on its node; PORT + 1 is taken too.",
)
@settings_options(without=_NOT_HERE)
def up(cluster: Cluster, model: str, port: int, **options: Any) -> None:
    here = Path(model).expanduser()
    options["model"] = str(here.resolve()) if here.is_dir() else model
    if options["engines"] == 0:
        raise click.UsageError("--engines is 0: name one, and `nanovllm-ray scale` changes that")
    settings, given = settings_from(options), given_options(options)
    if not settings.keys:
        if given.get("ingress"):
            raise SettingsError("--ingress: only clients with keys reach it, name --keys too")
        settings = msgspec.structs.replace(settings, ingress="")
    on_gpus = settings.device == "cuda" or (settings.device == "auto" and cluster.gpus() > 0)
    gpus = settings.tensor_parallel_size if on_gpus else 0
    engine = EnginePlan(gpus, settings.drain_timeout)
    plan = Plan(settings, port, engine, secrets_of(settings))
    with _Progress(engine) as progress:
        head = cluster.up(plan, settings.engines, progress.look)
    for name, address in head.addresses.items():
        click.echo(f"{name:9} {address}")
    ready = counted(settings.engines, "engine")
    click.echo(f"{ready} ready; `nanovllm-ray down` ends the pipeline")


@main.command(
    help="""Run COUNT engines from now on; returns when they do.

    The requests of an engine that ends go on on others.

    \b
    Example:
      nanovllm-ray scale engine 4
    """,
    short_help="Run so many engines.",
)
@click.argument("role", type=click.Choice(["engine"]), metavar="engine")
@click.argument("count", type=click.IntRange(0, MAX_SERVICES))
@_on_a_cluster
def scale(cluster: Cluster, role: str, count: int) -> None:
    engine = cluster.engine_plan()
    with _Progress(engine) as progress:
        cluster.scale(count, engine, progress.look)
    click.echo(f"{counted(count, role)} running")


@main.command(help="Show where the pipeline is, and its services.")
@_on_a_cluster
def status(cluster: Cluster) -> None:
    before, _ = cluster.state()
    time.sleep(NEXT_REPORT_S)
    head, engines = cluster.state()
    if head is None:
        click.echo("head      is being placed anew")
    else:
        for name, address in head.addresses.items():
            click.echo(f"{name:9} {address}")
    for number, engine in engines.items():
        click.echo(f"engine {number:2} {_said(engine)}")
    if before is not None and head is not None and head.status is not None:
        click.echo()
        click.echo(status_view.render(before.status or head.status, head.status))


@main.command(
    help="""End the pipeline: unfinished requests have --drain-timeout seconds. Nothing is left."""
)
@_on_a_cluster
def down(cluster: Cluster) -> None:
    notice = threading.Timer(PATIENCE_S, click.echo, ["waiting for requests and services to end …"])
    notice.daemon = True
    notice.start()
    try:
        ended = cluster.down()
    finally:
        notice.cancel()
    click.echo("everything has ended" if ended else "there was nothing to end")


def _said(engine: EngineState) -> str:
    """What an engine does, in a line. The table of services has its number in the pipeline."""
    ready = f"ready, as the pipeline's engine {engine.number}" if engine.ready else ""
    return f"{engine.where}  {engine.error or ready}".rstrip()


class _Progress(LoadingBar):
    """What services load; and once, after `PATIENCE_S`, who waits for what.

    Args:
        engine: what each engine takes.
    """

    def __init__(self, engine: EnginePlan) -> None:
        super().__init__()
        self._resources = f"{counted(engine.gpus, 'GPU')} and a CPU" if engine.gpus else "a CPU"
        self._tell_at = time.monotonic() + PATIENCE_S
        self._tell_of_the_head_at = time.monotonic() + HEAD_PATIENCE_S

    def look(self, head: HeadState | None, engines: dict[int, EngineState]) -> None:
        now = time.monotonic()
        waiting = [str(number) for number, engine in engines.items() if engine.where == WAITS]
        if waiting and now >= self._tell_at:
            self._tell_at = math.inf
            engine = "engine" if len(waiting) == 1 else "engines"
            self.write(f"no node has {self._resources} free for {engine} {', '.join(waiting)}")
        if head is not None:
            self._tell_of_the_head_at = math.inf
        elif now >= self._tell_of_the_head_at:
            self._tell_of_the_head_at = math.inf
            self.write("the head has not started: it needs a node with a CPU free")
        services = head.status.services if head is not None and head.status is not None else []
        there = [service for service in services if service.state != "unreachable"]
        ready = sum(engine.ready for engine in engines.values())
        self.draw(progress(there) or Shown("starting engines", ready, len(engines)))


if __name__ == "__main__":
    main()
