"""Random JSON schemas, of keywords that grammars support."""

from __future__ import annotations

import random
import string
from typing import Any

Schema = dict[str, Any]
DEPTH = 2


def random_schema(draw: random.Random, depth: int = DEPTH) -> Schema:
    """Values of it are short: what a schema leaves open, a model at a high temperature does not
    end soon."""
    kinds = ["integer", "number", "string", "boolean", "enum", "pattern", "null"]
    if depth:
        kinds += ["object", "array", "anyOf", "tuple"] * 2
    if depth == DEPTH:  # a reference's path begins at the root
        kinds += ["ref"] * 2
    kind = draw.choice(kinds)
    if kind == "integer":
        low = draw.randint(-200, 200)
        return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 1000)}
    if kind == "number":
        low = draw.randint(-9, 9)
        return {"type": "number", "exclusiveMinimum": low, "maximum": low + draw.randint(1, 9)}
    if kind == "string":
        shortest = draw.randint(0, 3)
        return {"type": "string", "minLength": shortest, "maxLength": shortest + draw.randint(0, 6)}
    if kind == "enum":
        values = [_word(draw), 'é\n"\\', draw.randint(-9, 9), None, True, [1, "a"], {"b": 2.5}]
        return {"enum": draw.sample(values, draw.randint(1, 4))}
    if kind == "pattern":
        return {"type": "string", "pattern": draw.choice(["^[a-f]{2,5}$", "^(ab|cd)+[0-9]?$"])}
    if kind == "object":
        names = [_word(draw) for _ in range(draw.randint(0, 4))]
        schema: Schema = {
            "type": "object",
            "properties": {name: random_schema(draw, depth - 1) for name in names},
            "required": [name for name in dict.fromkeys(names) if draw.random() < 0.7],
            "additionalProperties": False,
        }
        return schema
    if kind == "array":
        shortest = draw.randint(0, 2)
        return {
            "type": "array",
            "items": random_schema(draw, depth - 1),
            "minItems": shortest,
            "maxItems": shortest + draw.randint(0, 2),
        }
    if kind == "tuple":
        first = [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]
        return {
            "type": "array",
            "prefixItems": first,
            "items": False,
            "minItems": len(first),
            "maxItems": len(first),
        }
    if kind == "anyOf":
        return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    if kind == "ref":
        name = draw.choice(["node", "Other"])
        return {
            "$defs": {name: random_schema(draw, 0)},
            "type": "object",
            "properties": {"a": {"$ref": f"#/$defs/{name}"}, "b": {"$ref": f"#/$defs/{name}"}},
            "required": ["a"],
            "additionalProperties": False,
        }
    return {"type": kind}


def _word(draw: random.Random) -> str:
    return "".join(draw.choices(string.ascii_letters + "_-é ", k=draw.randint(1, 8)))
