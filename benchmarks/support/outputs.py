"""A structured output that is longer than any, so that it ends as other outputs do."""

from __future__ import annotations

import json

from nanovllm.protocol import StructuredOutputs

ENDLESS_JSON = StructuredOutputs(
    json_schema=json.dumps(
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
                "required": ["name", "age"],
                "additionalProperties": False,
            },
            "minItems": 1000,
        }
    )
)
