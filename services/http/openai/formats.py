"""What the answer of a chat or a completion must be: `response_format`, and vLLM's keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
from msgspec import Meta

from nanovllm.protocol import NonEmptyStr
from nanovllm.services.http.constraints import (
    ANY_ANSWER,
    AnswerFormat,
    JsonSchema,
    ToolMode,
    ToolName,
    answer_format,
)
from nanovllm.services.http.errors import ApiError

if TYPE_CHECKING:
    from nanovllm.services.http.openai.requests import SamplingKeys

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


class NamedTool(msgspec.Struct):
    function: ToolName
    type: Literal["function"] = "function"


ToolChoice = ToolMode | NamedTool


def asked_format(ask: SamplingKeys) -> AnswerFormat:
    """What the request says of the whole answer.

    Raises:
        ApiError: it says so in more than one way.
    """
    keys = ask.structured_outputs or StructuredKeys()
    asked = ask.response_format
    schema = asked.json_schema.schema if isinstance(asked, JsonSchemaFormat) else None
    is_object = isinstance(asked, JsonObjectFormat)
    found: list[tuple[str, str, object]] = [
        (key, outputs, value)
        for key, outputs, value in (
            ("response_format", "json_schema", schema),
            ("response_format", "json_object", is_object or None),
            ("structured_outputs", "json_schema", keys.json),
            ("structured_outputs", "json_object", keys.json_object or None),
            ("structured_outputs", "regex", keys.regex),
            ("structured_outputs", "choice", keys.choice),
            ("structured_outputs", "grammar", keys.grammar),
            ("guided_json", "json_schema", ask.guided_json),
            ("guided_regex", "regex", ask.guided_regex),
            ("guided_choice", "choice", ask.guided_choice),
            ("guided_grammar", "grammar", ask.guided_grammar),
        )
        if value is not None
    ]
    if len(found) > 1:
        keys_found = ", ".join(dict.fromkeys(key for key, _, _ in found))
        message = f"{keys_found}: the answer can be only one of these"
        raise ApiError(400, message, found[0][0])
    return answer_format(found[0][0], **{found[0][1]: found[0][2]}) if found else ANY_ANSWER
