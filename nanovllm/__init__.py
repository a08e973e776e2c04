"""nanovllm: an LLM inference server for Qwen3, built as a pipeline of small processes.

What programs import is here, and loaded when it is asked for: a service that imports
`nanovllm.messages` pays for no client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.client.aio import AsyncClient, AsyncStream
    from nanovllm.client.errors import PipelineUnavailable, RequestError
    from nanovllm.client.results import Completion, Delta
    from nanovllm.client.sync import Client, Stream
    from nanovllm.llm import LLM
    from nanovllm.sampling_params import SamplingParams

    __version__: str

__all__ = [
    "LLM",
    "AsyncClient",
    "AsyncStream",
    "Client",
    "Completion",
    "Delta",
    "PipelineUnavailable",
    "RequestError",
    "SamplingParams",
    "Stream",
    "__version__",
]

_HOMES = {
    "LLM": "nanovllm.llm",
    "AsyncClient": "nanovllm.client.aio",
    "AsyncStream": "nanovllm.client.aio",
    "Client": "nanovllm.client.sync",
    "Completion": "nanovllm.client.results",
    "Delta": "nanovllm.client.results",
    "PipelineUnavailable": "nanovllm.client.errors",
    "RequestError": "nanovllm.client.errors",
    "SamplingParams": "nanovllm.sampling_params",
    "Stream": "nanovllm.client.sync",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("nanovllm")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
