"""Which GPUs each engine takes."""

from __future__ import annotations

import ctypes
import os

from nanovllm.settings import Settings, SettingsError

VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"


class Gpus:
    """The GPUs of a pipeline, in the order in which engines take them.

    Engine e takes those from e * tp on. Its workers see these alone, as `CUDA_VISIBLE_DEVICES`
    says. With one engine and without `--gpus` workers see what the launcher sees.

    Attributes:
        engines: how many there are.

    Raises:
        SettingsError: `--gpus` cannot be used, or there are too few GPUs for the engines.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._chosen = _chosen(settings.gpus)
        if self._chosen is not None and settings.device in ("cpu", "sim"):
            raise SettingsError(f"--gpus goes with --device cuda, not with {settings.device}")
        self.scale(settings.engines)

    def scale(self, engines: int) -> None:
        """There are so many engines from now on. Raises SettingsError if there are too few GPUs."""
        self._check(engines)
        self.engines = engines

    def environment(self, engine: int) -> dict[str, str]:
        """What the environment of this engine's workers has beside the launcher's."""
        if not self._assigned(self.engines) or not (gpus := self._gpus()):
            return {}
        size = self._settings.tensor_parallel_size
        return {VISIBLE_VARIABLE: ",".join(gpus[engine * size : (engine + 1) * size])}

    def _check(self, engines: int) -> None:
        if not self._assigned(engines):
            return
        gpus, size = self._gpus(), self._settings.tensor_parallel_size
        if not gpus and self._chosen is None and self._settings.device == "auto":
            return  # they run on the CPU
        if len(gpus) < engines * size:
            raise SettingsError(
                f"--engines {engines} with --tp {size} take {engines * size} GPUs, and there are"
                f" {len(gpus)}"
            )

    def _assigned(self, engines: int) -> bool:
        if self._settings.device in ("cpu", "sim"):
            return False
        return engines > 1 or self._chosen is not None

    def _gpus(self) -> list[str]:
        """Names of the GPUs that engines may take, as `CUDA_VISIBLE_DEVICES` has them."""
        count = count_gpus()
        visible = os.environ.get(VISIBLE_VARIABLE)
        names = [*map(str, range(count))] if visible is None else visible.split(",")[:count]
        if self._chosen is None:
            return names
        if max(self._chosen) >= count:
            raise SettingsError(f"--gpus {self._settings.gpus}: {count} GPUs are visible here")
        return [names[gpu] for gpu in self._chosen]


def _chosen(option: str) -> list[int] | None:
    """The numbers of `--gpus`; None if the option is not given."""
    if not option:
        return None
    words = [word.strip() for word in option.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise SettingsError(f"--gpus {option}: must be numbers of GPUs with commas, as 0,1,4,5")
    chosen = [*map(int, words)]
    if len(set(chosen)) < len(chosen):
        raise SettingsError(f"--gpus {option}: names a GPU twice")
    return chosen


def count_gpus() -> int:
    """How many GPUs CUDA sees here, asked without torch."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
