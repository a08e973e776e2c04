"""The commands of a terminal: Ctrl-C ends them quietly at any time, also while they import."""

from __future__ import annotations

import sys

from nanovllm.exit_codes import EXIT_INTERRUPTED


def main() -> None:
    try:
        from nanovllm.client.cli import main

        main(prog_name="nanovllm")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def launch() -> None:
    try:
        from nanovllm.launch.cli import main

        main(prog_name="nanovllm-launch")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


def on_ray() -> None:
    try:
        from nanovllm.ray.cli import main

        main(prog_name="nanovllm-ray")
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
