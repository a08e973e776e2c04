"""Which pipeline a command talks to: `--endpoint` and `--runtime-dir`, of every command."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import click
from click.core import ParameterSource

from nanovllm.client.results import PipelineUnavailable
from nanovllm.settings import (
    DEFAULT_INGRESS,
    ENDPOINT_VARIABLE,
    KEYS_VARIABLE,
    RUNTIME_DIR_VARIABLE,
    Settings,
    default_runtime_dir,
)
from nanovllm.transport.endpoints import connectable

if TYPE_CHECKING:
    from nanovllm.client.control import Control


class Where(NamedTuple):
    """One pipeline; None where nothing was said."""

    endpoint: str | None
    runtime_dir: str | None
    keys: str | None = None

    @property
    def ingress(self) -> str:
        """Where clients connect. Raises SettingsError if the runtime directory's path is too long
        for a socket."""
        if self.endpoint is None and self.runtime_dir is not None:
            return Settings(runtime_dir=self.runtime_dir).in_runtime_dir("ingress")
        return self.endpoint or DEFAULT_INGRESS

    def control(self) -> Control:
        """A link to the supervisor, which is reached through the runtime directory alone.

        Raises:
            SettingsError: the runtime directory's path is too long for a socket.
            PipelineUnavailable: no pipeline runs there, or one with another endpoint.
        """
        from nanovllm.client.control import Control

        directory, name = os.path.split((self.endpoint or "").removeprefix("ipc://"))
        if self.runtime_dir is not None or self.endpoint is None:
            return Control(self.runtime_dir or default_runtime_dir())
        if self.endpoint.startswith("ipc://") and name == "ingress.sock":
            return Control(directory)
        control = Control(default_runtime_dir())
        try:
            serves = control.status().endpoint
            if connectable(serves) != connectable(self.endpoint):
                raise PipelineUnavailable(
                    f"the pipeline in {default_runtime_dir()} serves at {serves}, not at"
                    f" {self.endpoint}: name the other one's --runtime-dir"
                )
        except BaseException:
            control.close()
            raise
        return control


def pipeline_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the options to a command whose first parameter is a `Where`."""

    @click.option(
        "--endpoint",
        envvar=ENDPOINT_VARIABLE,
        show_envvar=True,
        show_default=DEFAULT_INGRESS,
        help="Where the pipeline serves: tcp://HOST:PORT or ipc://PATH.",
    )
    @click.option(
        "--runtime-dir",
        envvar=RUNTIME_DIR_VARIABLE,
        show_envvar=True,
        show_default=default_runtime_dir(),
        help="Its runtime directory, instead of the endpoint.",
    )
    @click.option(
        "--keys",
        envvar=KEYS_VARIABLE,
        show_envvar=True,
        help="Key file of this client, where the pipeline takes keys.",
    )
    @functools.wraps(command)
    def with_where(
        *, endpoint: str | None, runtime_dir: str | None, keys: str | None, **others: Any
    ) -> None:
        source = click.get_current_context().get_parameter_source
        sources = source("endpoint"), source("runtime_dir")
        if sources == (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT):
            runtime_dir = None
        elif sources == (ParameterSource.ENVIRONMENT, ParameterSource.COMMANDLINE):
            endpoint = None
        command(Where(endpoint or None, runtime_dir or None, keys), **others)

    return with_where
