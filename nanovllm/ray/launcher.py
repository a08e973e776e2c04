"""`python -m nanovllm.ray.launcher DIRECTORY …`: a launcher that ends with who has started it.

Its stdin is a pipe that breaks with the actor, however the actor ends. Then the launcher removes
DIRECTORY, which has keys, and ends.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading

from nanovllm.launch.cli import main as launch
from nanovllm.service import LIFELINE_VARIABLE

STDIN = 0


def main() -> None:
    directory, *arguments = sys.argv[1:]
    # Whoever has started Ray may have it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[LIFELINE_VARIABLE] = str(STDIN)
    threading.Thread(target=_interrupt_at_the_end, name="lifeline", daemon=True).start()
    try:
        launch(arguments, prog_name="nanovllm-launch")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _interrupt_at_the_end() -> None:
    """A launcher looks at its lifeline only once it has joined: until then a signal ends it."""
    while os.read(STDIN, 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
