"""`nanovllm`: talks to a running pipeline from a terminal."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

import click

from nanovllm import __version__
from nanovllm.client import status as status_view
from nanovllm.client.control import Control
from nanovllm.client.results import PipelineUnavailable, RequestError
from nanovllm.client.sync import Client, Stream
from nanovllm.control import ROLES, SCALABLE_ROLES, Restart, Scale
from nanovllm.protocol import Pong
from nanovllm.sampling_params import SamplingParams
from nanovllm.settings import DEFAULT_INGRESS, MAX_SERVICES, SettingsError, default_runtime_dir
from nanovllm.wording import counted

Command = TypeVar("Command", bound=Callable[..., Any])

# After so long without an answer, tell the person which pipeline the command waits for.
PATIENCE_S: Final = 1.0

_REQUEST_OPTIONS = [
    click.option(
        "--endpoint", default=DEFAULT_INGRESS, show_default=True, help="Where the pipeline serves."
    ),
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


_runtime_dir_option = click.option(
    "--runtime-dir",
    default=default_runtime_dir,
    show_default=default_runtime_dir(),
    help="The pipeline's runtime directory (nanovllm-launch --runtime-dir).",
)


@click.group(
    help="""Talk to a running pipeline (nanovllm-launch starts one).

    \b
    Examples:
      nanovllm generate "Once upon a time"
      nanovllm chat
      nanovllm status
      nanovllm scale tokenizer 4
      nanovllm restart scheduler
    """,
    context_settings={"max_content_width": 100},
)
@click.version_option(__version__)
def main() -> None:
    pass


@main.command(
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
def generate(endpoint: str, prompt: str, **sampling: Any) -> None:
    with _told_in_one_line():
        text = sys.stdin.read() if prompt == "-" else prompt
        params = SamplingParams(**sampling)
        with Client(endpoint) as client, client.generate(text, params, stream=True) as stream:
            _answering(client, endpoint)
            _print(stream)


@main.command(
    help="""Chat with the model. With MESSAGE: one answer, and done.

    Ctrl-C stops an answer; Ctrl-D ends the chat.

    \b
    Examples:
      nanovllm chat
      nanovllm chat "Tell me a story about a fox." --no-thinking
      nanovllm chat --system "You answer in rhymes."
    """
)
@click.argument("message", required=False)
@click.option("--system", help="A system message in front of the chat.")
@click.option(
    "--thinking/--no-thinking",
    default=None,
    help="Passed to the chat template as enable_thinking.",
)
@_request_options
def chat(
    endpoint: str, message: str | None, system: str | None, thinking: bool | None, **sampling: Any
) -> None:
    with _told_in_one_line():
        params = SamplingParams(**sampling)
        kwargs = None if thinking is None else {"enable_thinking": thinking}
        history = [{"role": "system", "content": system}] if system else []
        with Client(endpoint) as client:
            pong = _answering(client, endpoint)

            def answer(said: str) -> None:
                history.append({"role": "user", "content": said})
                stream = client.chat(history, params, stream=True, chat_template_kwargs=kwargs)
                text = _print(stream, stoppable=message is None)
                history.append({"role": "assistant", "content": text})

            if message is not None:
                answer(message)
                return
            click.echo(f"{pong.model} at {endpoint}. Ctrl-C stops an answer, Ctrl-D ends the chat.")
            for line in _lines():
                try:
                    answer(line)
                except (RequestError, ValueError) as error:
                    del history[-1]
                    click.echo(f"Error: {error}", err=True)


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
@_runtime_dir_option
@click.option("--json", "as_json", is_flag=True, help="Counters for machines, as they are now.")
def status(runtime_dir: str, as_json: bool) -> None:
    with _told_in_one_line(), Control(runtime_dir) as control:
        if as_json:
            click.echo(status_view.to_json(control.status()))
        else:
            click.echo(status_view.render(*control.two_reports()))


@main.command(
    help="""Run COUNT services of this ROLE from now on; returns when they do.

    ROLE is tokenizer or detokenizer.
    Nothing is lost: what a service that ends had in hand is given to others.

    \b
    Examples:
      nanovllm scale tokenizer 4
      nanovllm scale detokenizer 1
    """,
    short_help="Run so many tokenizers or detokenizers.",
)
@click.argument("role", type=click.Choice(SCALABLE_ROLES), metavar="ROLE")
@click.argument("count", type=click.IntRange(1, MAX_SERVICES))
@_runtime_dir_option
def scale(runtime_dir: str, role: str, count: int) -> None:
    with _told_in_one_line(), Control(runtime_dir) as control:
        services = counted(count, role)
        click.echo(f"scaling to {services} …", err=True)
        control.command(Scale(role, count))
        click.echo(f"{services} running")


@main.command(
    help="""Restart services one after the other; returns when the last one is ready.

    ROLE is ingress, tokenizer, scheduler, gpu_worker (all ranks at once), detokenizer, or all.
    Requests go on where they were; what their clients see is a pause. After a restart of the
    ingress, clients have to connect and resume anew, which nanovllm's own do by themselves.

    \b
    Examples:
      nanovllm restart scheduler
      nanovllm restart all
    """,
    short_help="Restart services, one after the other.",
)
@click.argument(
    "role",
    type=click.Choice([*ROLES, "all"]),
    metavar="ROLE",
)
@_runtime_dir_option
def restart(runtime_dir: str, role: str) -> None:
    with _told_in_one_line(), Control(runtime_dir) as control:
        services = "all services" if role == "all" else role
        click.echo(f"restarting {services} …", err=True)
        control.command(Restart(role))
        click.echo(f"restarted {services}")


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    """Turns the errors that a person can mend into one line, without a traceback."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise click.ClickException(f"the input is not valid UTF-8: {error}") from None
    except (RequestError, PipelineUnavailable, SettingsError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    except BrokenPipeError:
        raise  # click then exits silently
    except OSError as error:
        # The interpreter flushes stdout at its end, and would fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise click.ClickException(error.strerror or str(error)) from None


def _answering(client: Client, endpoint: str) -> Pong:
    """Waits for the pipeline's first answer; says so if that takes long."""
    notice = threading.Timer(
        PATIENCE_S, click.echo, [f"waiting for a pipeline at {endpoint} …"], {"err": True}
    )
    notice.daemon = True
    notice.start()
    try:
        return client.ping()
    finally:
        notice.cancel()


def _print(stream: Stream, *, stoppable: bool = False) -> str:
    """Prints the answer as it comes, and returns it. If `stoppable`, Ctrl-C ends the answer and not
    the program."""
    texts: list[str] = []
    with stream, contextlib.suppress(*[KeyboardInterrupt] * stoppable):
        for delta in stream:
            texts.append(delta.text)
            click.echo(delta.text, nl=False)
    click.echo()
    return "".join(texts)


def _lines() -> Iterator[str]:
    """The lines that the person types, until the end of input; Ctrl-C discards a line."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives `input` its line editing)
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        if line.strip():
            yield line


if __name__ == "__main__":
    main()
