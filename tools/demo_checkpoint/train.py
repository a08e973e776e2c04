"""Train the demo checkpoint: `python -m tools.demo_checkpoint.train --out DIR`.

Trains a byte-level BPE tokenizer of Qwen2's make and a Qwen3 model of a million parameters on text
from `chats.documents`, in a few minutes on two cores, and writes a Hugging Face checkpoint of less
than 4 MB. The same seed and steps give the same text and tokenizer, and the same weights as far as
torch's kernels are deterministic on the machine.
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
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from tools.demo_checkpoint.chats import Document, documents

log = logging.getLogger(__name__)

END_OF_TEXT: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
MAX_MODEL_LEN: Final = 4096

SPLIT: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern that cuts text into words before BPE, as in the Qwen2 and Qwen3 tokenizers."""

CHAT_TEMPLATE: Final = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""
"""ChatML; `enable_thinking` false opens the answer with empty thoughts, as Qwen3's does."""

VOCAB_SIZE: Final = 1280
BATCH_DOCUMENTS: Final = 10
SORTED_BATCHES: Final = 40
TOKENIZER_DOCUMENTS: Final = 4000
PEAK_LEARNING_RATE: Final = 3e-3
WARM_UP_STEPS: Final = 50
IGNORED: Final = -100


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


def train_tokenizer(seed: int) -> Tokenizer:
    """Train the byte-level BPE on a sample of the text; every byte is in its alphabet."""
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    added = [AddedToken(token, special=True) for token in (END_OF_TEXT, TURN_START, TURN_END)]
    added += [AddedToken(token, special=False) for token in ("<think>", "</think>")]
    sample = (
        text
        for document in itertools.islice(documents(seed), TOKENIZER_DOCUMENTS)
        for text in ([document] if isinstance(document, str) else [t.content for t in document])
    )
    tokenizer.train_from_iterator(
        itertools.chain(sample, ["system", "user", "assistant"] * TOKENIZER_DOCUMENTS),
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE - len(added),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # After the vocabulary rather than before it, as Qwen has them.
    tokenizer.add_special_tokens(added[:3])
    tokenizer.add_tokens(added[3:])
    return tokenizer


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Give the tokenizer its special tokens' roles and the chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_MODEL_LEN,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


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
    """Tokenize a document with its end of sequence; of a chat, the last answer is learned."""
    if isinstance(document, str):
        return Example(list(tokenizer.encode(document + END_OF_TEXT)), given=1)
    opened = tokenizer.apply_chat_template(
        [turn._asdict() for turn in document[:-1]],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=rng.random() < 0.8,
    )
    given = list(tokenizer.encode(opened))
    answer = tokenizer.encode(document[-1].content + TURN_END)
    return Example([*given, *answer], given=len(given))


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


def fit(model: Qwen3ForCausalLM, training: Iterator[Batch], steps: int, minutes: float) -> float:
    """Train in place with AdamW and a cosine schedule; returns the mean loss of the last steps.

    The schedule follows whichever is further along, the steps or the minutes, so that the learning
    rate reaches its end when training does.
    """
    model.train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
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
                group["lr"] = learning_rate(step, done)
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


def learning_rate(step: int, done: float) -> float:
    """Linear warm-up, then a cosine down to a fiftieth of the peak; `done` is from 0 to 1."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    return PEAK_LEARNING_RATE * warm * (0.02 + 0.49 * (1 + math.cos(math.pi * done)))


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
    config["architectures"] = ["Qwen3ForCausalLM"]
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
    default=10.0,
    show_default=True,
    help="Train for no longer than this; fewer steps then, and weights that depend on the machine.",
)
@click.option(
    "--steps", type=click.IntRange(min=1), default=2400, show_default=True, help="Optimizer steps."
)
@click.option("--seed", default=0, show_default=True, help="Of the text and the weights.")
def main(out: Path, minutes: float, steps: int, seed: int) -> None:
    """Train the demo checkpoint and write it to --out."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(seed)
    bare = train_tokenizer(seed)
    tokenizer = wrap(bare)
    model = Qwen3ForCausalLM(model_config(bare)).float()
    log.info("%d parameters, %d tokens", model.num_parameters(), len(tokenizer))
    rng = random.Random(seed)
    examples = (encode(document, tokenizer, rng) for document in documents(seed + 1))
    training = batches(examples, rng, tokenizer.pad_token_id)
    loss = fit(model, training, steps, minutes)
    save(model, tokenizer, out)
    size = sum(path.stat().st_size for path in out.iterdir())
    log.info("loss %.3f; %s holds %.2f MB", loss, out, size / 1e6)


if __name__ == "__main__":
    main()
