"""Which GPUs each engine is given, and what is refused before anything is loaded."""

from __future__ import annotations

import pytest

from nanovllm.launch import gpus
from nanovllm.launch.gpus import Gpus
from nanovllm.settings import Settings, SettingsError


@pytest.fixture(autouse=True)
def four(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "count_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def visible(settings: Settings) -> list[str | None]:
    found = Gpus(settings)
    engines = settings.engines
    return [found.environment(e).get("CUDA_VISIBLE_DEVICES") for e in range(engines)]


def test_each_engine_takes_the_next_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert visible(Settings()) == [None], "one engine sees all, as ever"
    assert visible(Settings(engines=4)) == ["0", "1", "2", "3"]
    assert visible(Settings(engines=2, tensor_parallel_size=2)) == ["0,1", "2,3"]
    assert visible(Settings(engines=2, gpus="3, 1")) == ["3", "1"]
    assert visible(Settings(gpus="2")) == ["2"]
    assert visible(Settings(engines=2, device="cpu")) == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,GPU-6,7")
    assert visible(Settings(engines=2)) == ["4", "5"]
    assert visible(Settings(gpus="2,0", tensor_parallel_size=2)) == ["GPU-6,4"]


def test_without_a_gpu_engines_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "count_gpus", lambda: 0)
    assert visible(Settings(engines=2)) == [None, None]
    with pytest.raises(SettingsError, match="take 2 GPUs, and there are 0"):
        Gpus(Settings(engines=2, device="cuda"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Settings(engines=5), "--engines 5 with --tp 1 take 5 GPUs, and there are 4"),
        (Settings(engines=2, gpus="1"), "take 2 GPUs, and there are 1"),
        (Settings(gpus="4"), "--gpus 4: 4 GPUs are visible here"),
        (Settings(gpus="0,0"), "names a GPU twice"),
        (Settings(gpus="a"), "must be numbers"),
        (Settings(gpus="0,"), "must be numbers"),
        (Settings(gpus="0", device="sim"), "goes with --device cuda"),
    ],
)
def test_what_cannot_be_is_refused(settings: Settings, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        Gpus(settings)


def test_an_engine_more_is_refused_where_there_is_no_gpu_for_it() -> None:
    found = Gpus(Settings())
    found.scale(4)
    with pytest.raises(SettingsError, match="take 5 GPUs"):
        found.scale(5)
