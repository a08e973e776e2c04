"""What the application answers, as structs."""

from __future__ import annotations

from typing import Literal

import msgspec


class Model(msgspec.Struct, kw_only=True):
    id: str
    created: int
    max_model_len: int
    object: Literal["model"] = "model"
    owned_by: str = "nanovllm"


class ModelList(msgspec.Struct):
    data: list[Model]
    object: Literal["list"] = "list"


class Version(msgspec.Struct):
    version: str
