"""Claude Code, a coding agent that speaks Messages: its requests are answered, and errors have the
form that it reads."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nanovllm.protocol import Generate
from tests.client.double import Answer, ingress
from tests.http.server import Server, serving
from tests.http.test_chat import writes

PACKAGE = "@anthropic-ai/claude-code@2.1.197"
TIMEOUT_S = 120.0
# Of its own, the prompt is longer than the demo model's context.
SHORT = ("--system-prompt", "Tell stories.", "--tools", "")

pytestmark = pytest.mark.skipif(shutil.which("npm") is None, reason="npm is missing")


class Agent:
    """Claude Code in a directory of its own, and a home without settings."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory / "work"
        self._home = directory / "home"
        self.directory.mkdir()
        self._home.mkdir()
        self._program = directory / "node_modules" / ".bin" / "claude"
        subprocess.run(
            ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error", PACKAGE],
            cwd=directory,
            check=True,
            timeout=TIMEOUT_S,
        )

    def ask(self, server: Server, *words: str, model: str = "demo") -> dict[str, Any]:
        """What it prints."""
        ran = subprocess.run(
            [self._program, "--print", *words, "--model", model, "--output-format", "json"],
            cwd=self.directory,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self._home),
                "ANTHROPIC_BASE_URL": server.url,
                "ANTHROPIC_API_KEY": "none",
                "ANTHROPIC_DEFAULT_HAIKU_MODEL": model,
                "DISABLE_AUTOUPDATER": "1",
                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        assert ran.stdout.startswith("{"), ran.stdout + ran.stderr
        printed: dict[str, Any] = json.loads(ran.stdout)
        return printed


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Agent:
    return Agent(tmp_path_factory.mktemp("agent"))


def test_the_demo_model_answers(agent: Agent, server: Server) -> None:
    first = agent.ask(server, "Tell me a story.", *SHORT)
    then = agent.ask(server, "And then?", "--continue", *SHORT)
    for printed in (first, then):
        assert not printed["is_error"], printed
        assert printed["stop_reason"] == "end_turn"
        usage = printed["usage"]
        assert usage["input_tokens"] + usage["cache_read_input_tokens"] > 100
        assert usage["output_tokens"] > 0


def test_tools_run(agent: Agent) -> None:
    """A model that asks for a file to be written, and says so when it was."""
    path = agent.directory / "hello.txt"
    arguments = {"file_path": str(path), "content": "Hello, world.\n"}
    call = json.dumps({"name": "Write", "arguments": arguments})
    roles: list[list[str]] = []

    def script(message: Any, session: str) -> Iterator[Answer]:
        text = "It is written."
        if isinstance(message, Generate):
            roles.append([said["role"] for said in message.messages or []])
            if message.tools and roles[-1][-1] != "tool":
                text = f"I write.\n<tool_call>\n{call}\n</tool_call>"
        return writes(text, 0, [5, 9])(message, session)

    with ingress(script) as double, serving(double.endpoint) as server:
        printed = agent.ask(server, "Write.", "--permission-mode", "acceptEdits")
    assert printed["result"] == "It is written."
    assert path.read_text() == "Hello, world.\n"
    assert roles[-1][-2:] == ["assistant", "tool"]


def test_errors_are_read(agent: Agent, server: Server) -> None:
    unknown = agent.ask(server, "Hello.", *SHORT, model="other")
    assert (unknown["is_error"], unknown["api_error_status"]) == (True, 404)
    assert "model" in unknown["result"]
    long = agent.ask(server, "Hello.")
    assert (long["is_error"], long["api_error_status"]) == (True, 400)
    assert long["result"].startswith("Prompt is too long")
