"""nanovllm: an LLM inference server for Qwen models, built as a pipeline of small processes.

What programs import is here, and loaded when it is asked for: a service that imports
`nanovllm.messages` pays for no client.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanovllm.client.aio import AsyncClient as AsyncClient
    from nanovllm.client.aio import AsyncStream as AsyncStream
    from nanovllm.client.results import Completion as Completion
    from nanovllm.client.results import Delta as Delta
    from nanovllm.client.results import PipelineUnavailable as PipelineUnavailable
    from nanovllm.client.results import RequestError as RequestError
    from nanovllm.client.sync import Client as Client
    from nanovllm.client.sync import Stream as Stream
    from nanovllm.llm import LLM as LLM
    from nanovllm.llm_requests import LLMOutput as LLMOutput
    from nanovllm.protocol import StructuredOutputs as StructuredOutputs
    from nanovllm.sampling_params import SamplingParams as SamplingParams

__version__ = "0.1.0"
_MODULES = {
    "nanovllm.client.aio": ("AsyncClient", "AsyncStream"),
    "nanovllm.client.results": ("Completion", "Delta", "PipelineUnavailable", "RequestError"),
    "nanovllm.client.sync": ("Client", "Stream"),
    "nanovllm.llm": ("LLM",),
    "nanovllm.llm_requests": ("LLMOutput",),
    "nanovllm.protocol": ("StructuredOutputs",),
    "nanovllm.sampling_params": ("SamplingParams",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'nanovllm' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
