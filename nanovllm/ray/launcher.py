"""`python -m nanovllm.ray.launcher DIRECTORY …`: a launcher that ends with who has started it.

Its stdin is a pipe that breaks with the actor, however the actor ends. Then the launcher removes
DIRECTORY, which has keys, and ends at once. It tells nobody that the pipeline is over: the actor
comes back.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
from functools import partial

from nanovllm.launch.cli import main as launch

STDIN = 0


def main() -> None:
    directory, *arguments = sys.argv[1:]
    remove = partial(shutil.rmtree, directory, ignore_errors=True)

    def end_with_the_actor() -> None:
        while os.read(STDIN, 1):
            pass
        remove()
        os._exit(1)

    threading.Thread(target=end_with_the_actor, name="lifeline", daemon=True).start()
    try:
        launch(arguments, prog_name="nanovllm-launch")
    finally:
        remove()


if __name__ == "__main__":
    main()
