"""Train the demo checkpoint: `python -m tools.demo_checkpoint.train --out DIR`.

Trains a byte-level BPE tokenizer of Qwen3's make and a Qwen3 model of a million parameters on text
from `documents`, in a quarter of an hour of one core, and writes a Hugging Face checkpoint of less
than 4 MB. The same seed and steps give the same text and tokenizer, and the same weights as far as
torch's kernels are deterministic on the machine. The checkpoint that is served had 2400 steps, and
then 360 more: `--start DIR --seed 1`.
"""

import itertools
import json
import logging
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

import click
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tools.demo_checkpoint.documents import Document, documents
from tools.demo_checkpoint.tokenizer import (
    END_OF_TEXT,
    MAX_MODEL_LEN,
    TURN_END,
    render,
    train_tokenizer,
    wrap,
)

log = logging.getLogger(__name__)

BATCH_DOCUMENTS: Final = 10
SORTED_BATCHES: Final = 40
PEAK_LEARNING_RATE: Final = 3e-3
PEAK_OF_MORE_TRAINING: Final = 1e-3
WARM_UP_STEPS: Final = 50
IGNORED: Final = -100
THINKING: Final = 0.65
"""The share of chats in which the model thinks."""


class Example(NamedTuple):
    """A document's token ids, of which the first `given` are a prompt and not learned."""

    token_ids: list[int]
    given: int


class Batch(NamedTuple):
    """Documents of about the same length, one a row, padded on the right.

    Attributes:
        tokens: int64 [rows, length].
        labels: int64 [rows, length], the token that follows each; IGNORED in prompts and padding.
    """

    tokens: torch.Tensor
    labels: torch.Tensor


def model_config(tokenizer: Tokenizer) -> Qwen3Config:
    """The shape: 8 query heads and 4 key/value heads, so that tp may be 1, 2, 4 or 8."""
    return Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=MAX_MODEL_LEN,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        # About 1/sqrt(hidden_size): with the default, made for wide models, learning starts late.
        initializer_range=0.07,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(END_OF_TEXT),
        dtype="bfloat16",
    )


def encode(document: Document, tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Example:
    """Tokenize a document with its end of sequence; of a chat, the last turn is learned."""
    if isinstance(document, str):
        return Example(list(tokenizer.encode(document + END_OF_TEXT)), given=1)
    rendered = render(document, thinking=rng.random() < THINKING)
    given = list(tokenizer.encode(rendered.prompt))
    return Example([*given, *tokenizer.encode(rendered.output)], given=len(given))


def batches(examples: Iterator[Example], rng: random.Random, pad: int) -> Iterator[Batch]:
    """Batch documents of like length together, so that hardly any token of a row is padding.

    A row holds one document, from position 0: what the model will see when it serves. A batch has
    the same number of documents whatever their length, so a short answer weighs as much as a story.
    """
    while True:
        drawn = sorted(
            itertools.islice(examples, BATCH_DOCUMENTS * SORTED_BATCHES),
            key=lambda example: len(example.token_ids),
        )
        starts = list(range(0, len(drawn), BATCH_DOCUMENTS))
        rng.shuffle(starts)
        for start in starts:
            yield collate(drawn[start : start + BATCH_DOCUMENTS], pad)


def collate(examples: list[Example], pad: int) -> Batch:
    """Pad token ids to the longest row."""
    shape = (len(examples), max(len(example.token_ids) for example in examples))
    tokens = torch.full(shape, pad)
    labels = torch.full(shape, IGNORED)
    for row, (ids, given) in enumerate(examples):
        tokens[row, : len(ids)] = torch.tensor(ids)
        labels[row, given - 1 : len(ids) - 1] = torch.tensor(ids[given:])
    return Batch(tokens, labels)


def fit(
    model: Qwen3ForCausalLM, training: Iterator[Batch], peak: float, steps: int, minutes: float
) -> float:
    """Train in place with AdamW and a cosine schedule; returns the mean loss of the last steps.

    The schedule goes down from the learning rate `peak`. It follows whichever is further along, the
    steps or the minutes, so that the learning rate reaches its end when training does.
    """
    model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.98),
    )
    started = time.monotonic()
    recent: list[float] = []
    with tqdm(total=steps, desc="training", unit="step") as progress:
        for step, batch in enumerate(training):
            done = max(step / steps, (time.monotonic() - started) / (60 * minutes))
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = peak * schedule(step, done)
            hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state
            learned = batch.labels != IGNORED
            loss = functional.cross_entropy(model.lm_head(hidden[learned]), batch.labels[learned])
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            recent = [*recent[-49:], loss.item()]
            progress.set_postfix(loss=f"{sum(recent) / len(recent):.3f}", refresh=False)
            progress.update()
    return sum(recent) / len(recent)


def schedule(step: int, done: float) -> float:
    """Linear warm-up to 1, then a cosine down to a fiftieth; `done` is from 0 to 1."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the Hugging Face checkpoint: configuration, bf16 weights and tokenizer files."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.detach().to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    config = model.config.to_dict()
    for clutter in ("_name_or_path", "id2label", "label2id", "problem_type", "return_dict"):
        config.pop(clutter, None)
    config |= {"architectures": ["Qwen3ForCausalLM"], "dtype": "bfloat16"}
    write_json(out / "config.json", config)
    ends = tokenizer.convert_tokens_to_ids([TURN_END, END_OF_TEXT])
    write_json(
        out / "generation_config.json",
        {"do_sample": True, "temperature": 0.7, "eos_token_id": ends, "pad_token_id": ends[1]},
    )
    tokenizer.save_pretrained(out)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write JSON as people read it."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Checkpoint directory.")
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    help="Train for no longer than this; fewer steps then, and weights that depend on the machine.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=2400, show_default=True, help="Optimizer steps."
)
@click.option("--seed", default=0, show_default=True, help="Of the text and the weights.")
@click.option(
    "--start",
    type=click.Path(exists=True, path_type=Path),
    help="Train this checkpoint further; with another --seed, so that the text is new.",
)
def main(out: Path, minutes: float, steps: int, seed: int, start: Path | None) -> None:
    """Train the demo checkpoint and write it to --out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(seed)
    if start is None:
        bare, peak = train_tokenizer(seed), PEAK_LEARNING_RATE
        model = Qwen3ForCausalLM(model_config(bare)).float()
    else:
        bare, peak = Tokenizer.from_file(str(start / "tokenizer.json")), PEAK_OF_MORE_TRAINING
        model = Qwen3ForCausalLM.from_pretrained(start, dtype=torch.float32)
    tokenizer = wrap(bare)
    log.info("%d parameters, %d tokens", model.num_parameters(), len(tokenizer))
    rng = random.Random(seed)
    examples = (encode(document, tokenizer, rng) for document in documents(seed + 1))
    training = batches(examples, rng, tokenizer.pad_token_id)
    loss = fit(model, training, peak, steps, minutes)
    save(model, tokenizer, out)
    size = sum(path.stat().st_size for path in out.iterdir())
    log.info("loss %.3f; %s holds %.2f MB", loss, out, size / 1e6)


if __name__ == "__main__":
    main()
