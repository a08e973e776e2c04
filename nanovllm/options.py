"""Command lines from `Settings`: click's options, settings as a list of arguments, and options from
a file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import click
import msgspec
from click.core import ParameterSource
from msgspec import inspect

from nanovllm.hints import LAUNCH_HINTS
from nanovllm.settings import (
    KEYS_VARIABLE,
    RUNTIME_DIR_VARIABLE,
    Settings,
    flag,
    with_fitting_defaults,
)
from nanovllm.wording import did_you_mean

Command = TypeVar("Command", bound=Callable[..., Any])

_ALIASES = {"tensor_parallel_size": ("--tp",), "engines": ("--dp",)}
_VARIABLES = {"runtime_dir": RUNTIME_DIR_VARIABLE, "keys": KEYS_VARIABLE}
_HUB_ID = re.compile(r"[^./~][^/]*/[^/]+")


def settings_options(*, without: tuple[str, ...] = ()) -> Callable[[Command], Command]:
    """Adds an option for every field of `Settings` (less `without`) to a click command."""

    def decorate(command: Command) -> Command:
        for field in reversed(_fields()):
            if field.name not in without:
                command = _option(field)(command)
        return command

    return decorate


def config_option(command: Command) -> Command:
    """Adds `--config FILE`: a file's options, where neither the command line nor a variable gives
    them."""
    return click.option(
        "--config",
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_take_config,
        help="TOML file of options, as `max-num-seqs = 64`: the command line and variables win over"
        " it. Its relative paths are relative to its directory.",
    )(command)


def settings_from(values: dict[str, Any]) -> Settings:
    """Settings from the values that click has parsed for the current command.

    Raises:
        click.UsageError: a value is not valid; the message names its option.
    """
    given = given_options(values)
    try:
        return msgspec.convert(with_fitting_defaults(given), Settings)
    except msgspec.ValidationError as error:  # a SettingsError comes as one too
        raise click.UsageError(_naming_the_option(str(error))) from None


def given_options(values: dict[str, Any]) -> dict[str, Any]:
    """Of the values that click has parsed for the current command, those that are no defaults."""
    source = click.get_current_context().get_parameter_source
    return {k: v for k, v in values.items() if source(k) is not ParameterSource.DEFAULT}


def settings_argv(settings: Settings, *, without: tuple[str, ...] = ()) -> list[str]:
    """The command line that `settings_from` turns into `settings` again."""
    argv: list[str] = []
    for field in _fields():
        if field.name in without:
            continue
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
    names = _names(field)
    if isinstance(described, inspect.BoolType):
        either = f"{names[0]}/--no-{names[0].removeprefix('--')}"
        return click.option(either, field.name, default=False, help=help_text)
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


def _names(field: inspect.Field) -> tuple[str, ...]:
    return (flag(field.name), *_ALIASES.get(field.name, ()))


def _take_config(context: click.Context, _: click.Parameter, file: Path | None) -> None:
    if file is not None:
        context.default_map = _read_config(file)


def _read_config(file: Path) -> dict[str, Any]:
    """Values by the names of fields. Raises click.UsageError, which names the file and the key."""
    try:
        table = tomllib.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise click.UsageError(f"{file} is not TOML: {error}") from None
    fields = {name.removeprefix("--"): field for field in _fields() for name in _names(field)}
    hints = get_type_hints(Settings, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            hint = LAUNCH_HINTS.get(f"--{key}")
            what = f"nanovllm has {hint}" if hint else did_you_mean(key, fields)
            raise click.UsageError(f"{file}: {key} is no option: {what}")
        field = fields[key]
        if field.name in values:
            raise click.UsageError(f"{file}: {key} is given twice, by another name: give one")
        try:
            values[field.name] = msgspec.convert(value, hints[field.name])
        except msgspec.ValidationError as error:
            choices = get_args(get_type_hints(Settings)[field.name])
            allowed = f": must be one of {', '.join(choices)}" if choices else ""
            raise click.UsageError(f"{file}: {key}: {error}{allowed}") from None
        if isinstance(field.type, inspect.Metadata) and (field.type.extra or {}).get("path"):
            values[field.name] = _beside(file, field.name, value)
    return values


def _beside(file: Path, name: str, value: str) -> str:
    """The value of an option that names a path, which in a file is relative to the file."""
    path = value.removeprefix("ipc://")
    if not path or "://" in path:
        return value
    resolved = os.path.join(file.parent.absolute(), os.path.expanduser(path))
    if name == "model" and _HUB_ID.fullmatch(value) and not os.path.isdir(resolved):
        return value
    return value.removesuffix(path) + resolved


def _naming_the_option(message: str) -> str:
    what, _, where = message.partition(" - at `$.")
    return f"{flag(where.rstrip('`'))}: {what}" if where else message
