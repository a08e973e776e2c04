"""What an answer must be, as the pipeline's structured outputs: tool calls that must come, or whose
arguments must be of their schema; and what else the request says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

import msgspec

from nanovllm.protocol import JSON_WHITE_SPACE, NonEmptyStr, StructuredOutputs
from nanovllm.services.http.conversation import Function
from nanovllm.services.http.errors import ApiError
from nanovllm.services.http.tool_calls import CLOSE, OPEN
from nanovllm.wording import key_and_reason

# JSON, or a text that is JSON.
JsonSchema = dict[str, Any] | str
ToolMode = Literal["auto", "none", "required"]


class ToolName(msgspec.Struct):
    """The tool that must be called."""

    name: NonEmptyStr


class AnswerFormat(NamedTuple):
    """What the whole answer must be, and the key of the request that says so."""

    outputs: StructuredOutputs | None
    key: str


ANY_ANSWER: Final = AnswerFormat(None, "structured_outputs")
END_OF_CALL: Final = "}\n" + CLOSE


def with_tools(
    answer: AnswerFormat,
    tools: Sequence[Function],
    choice: ToolMode | ToolName | None,
    *,
    parallel: bool,
) -> AnswerFormat:
    """What the answer must be, where it may or must call tools.

    Args:
        answer: what it must be without tools.
        parallel: whether it may call more than one.

    Raises:
        ApiError: the choice and the tools do not fit, or the answer must be something else, too.
    """
    if choice == "none" or (not tools and choice in (None, "auto")):
        return answer
    may_call: Sequence[Function | None] = tools
    if isinstance(choice, ToolName):
        may_call = [tool if tool.name == choice.name else None for tool in tools]
        if not any(may_call):
            message = f"tool_choice: there is no tool {choice.name!r}"
            raise ApiError(400, message, "tool_choice")
    elif not tools:
        raise ApiError(400, "tool_choice: goes with tools only", "tool_choice")
    if answer.outputs is not None:
        message = f"{answer.key}: beside tools only where tool_choice is none"
        raise ApiError(400, message, answer.key)
    several = parallel and not isinstance(choice, ToolName)
    forced = choice not in (None, "auto")
    if not forced and several and not any(tool.strict for tool in tools):
        return answer
    grammar = _grammar(may_call, forced=forced, several=several)
    return answer_format("tools", grammar=grammar)


def _grammar(tools: Sequence[Function | None], *, forced: bool, several: bool) -> str:
    """Tool calls as `tool_calls` reads them; text before and behind calls, unless they are forced.
    The grammar begins with two lines for each tool, so that the line of an error tells which tool
    is wrong (see `errors.api_error`).

    Args:
        tools: None stands for one that is not to be called.
        several: whether there may be more than one call.
    """
    lines: list[str] = []
    for i, tool in enumerate(tools):
        if tool is None:
            lines += ["", ""]
            continue
        begin = f'\n{{"name": {_quoted(tool.name)}, "arguments": '
        lines += [
            f"call_{i}: {_quoted(begin)} arguments_{i} {_quoted(END_OF_CALL)}",
            f"arguments_{i}: %json {_arguments(tool)}",
        ]
    lines.append("call: " + " | ".join(f"open call_{i}" for i, tool in enumerate(tools) if tool))
    if forced:
        more = '("\\n" call)*' if several else ""
        lines += [f"start: call {more}", f"open: {_quoted(OPEN)}"]
    else:
        lines += [
            "start: call* text" if several else "start: text | call",
            "text: TEXT",
            "TEXT: /(.|\\n)*/",
            f"open[lazy]: TEXT {_quoted(OPEN)}",
        ]
    return "\n".join(lines)


def _arguments(tool: Function) -> str:
    """The schema of a tool's arguments. What is not supported of it is ignored, unless the tool is
    strict."""
    schema = {"type": "object", **(tool.parameters or {})}
    if schema["type"] != "object":
        message = f"tools: the parameters of {tool.name!r}: their type must be object"
        raise ApiError(400, message, "tools")
    schema["x-guidance"] = {
        "lenient": not tool.strict,
        "whitespace_pattern": JSON_WHITE_SPACE,
    }
    return msgspec.json.encode(schema).decode()


def _quoted(text: str) -> str:
    return json.dumps(text)


def answer_format(key: str, **outputs: object) -> AnswerFormat:
    """
    Args:
        outputs: the one key of `StructuredOutputs`. A schema may be JSON, too.

    Raises ApiError if the pipeline would not take the value.
    """
    if isinstance(schema := outputs.get("json_schema"), dict):
        outputs["json_schema"] = msgspec.json.encode(schema).decode()
    try:
        return AnswerFormat(msgspec.convert(outputs, StructuredOutputs), key)
    except msgspec.ValidationError as error:
        _, reason = key_and_reason(error)
        raise ApiError(400, f"{key}: {reason}", key) from None
