"""The worker process: `python -m nanovllm.services.gpu_worker`."""

from functools import partial
from importlib import import_module

from nanovllm.quietly import quietly

if __name__ == "__main__":
    quietly(partial(import_module, "nanovllm.services.gpu_worker.process")).main()
