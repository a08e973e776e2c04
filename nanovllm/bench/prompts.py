"""What is asked: conversations of random token ids, or from a file."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import numpy as np

from nanovllm.bench.arrivals import Arrival
from nanovllm.bench.files import InputFileError, decoded, json_lines, read
from nanovllm.bench.work import Lengths
from nanovllm.protocol import Sampling

# Random token ids are drawn from these: every vocabulary has them, and none is special.
RANDOM_IDS: Final = 5, 250
MAX_SEED: Final = 2**53

Message = dict[str, Any]
# Text, token ids or chat messages.
Prompt = str | list[int] | list[Message]


class Turn(NamedTuple):
    """One request: what it adds to the turns and answers before it, and how it is sampled."""

    prompt: Prompt
    sampling: Sampling


# The turns follow one another at once. Text has one turn only.
Conversation = Sequence[Turn]


class Shape(NamedTuple):
    """Lengths, in tokens, of what a turn adds and of its output.

    The first `shared_prefix` tokens of a conversation are one of so many `prefixes`.
    """

    input: Lengths
    output: Lengths
    shared_prefix: int = 0
    prefixes: int = 1
    turns: int = 1


def random_ids(draw: np.random.Generator, length: int) -> list[int]:
    ids: list[int] = draw.integers(*RANDOM_IDS, size=length).tolist()
    return ids


def _length(draw: np.random.Generator, lengths: Lengths) -> int:
    return int(draw.integers(lengths.low, lengths.high + 1))


def random_conversations(
    seed: int,
    shape: Shape,
    sampling: Sampling,
    arrivals: Iterable[Arrival] | None = None,
) -> Iterator[Conversation]:
    """Conversations of random token ids.

    Args:
        seed: the same seed gives the same conversations.
        arrivals: a conversation for each; the lengths of an arrival come before those of `shape`.
            None: conversations without end.
    """
    draw = np.random.default_rng(seed)

    @functools.cache
    def prefix(index: int) -> list[int]:
        # Only when it is used: all at once, many would make the first requests late.
        return random_ids(np.random.default_rng([seed, index]), shape.shared_prefix)

    for arrival in itertools.repeat(Arrival(0.0)) if arrivals is None else arrivals:
        prompt = prefix(int(draw.integers(shape.prefixes)))
        turns = []
        for _ in range(shape.turns):
            length = arrival.input or _length(draw, shape.input)
            # The lengths of a trace are those of whole prompts.
            own = max(1, length - len(prompt)) if arrival.input else length
            prompt = prompt + random_ids(draw, own)
            turns.append(Turn(prompt, _sampling(draw, sampling, arrival, shape.output)))
            prompt = []
        yield turns


def file_conversations(
    prompts: Sequence[Sequence[Prompt]],
    seed: int,
    turns: int,
    output: Lengths,
    sampling: Sampling,
    arrivals: Iterable[Arrival] | None = None,
) -> Iterator[Conversation]:
    """Conversations of these prompts in their order, again from the first after the last.

    Args:
        prompts: of each conversation, what its turns say.
        seed, arrivals: as for `random_conversations`.
        turns: at most.
        output: lengths in tokens at most.
    """
    draw = np.random.default_rng(seed)
    each = itertools.repeat(Arrival(0.0)) if arrivals is None else arrivals
    for said, arrival in zip(itertools.cycle(prompts), each, strict=False):
        yield [Turn(prompt, _sampling(draw, sampling, arrival, output)) for prompt in said[:turns]]


def _sampling(
    draw: np.random.Generator, sampling: Sampling, arrival: Arrival, output: Lengths
) -> Sampling:
    return msgspec.structs.replace(
        sampling,
        max_tokens=arrival.output or _length(draw, output),
        seed=int(draw.integers(MAX_SEED)),
    )


class _Line(msgspec.Struct):
    prompt: str | None = None
    messages: list[Message] | None = None


class _Said(msgspec.Struct):
    who: str = msgspec.field(name="from")
    value: str


class _ShareGPT(msgspec.Struct):
    conversations: list[_Said]


def read_prompts(path: Path) -> list[list[Prompt]]:
    """Of each conversation in the file, what its turns say.

    The file is ShareGPT's JSON, of which a conversation has as many turns as its people spoke; or
    JSON lines with `prompt` (text) or `messages` (a chat, one turn).

    Raises:
        InputFileError: the file cannot be read, is neither, or has no prompt.
    """
    raw = read(path)  # once: it may be a pipe
    if raw.lstrip()[:1] == b"[":
        entries = decoded(raw, list[_ShareGPT], str(path))
        prompts = [_spoken(entry.conversations) for entry in entries]
    else:
        prompts = []
        for number, line in json_lines(raw, _Line, path):
            if bool(line.prompt) == bool(line.messages):
                raise InputFileError(
                    f"{path}, line {number}: give it prompt or messages, and only one of the two"
                )
            try:
                msgspec.msgpack.encode(line.messages)
            except OverflowError as error:
                raise InputFileError(f"{path}, line {number}: messages: {error}") from None
            prompts.append([line.prompt or line.messages or ""])
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise InputFileError(f"{path} has no prompt")
    return prompts


def _spoken(conversation: list[_Said]) -> list[Prompt]:
    """What the person said, turn by turn; a system message goes with the first turn."""
    turns: list[Prompt] = []
    system: list[Message] = []
    for said in conversation:
        if said.who == "system" and not turns:
            system.append({"role": "system", "content": said.value})
        elif said.who in ("human", "user") and said.value:
            turns.append([*system, {"role": "user", "content": said.value}])
            system = []
    return turns
