"""Writes down what a Python process unpickles. Every one does so that starts with this directory on
its PYTHONPATH and `NANOVLLM_TEST_AUDIT` in its environment, in a file there that is named by its
pid: its command line, then where each class or function was looked up for a pickle."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

RECORD = Path(os.environ["NANOVLLM_TEST_AUDIT"]) / str(os.getpid())


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if event == "pickle.find_class":
        where = " < ".join(f"{f.filename}:{f.lineno}" for f in traceback.extract_stack()[-2::-1])
        with RECORD.open("a") as record:
            record.write(f"{arguments} at {where}\n")


RECORD.write_text(" ".join(sys.orig_argv).replace("\n", " ") + "\n")
sys.addaudithook(_hook)
