"""Crashes services of one role when they meet a chosen token, as a bug in native code would.

Python imports this module first where its directory is on the PYTHONPATH. `NANOVLLM_TEST_FAULT` is
`ROLE:TOKEN`: every gpu_worker (of the simulated device) ends by SIGABRT when TOKEN is in a sequence
that it is to compute, every tokenizer when TOKEN is in a prompt that it has encoded. The event loop
of an HTTP server stands still when the path TOKEN is asked for.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping

from nanovllm.grammars import Matcher
from nanovllm.messages import StepPlan, Tokenize, unpack

ROLE, _, TOKEN = os.environ["NANOVLLM_TEST_FAULT"].partition(":")


def crash_if_in(tokens: bytes | None) -> None:
    if tokens is not None and int(TOKEN) in unpack(tokens):
        os.abort()


def break_gpu_worker() -> None:
    from nanovllm.services.gpu_worker.sim import SimRunner

    launch = SimRunner.launch

    def launch_or_crash(self: SimRunner, plan: StepPlan, matchers: Mapping[int, Matcher]) -> None:
        for admission in plan.admit:
            crash_if_in(admission.tokens)
        launch(self, plan, matchers)

    SimRunner.launch = launch_or_crash  # type: ignore[method-assign]


def break_tokenizer() -> None:
    from nanovllm.services.tokenizer.prompts import PromptEncoder

    encode = PromptEncoder.encode

    def encode_or_crash(self: PromptEncoder, request: Tokenize) -> object:
        result = encode(self, request)
        crash_if_in(request.prompt_token_ids)
        return result

    PromptEncoder.encode = encode_or_crash  # type: ignore[assignment, method-assign]


def break_http() -> None:
    from starlette.types import Receive, Scope, Send

    from nanovllm.services.http.gate import Guard

    call = Guard.__call__

    async def call_or_hang(self: Guard, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == TOKEN:
            time.sleep(600)
        await call(self, scope, receive, send)

    Guard.__call__ = call_or_hang  # type: ignore[method-assign]


if f"nanovllm.services.{ROLE}" in sys.orig_argv:
    {"gpu_worker": break_gpu_worker, "tokenizer": break_tokenizer, "http": break_http}[ROLE]()
