"""Command lines from `Settings`: click's options, and settings as a list of arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args, get_type_hints

import click
import msgspec
from click.core import ParameterSource
from msgspec import inspect

from nanovllm.settings import (
    KEYS_VARIABLE,
    RUNTIME_DIR_VARIABLE,
    Settings,
    flag,
    with_fitting_defaults,
)

Command = TypeVar("Command", bound=Callable[..., Any])

_ALIASES = {"tensor_parallel_size": ("--tp",), "engines": ("--dp",)}
_VARIABLES = {"runtime_dir": RUNTIME_DIR_VARIABLE, "keys": KEYS_VARIABLE}


def settings_options(*, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Adds an option for every field of `Settings` (less `without`) to a click command."""

    def decorate(command: Command) -> Command:
        for field in reversed(_fields()):
            if field.name not in without:
                command = _option(field)(command)
        return command

    return decorate


def settings_from(values: dict[str, Any]) -> Settings:
    """Settings from the values that click has parsed for the current command.

    Raises:
        click.UsageError: a value is not valid; the message names its option.
    """
    source = click.get_current_context().get_parameter_source
    given = {k: v for k, v in values.items() if source(k) is not ParameterSource.DEFAULT}
    try:
        return msgspec.convert(with_fitting_defaults(given), Settings)
    except msgspec.ValidationError as error:  # a SettingsError comes as one too
        raise click.UsageError(_naming_the_option(str(error))) from None


def settings_argv(settings: Settings) -> list[str]:
    """The command line that `settings_from` turns into `settings` again."""
    argv: list[str] = []
    for field in _fields():
        value = getattr(settings, field.name)
        if isinstance(value, bool):
            argv += [flag(field.name)] if value else []
        else:
            argv += [flag(field.name), str(value)]
    return argv


def _fields() -> tuple[inspect.Field, ...]:
    described = inspect.type_info(Settings)
    if not isinstance(described, inspect.StructType):
        raise TypeError("Settings is a struct")
    return described.fields


def _option(field: inspect.Field) -> Callable[[Command], Command]:
    described = field.type
    help_text = ""
    if isinstance(described, inspect.Metadata):
        help_text = (described.extra_json_schema or {}).get("description", "")
        described = described.type
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    names = (flag(field.name), *_ALIASES.get(field.name, ()))
    if isinstance(described, inspect.BoolType):
        return click.option(*names, field.name, is_flag=True, help=help_text)
    kind: Any = str
    if isinstance(described, inspect.LiteralType):  # msgspec sorts the choices; keep our order
        kind = click.Choice(get_args(get_type_hints(Settings)[field.name]))
    elif isinstance(described, inspect.IntType):
        kind = click.IntRange(described.ge, described.le)
    elif isinstance(described, inspect.FloatType):
        above = described.gt is not None
        low = described.gt if above else described.ge
        kind = click.FloatRange(low, described.le, min_open=above)
    variable = _VARIABLES.get(field.name)
    return click.option(
        *names,
        field.name,
        type=kind,
        default=default,
        show_default=default != "",
        envvar=variable,
        show_envvar=variable is not None,
        help=help_text,
    )


def _naming_the_option(message: str) -> str:
    what, _, where = message.partition(" - at `$.")
    return f"{flag(where.rstrip('`'))}: {what}" if where else message
