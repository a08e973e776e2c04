"""`nanovllm`: talks to a running pipeline from a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from nanovllm import __version__
from nanovllm.bench.cli import bench
from nanovllm.client.answers import cut, note, show
from nanovllm.client.chat import Chat
from nanovllm.client.keygen import keygen
from nanovllm.client.sync import Client
from nanovllm.client.terminal import answering, told_in_one_line
from nanovllm.client.where import Where, pipeline_options
from nanovllm.exit_codes import EXIT_INTERRUPTED
from nanovllm.hints import REQUEST_HINTS, HintingCommand
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings import MAX_SERVICES, RESTARTABLE, SCALABLE
from nanovllm.wording import counted

if TYPE_CHECKING:
    from nanovllm.client.control import Control
    from nanovllm.control import Restart, Scale

Command = TypeVar("Command", bound=Callable[..., Any])

_REQUEST_OPTIONS = [
    click.option("--max-tokens", default=512, show_default=True, help="Output tokens at most."),
    click.option("--temperature", default=0.6, show_default=True, help="0 is greedy."),
    click.option(
        "--top-p",
        default=1.0,
        show_default=True,
        help="Only the likeliest tokens that together have this probability.",
    ),
    click.option(
        "--top-k", default=0, show_default=True, help="Only the k likeliest tokens; 0 is off."
    ),
    click.option(
        "--min-p",
        default=0.0,
        show_default=True,
        help="Only tokens at least this likely, relative to the likeliest.",
    ),
    click.option("--seed", type=int, help="Makes the output repeatable."),
    click.option("--stop", multiple=True, help="End before this text; may be repeated."),
]


def _request_options(command: Command) -> Command:
    for option in reversed(_REQUEST_OPTIONS):
        command = option(command)
    return command


@click.group(
    help="""Serve a model, and talk to a pipeline that serves one.

    \b
    Examples:
      nanovllm serve Qwen/Qwen3-0.6B
      nanovllm generate "Once upon a time"
      nanovllm chat
      nanovllm status
      nanovllm scale tokenizer 4
      nanovllm restart scheduler
      nanovllm bench --concurrency 64
    """,
    context_settings={"max_content_width": 100},
)
@click.version_option(__version__)
def main() -> None:
    pass


@main.command(
    context_settings={"ignore_unknown_options": True},
    add_help_option=False,
    short_help="Serve a model: the same as nanovllm-launch.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def serve(arguments: tuple[str, ...]) -> None:
    from nanovllm.launch.cli import main as launch

    launch(list(arguments), prog_name="nanovllm serve")


@main.command(
    cls=HintingCommand,
    hints=REQUEST_HINTS,
    help="""Continue PROMPT, streaming to stdout; "-" reads it from stdin.

    \b
    Examples:
      nanovllm generate "Once upon a time" --max-tokens 100
      nanovllm generate - --temperature 0 < prompt.txt
    """,
    short_help="Continue a prompt, streaming to stdout.",
)
@click.argument("prompt")
@_request_options
@pipeline_options
def generate(where: Where, prompt: str, **sampling: Any) -> None:
    with told_in_one_line():
        text = sys.stdin.read() if prompt == "-" else prompt
        params = SamplingParams(**sampling)
        with Client(where.ingress, keys=where.keys) as client:
            answering(client, where.ingress)
            shown = show(client.generate(text, params, stream=True))
        if shown.completion is None:
            sys.exit(EXIT_INTERRUPTED)
        if why := cut(shown.completion, params.max_tokens):
            note(why)


@main.command(
    cls=HintingCommand,
    hints=REQUEST_HINTS,
    help="""Chat with the model. With MESSAGE: one answer, and done.

    Ctrl-C stops an answer; Ctrl-D ends the chat; /help lists the chat's commands. The messages
    typed are kept for the arrow keys, in ~/.local/state/nanovllm.

    \b
    Examples:
      nanovllm chat
      nanovllm chat "Tell me a story about a fox." --no-thinking
      nanovllm chat --system "You answer in rhymes."
    """,
)
@click.argument("message", required=False)
@click.option("--system", help="A system message in front of the chat.")
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Passed to the chat template as enable_thinking.",
)
@_request_options
@pipeline_options
def chat(
    where: Where, message: str | None, system: str | None, thinking: bool | None, **sampling: Any
) -> None:
    with told_in_one_line():
        params = SamplingParams(**sampling)
        template = None if thinking is None else {"enable_thinking": thinking}
        with Client(where.ingress, keys=where.keys) as client:
            pong = answering(client, where.ingress)
            talk = Chat(client, params, template, system)
            if message is not None:
                if not talk.say(message):
                    sys.exit(EXIT_INTERRUPTED)
                return
            tiny = " The demo model is tiny, and wanders after a turn or two." * (
                pong.model == "demo"
            )
            click.echo(f"{pong.model} at {where.ingress}.{tiny} Ctrl-D ends the chat; /help.")
            talk.run()


@main.command(
    help="""Show the services of a running pipeline, and what its engine does.

    Loads are those of the last second.

    \b
    Examples:
      nanovllm status
      nanovllm status --json | jq .services
    """,
    short_help="Show the services of a running pipeline.",
)
@pipeline_options
@click.option("--json", "as_json", is_flag=True, help="Counters for machines, as they are now.")
def status(where: Where, as_json: bool) -> None:
    from nanovllm.client import status as status_view

    with told_in_one_line(), where.control() as control:
        if as_json:
            click.echo(status_view.to_json(control.status()))
        else:
            click.echo(status_view.render(*control.two_reports()))


@main.command(
    help="""Tell by the exit code whether the launcher of this machine answers, for probes.

    With --ready also whether all services of this machine can work: they have started, are not
    being stopped, and reach the pipeline that they have joined.

    \b
    Examples:
      nanovllm health
      nanovllm health --ready
    """,
    short_help="Tell by the exit code whether the launcher answers.",
)
@click.option("--ready", is_flag=True, help="Whether all services of this machine can work.")
@pipeline_options
def health(where: Where, ready: bool) -> None:
    with told_in_one_line(), where.control() as control:
        missing = control.missing()
    click.echo(missing or "ready")
    sys.exit(1 if ready and missing else 0)


@main.command(
    help="""Run COUNT services of this ROLE from now on; returns when they do.

    ROLE is tokenizer, detokenizer, http, or engine: a scheduler and its GPU workers.
    Nothing is lost: what a service that ends had in hand is given to others. Each machine has a
    number of its own; without --machine that of this one is meant, and only the main machine, where
    the ingress runs, reaches others.

    \b
    Examples:
      nanovllm scale tokenizer 4
      nanovllm scale engine 2
      nanovllm scale engine 0 --machine worker-7
    """,
    short_help="Run so many tokenizers, detokenizers, HTTP servers or engines.",
)
@click.argument("role", type=click.Choice(SCALABLE), metavar="ROLE")
@click.argument("count", type=click.IntRange(0, MAX_SERVICES))
@click.option("--machine", default="", help="One that has joined, as `nanovllm status` names it.")
@pipeline_options
def scale(where: Where, role: str, count: int, machine: str) -> None:
    from nanovllm.control import Scale

    with told_in_one_line(), where.control() as control:
        services = counted(count, "HTTP server" if role == "http" else role)
        click.echo(f"scaling to {services} …", err=True)
        _command(control, Scale(role, count, machine))
        click.echo(f"{services} running")


@main.command(
    help="""Restart services one after the other; returns when the last one is ready.

    ROLE is ingress, tokenizer, scheduler, gpu_worker (all ranks at once), engine (a scheduler and
    its GPU workers), detokenizer, http, or all. Of several engines each is restarted by itself, and
    the others get its requests first.
    Requests go on where they were; what their clients see is a pause. After a restart of the
    ingress, clients have to connect and resume anew, which nanovllm's own do by themselves.

    \b
    Examples:
      nanovllm restart engine
      nanovllm restart all
    """,
    short_help="Restart services, one after the other.",
)
@click.argument(
    "role",
    type=click.Choice(RESTARTABLE),
    metavar="ROLE",
)
@pipeline_options
def restart(where: Where, role: str) -> None:
    from nanovllm.control import Restart

    with told_in_one_line(), where.control() as control:
        services = "all services" if role == "all" else role
        click.echo(f"restarting {services} …", err=True)
        _command(control, Restart(role))
        click.echo(f"restarted {services}")


def _command(control: Control, command: Scale | Restart) -> None:
    """Returns when the command is done; Ctrl-C ends the waiting alone."""
    try:
        control.command(command)
    except KeyboardInterrupt:
        if control.asked:
            click.echo("\nnot waited for; it goes on all the same: see `nanovllm status`", err=True)
        raise


main.add_command(bench)
main.add_command(keygen)

if __name__ == "__main__":
    main()
