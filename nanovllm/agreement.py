"""In what the services of one pipeline agree, whatever machines they run on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

import msgspec

from nanovllm import __version__
from nanovllm.settings import JOINING, Settings

# Options that each machine has of its own.
OWN_OPTIONS: Final = {
    *("services", "join", "advertise", "insecure", "keys", "runtime_dir", "gpus"),
    *("log_level", "log_format", "http", "tls_certificate", "tls_key"),
    *("api_key_file", "admin_key_file"),
    *JOINING,
}
# Taken from the pipeline, unless the machine's command line says otherwise.
FREE_OPTIONS: Final = {
    *("model", "device", "tensor_parallel_size", "attention", "enforce_eager", "sim_step_ms"),
    *("gpu_memory_utilization", "num_kvcache_blocks", "pipeline_depth", "max_num_seqs"),
    *("max_prefill_tokens", "cors", "drain_timeout", "otlp"),
}
# Of each file of weights, so many bytes at its end are in the fingerprint.
_SAMPLE_BYTES: Final = 1 << 16


def agreement(settings: Settings, directory: Path) -> str:
    """Equal for services that may work together, and for no others: of the version, the model in
    `directory`, and the options that a machine does not choose. Empty for a pipeline that no other
    machine can join."""
    if not settings.services and not settings.join:
        return ""
    agreed = msgspec.structs.asdict(settings)
    for name in (*OWN_OPTIONS, *FREE_OPTIONS, "ingress"):
        del agreed[name]
    simulated = settings.device == "sim"
    told = [__version__, fingerprint(directory), simulated, agreed]
    return hashlib.sha256(msgspec.json.encode(told, order="sorted")).hexdigest()


def fingerprint(directory: Path) -> str:
    """Tells models apart: of config.json, tokenizer.json, and samples of the weights."""
    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (directory / name).exists():
            digest.update((directory / name).read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as weights:
            weights.seek(max(0, size - _SAMPLE_BYTES))
            digest.update(weights.read())
    return digest.hexdigest()
