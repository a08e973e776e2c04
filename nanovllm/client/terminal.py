"""What every command tells the person at the terminal: mistakes, and that it waits."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import click

from nanovllm.client.results import PipelineUnavailable, RequestError
from nanovllm.client.sync import Client
from nanovllm.exit_codes import EXIT_INTERRUPTED
from nanovllm.progress import PATIENCE_S
from nanovllm.protocol import Pong
from nanovllm.settings import SettingsError


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Turns the errors that a person can mend into one line, without a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
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


def answering(client: Client, endpoint: str) -> Pong:
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
