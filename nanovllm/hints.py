"""Options that other engines have, and what nanovllm calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click


class HintingCommand(click.Command):
    """A command that knows what people try.

    Args:
        hints: for an option that the command does not have, what to use instead.
    """

    def __init__(self, *args: Any, hints: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hints = hints

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = self._hints.get(error.option_name)
            if hint is None:
                raise
            message = f"No such option: {error.option_name}; nanovllm has {hint}."
            raise click.UsageError(message, ctx) from None


_INGRESS = "--ingress tcp://HOST:PORT"
_AS_IT_IS = "no such thing: a checkpoint is served as it is"
LAUNCH_HINTS = {
    "--host": _INGRESS,
    "--port": _INGRESS,
    "--endpoint": _INGRESS,
    "--model": "MODEL without an option in front",
    "--model-path": "MODEL without an option in front",
    "--tp-size": "--tp",
    "--dp-size": "--dp",
    "--data-parallel-size": "--dp",
    "--context-length": "--max-model-len",
    "--max-running-requests": "--max-num-seqs",
    "--chunked-prefill-size": "--max-prefill-tokens",
    "--mem-fraction-static": "--gpu-memory-utilization",
    "--block-size": "--kvcache-block-size",
    "--page-size": "--kvcache-block-size",
    "--num-gpu-blocks-override": "--num-kvcache-blocks",
    "--attention-backend": "--attention",
    "--disable-cuda-graph": "--enforce-eager",
    "--trust-remote-code": _AS_IT_IS,
}
_ENDPOINT = "--endpoint tcp://HOST:PORT"
REQUEST_HINTS = {
    "--host": _ENDPOINT,
    "--port": _ENDPOINT,
    "--url": _ENDPOINT,
    "--ingress": _ENDPOINT,
    "--max-new-tokens": "--max-tokens",
    "--system-prompt": "chat --system",
}
