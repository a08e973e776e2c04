"""Kernels as they are compiled for a GPU, on a machine without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# A few to join what threads have found. Where Triton lays out tiles in another way than the kernels
# were made for, what each thread has goes through shared memory, with 70 barriers and more.
MOST_BARRIERS = 20


def test_threads_of_one_decode_keep_what_they_have() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=300,
    )
    barriers = json.loads(ran.stdout)
    assert set(barriers) == {"_attend", "_joined"}
    assert all(0 < count <= MOST_BARRIERS for count in barriers.values()), barriers
