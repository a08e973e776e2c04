"""What an answer must be, as the pipeline's structured outputs: `response_format`, vLLM's keys, and
tool calls that must come, or whose arguments must be of their schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
from msgspec import Meta

from nanovllm.protocol import JSON_WHITE_SPACE, NonEmptyStr, StructuredOutputs
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.tool_calls import CLOSE, OPEN
from nanovllm.wording import key_and_reason

if TYPE_CHECKING:
    from nanovllm.services.http.requests import ChatRequest, SamplingKeys, Tool

# JSON, or a text that is JSON.
JsonSchema = dict[str, Any] | str
Choices = Annotated[list[NonEmptyStr], Meta(min_length=1)]


class TextFormat(msgspec.Struct, tag_field="type", tag="text"):
    """Any text."""


class JsonObjectFormat(msgspec.Struct, tag_field="type", tag="json_object"):
    """A JSON object."""


class NamedSchema(msgspec.Struct):
    schema: dict[str, Any] = {}
    name: str | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, tag_field="type", tag="json_schema"):
    """JSON of this schema, strict or not."""

    json_schema: NamedSchema


ResponseFormat = TextFormat | JsonObjectFormat | JsonSchemaFormat


class StructuredKeys(msgspec.Struct, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`."""

    json: JsonSchema | None = None
    regex: NonEmptyStr | None = None
    choice: Choices | None = None
    grammar: NonEmptyStr | None = None
    json_object: bool | None = None


class ToolName(msgspec.Struct):
    name: NonEmptyStr


class NamedTool(msgspec.Struct):
    function: ToolName
    type: Literal["function"] = "function"


ToolMode = Literal["auto", "none", "required"]
ToolChoice = ToolMode | NamedTool

END_OF_CALL: Final = "}\n" + CLOSE
_OTHER_KEYS: Final = "structured_outputs, guided_json, guided_regex, guided_choice, guided_grammar"


def structured_outputs(ask: SamplingKeys) -> StructuredOutputs | None:
    """What the request says of the whole answer, if it does.

    Raises:
        ApiError: it says so in more than one way.
    """
    keys = ask.structured_outputs or StructuredKeys()
    schemas: list[JsonSchema] = [s for s in (keys.json, ask.guided_json) if s is not None]
    if isinstance(ask.response_format, JsonSchemaFormat):
        schemas.append(ask.response_format.json_schema.schema)
    found: list[dict[str, Any]] = [{"json_schema": _text(schema)} for schema in schemas]
    if isinstance(ask.response_format, JsonObjectFormat) or keys.json_object:
        found.append({"json_object": True})
    for key, value in (
        ("regex", keys.regex),
        ("regex", ask.guided_regex),
        ("choice", keys.choice),
        ("choice", ask.guided_choice),
        ("grammar", keys.grammar),
        ("grammar", ask.guided_grammar),
    ):
        if value is not None:
            found.append({key: value})
    if len(found) > 1:
        message = f"response_format, {_OTHER_KEYS}: the answer can be only one of these"
        raise ApiError(400, message, "response_format")
    return _checked(ask, found[0]) if found else None


def answer_key(ask: SamplingKeys) -> str:
    """The key that says what the answer must be, where one does."""
    for key in ("guided_json", "guided_regex", "guided_choice", "guided_grammar"):
        if getattr(ask, key) is not None:
            return key
    if isinstance(ask.response_format, JsonObjectFormat | JsonSchemaFormat):
        return "response_format"
    return "tools" if ask.structured_outputs is None else "structured_outputs"


def tool_outputs(ask: ChatRequest) -> StructuredOutputs | None:
    """What the request says of tool calls, if they are not free.

    Raises:
        ApiError: the choice and the tools do not fit, or the answer must be something else, too.
    """
    tools, choice = ask.tools or [], ask.tool_choice
    if choice == "none" or (not tools and choice in (None, "auto")):
        return None
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            message = f"tool_choice: there is no tool {choice.function.name!r}"
            raise ApiError(400, message, "tool_choice")
    elif not tools:
        raise ApiError(400, "tool_choice: goes with tools only", "tool_choice")
    if structured_outputs(ask) is not None:
        message = f"response_format, {_OTHER_KEYS}: beside tools only where tool_choice is none"
        raise ApiError(400, message, "response_format")
    several = ask.parallel_tool_calls is not False and not isinstance(choice, NamedTool)
    forced = choice not in (None, "auto")
    if not forced and several and not any(tool.function.strict for tool in tools):
        return None
    return _checked(ask, {"grammar": _grammar(tools, forced=forced, several=several)})


def _grammar(tools: Sequence[Tool], *, forced: bool, several: bool) -> str:
    """Tool calls as `tool_calls` reads them; text before and behind calls, unless they are forced.

    Args:
        several: whether there may be more than one call.
    """
    if forced:
        more = '("\\n" call)*' if several else ""
        lines = [f"start: call {more}", f"open: {_quoted(OPEN)}"]
    else:
        lines = [
            "start: call* text" if several else "start: text | call",
            "text: TEXT",
            "TEXT: /(.|\\n)*/",
            f"open[lazy]: TEXT {_quoted(OPEN)}",
        ]
    lines.append("call: " + " | ".join(f"open call_{i}" for i in range(len(tools))))
    for i, tool in enumerate(tools):
        begin = f'\n{{"name": {_quoted(tool.function.name)}, "arguments": '
        lines += [
            f"call_{i}: {_quoted(begin)} arguments_{i} {_quoted(END_OF_CALL)}",
            f"arguments_{i}: %json {_arguments(tool)}",
        ]
    return "\n".join(lines)


def _arguments(tool: Tool) -> str:
    """The schema of a tool's arguments. What is not supported of it is ignored, unless the tool is
    strict."""
    schema = {"type": "object", **(tool.function.parameters or {})}
    if schema["type"] != "object":
        message = f"tools: the parameters of {tool.function.name!r}: their type must be object"
        raise ApiError(400, message, "tools")
    schema["x-guidance"] = {
        "lenient": not tool.function.strict,
        "whitespace_pattern": JSON_WHITE_SPACE,
    }
    return _text(schema)


def _quoted(text: str) -> str:
    return json.dumps(text)


def _text(schema: JsonSchema) -> str:
    return schema if isinstance(schema, str) else msgspec.json.encode(schema).decode()


def _checked(ask: SamplingKeys, outputs: dict[str, Any]) -> StructuredOutputs:
    try:
        return msgspec.convert(outputs, StructuredOutputs)
    except msgspec.ValidationError as error:
        key, (_, reason) = answer_key(ask), key_and_reason(error)
        raise ApiError(400, f"{key}: {reason}", key) from None
