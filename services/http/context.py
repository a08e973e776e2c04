"""What the application knows: the pipeline, the model that it serves, and what is counted."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nanovllm.checkpoint.generation import SamplingDefaults, read_sampling_defaults
from nanovllm.client.aio import AsyncClient
from nanovllm.protocol import Reasoning
from nanovllm.services.http.metrics import Recorder
from nanovllm.services.http.turns import Turns
from nanovllm.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model, as HTTP clients see it.

    Attributes:
        name: what requests call the model.
        directory: the checkpoint.
        max_model_len: tokens that prompt and output may have together.
        defaults: how to sample where a request does not say.
        token_text: of each token id its bytes; of a special token, those of its name.
        silent: the special tokens: they add nothing to an output's text.
        reasoning: the tokens around reasoning; None where the tokenizer has none.
    """

    name: str
    directory: Path
    max_model_len: int
    defaults: SamplingDefaults
    token_text: dict[int, bytes]
    silent: frozenset[int]
    reasoning: Reasoning | None

    @classmethod
    def from_checkpoint(
        cls, directory: Path, name: str, max_model_len: int, *, generation_config: bool = True
    ) -> ServedModel:
        """Reads the checkpoint's files.

        Args:
            generation_config: whether the sampling defaults are generation_config.json's.

        Raises:
            CheckpointError: a file is malformed.
        """
        vocabulary = Vocabulary.from_checkpoint(directory)
        names = {token_id: content.encode() for content, token_id in vocabulary.added.items()}
        begin, end = vocabulary.added.get("<think>"), vocabulary.added.get("</think>")
        return cls(
            name=name,
            directory=directory,
            max_model_len=max_model_len,
            defaults=read_sampling_defaults(directory) if generation_config else SamplingDefaults(),
            token_text={**names, **vocabulary.text},
            silent=frozenset(names) - frozenset(vocabulary.text),
            reasoning=None if begin is None or end is None else Reasoning(begin, end),
        )


@dataclass(frozen=True, slots=True)
class DoorContext:
    """What `make_app` is given.

    A middleware may put `client_name` into a request's `scope["state"]`: whose request it is, for
    the turns that clients take. Without, that is the address that the request comes from.
    """

    client: AsyncClient
    model: ServedModel
    recorder: Recorder = field(default_factory=Recorder)
    turns: Turns = field(default_factory=Turns)
