"""Which services a pipeline starts with, in groups that start and end together."""

from __future__ import annotations

from nanovllm.names import ServiceId
from nanovllm.settings import Settings

INGRESS = ServiceId("ingress", 0)


def groups_of(settings: Settings, first: int) -> list[list[ServiceId]]:
    """One group of all ranks of an engine (one_for_all), and one of each other service
    (one_for_one). Numbers count from `first` on."""

    def each(role: str, count: int) -> list[list[ServiceId]]:
        return [[ServiceId(role, first + i)] for i in range(count)]

    return [
        *([] if settings.join else [[INGRESS]]),
        *[group for i in range(settings.engines) for group in engine_groups(settings, first + i)],
        *each("tokenizer", settings.tokenizers),
        *each("detokenizer", settings.detokenizers),
        *each("http", settings.http_servers if settings.http else 0),
    ]


def engine_groups(settings: Settings, engine: int) -> list[list[ServiceId]]:
    ranks = range(settings.tensor_parallel_size)
    return [
        [ServiceId("scheduler", 0, engine)],
        [ServiceId("gpu_worker", rank, engine) for rank in ranks],
    ]
