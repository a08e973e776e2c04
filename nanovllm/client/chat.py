"""`nanovllm chat`: what was said so far, what the person types, and the chat's own commands."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from nanovllm.client.answers import cut, dim, note, show
from nanovllm.client.results import Delta, PipelineUnavailable, RequestError
from nanovllm.client.sync import Client, Stream
from nanovllm.sampling_params import SamplingParams
from nanovllm.wording import counted

if TYPE_CHECKING:
    from prompt_toolkit.history import History

# The user's message, and the answer.
Turn = list[dict[str, str]]

HELP: Final = """\
/system TEXT  sets the system message; without TEXT there is none
/clear        begins a new chat; the system message stays
/exit         ends the chat, as Ctrl-D does
Alt-Enter begins a new line of a message, and a pasted text is one message. Ctrl-C stops an answer.
A message that begins with / goes out with a space in front."""


class Chat:
    """A conversation with the model behind `client`.

    Args:
        params: how answers are drawn.
        template: goes to the chat template.
        system: the system message, if any.
    """

    def __init__(
        self,
        client: Client,
        params: SamplingParams,
        template: Mapping[str, Any] | None,
        system: str | None,
    ) -> None:
        self._client = client
        self._params = params
        self._template = template
        self._system = system
        self._turns: list[Turn] = []
        self._answering = False  # Ctrl-C stops an answer, once, and nothing else

    def say(self, text: str) -> bool:
        """Prints the answer to `text`; False if Ctrl-C stopped the answer.

        What was said without an answer is forgotten, and so are the oldest turns where the chat no
        longer fits the model.

        Raises:
            RequestError, PipelineUnavailable, ValueError: see `Client.generate`.
        """
        started = time.perf_counter()
        turns = [*self._turns, [{"role": "user", "content": text}]]
        try:
            stream, begin = self._begin(turns)
        except KeyboardInterrupt:
            click.echo()
            return False
        shown = show(stream, begin)
        if shown.text or shown.completion:
            turns[-1].append({"role": "assistant", "content": shown.text})
            self._turns = turns
        if shown.completion is None:
            return False
        tokens = shown.completion.usage.completion_tokens
        rate = tokens / (time.perf_counter() - started)
        told = f"{counted(tokens, 'token')}, {rate:.0f} tokens/s"
        note("; ".join(filter(None, [told, cut(shown.completion, self._params.max_tokens)])))
        return True

    def run(self) -> None:
        """Talks until the end of input, or /exit. Without a terminal, Ctrl-C ends the chat too."""
        typed = sys.stdin.isatty() and sys.stdout.isatty()
        if typed:
            signal.signal(signal.SIGINT, self._on_ctrl_c)
        for text in _typed() if typed else _piped():
            command = re.fullmatch(r"(/[a-z]+)(?:\s+(.*))?\s*", text, re.DOTALL)
            if command is not None and command[1] == "/exit":
                return
            if command is not None:
                click.echo(self._obey(command[1], command[2]))
                continue
            try:
                self._answering = True
                if not self.say(text) and not typed:
                    raise KeyboardInterrupt
            except (RequestError, PipelineUnavailable, ValueError) as error:
                self._answering = False
                click.echo(f"Error: {error}", err=True)
            except KeyboardInterrupt:
                if not typed:
                    raise
            self._answering = False

    def _on_ctrl_c(self, *_: object) -> None:
        if self._answering:
            self._answering = False
            raise KeyboardInterrupt

    def _begin(self, turns: list[Turn]) -> tuple[Stream, list[Delta]]:
        """The stream of the answer to the last of `turns`, and its first delta. The oldest turns
        are removed until the others fit the model."""
        system = [{"role": "system", "content": self._system}] if self._system else []
        forgotten = 0
        while True:
            messages = system + [message for turn in turns for message in turn]
            stream = self._client.chat(
                messages, self._params, stream=True, chat_template_kwargs=self._template
            )
            try:
                begin = [delta for delta in [next(stream, None)] if delta is not None]
                break
            except RequestError as error:
                if error.code != "context_length_exceeded" or len(turns) == 1:
                    raise
                del turns[0]
                forgotten += 1
            except BaseException:
                stream.close()
                raise
        if forgotten:
            oldest = "oldest turn is" if forgotten == 1 else f"{forgotten} oldest turns are"
            told = f"[the chat no longer fits the model: its {oldest} forgotten]"
            click.echo(dim(told), err=True)
        return stream, begin

    def _obey(self, command: str, text: str | None) -> str:
        """Does what a command says; what to tell the person."""
        if command == "/help":
            return HELP
        if command == "/clear":
            self._turns.clear()
            return "A new chat."
        if command == "/system":
            self._system = text or None
            return "The system message is set." if text else "There is no system message."
        return f"There is no {command}; /help lists what there is."


def _piped() -> Iterator[str]:
    """The lines of stdin, each a message."""
    for line in sys.stdin:
        if line.strip():
            yield line.rstrip("\n")


def _typed() -> Iterator[str]:
    """The messages that the person types, until Ctrl-D; Ctrl-C discards a message."""
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    keys = KeyBindings()

    @keys.add("escape", "enter")
    def begin_a_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    session = PromptSession[str](history=_history(), key_bindings=keys)
    while True:
        try:
            text = session.prompt("> ")
        except EOFError:
            return
        except KeyboardInterrupt:
            continue
        if text.strip():
            yield text


def _history() -> History:
    """What was typed in earlier chats: in a file that only this user reads."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    path = Path(os.environ.get("XDG_STATE_HOME") or "~/.local/state").expanduser()
    path = path / "nanovllm" / "chat_history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.open("ab").close()
    except OSError:
        return InMemoryHistory()
    return FileHistory(path)
