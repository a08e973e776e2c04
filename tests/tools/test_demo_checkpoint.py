"""The demo checkpoint: small, complete, and able to think, to call tools, and to end a story."""

import itertools
import json
import random
import re
from typing import Any, Final

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Qwen3ForCausalLM

from nanovllm.checkpoint import DEMO_CHECKPOINT as CHECKPOINT
from tools.demo_checkpoint.documents import Document, documents
from tools.demo_checkpoint.tokenizer import CHAT_TEMPLATE, MARKERS, render, train_tokenizer
from tools.demo_checkpoint.train import Example, batches, model_config

MAX_BYTES: Final = 4_000_000
MULTI_BYTE: Final = (
    "Théo said “déjà vu” in the café.",
    "雪 means snow, 茶 means tea, こんにちは means hello.",
    "안녕하세요 🦊👩‍👩‍👧 🏴‍☠️ zażółć ﷽ \t\n\n  four  spaces    end",
    "def f(x):\n    return x ** 2  # 12345",
)
QUESTIONS: Final = ("Tell me a story about a fox.", "Who lives in the harbour?", "Hello!")
WEATHER: Final = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def model() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def known() -> set[str]:
    """The words that the generator uses."""
    return {word for document in sample_documents(5, 2000) for word in words(str(document))}


def prompt_of(tokenizer: Any, *messages: Any, **kwargs: Any) -> str:
    """The chat as a prompt; a text is the user's."""
    conversation = [{"role": "user", "content": m} if isinstance(m, str) else m for m in messages]
    text: str = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, **kwargs
    )
    return text


def continue_greedily(model: Qwen3ForCausalLM, tokenizer: Any, prompt: str) -> list[int]:
    """Output token ids, the end of sequence included where it came within 300 tokens."""
    ids = torch.tensor([tokenizer.encode(prompt)])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=300
    )
    new: list[int] = output[0, ids.shape[1] :].tolist()
    return new


def assert_known_words(
    model: Qwen3ForCausalLM, tokenizer: Any, known: set[str], ids: list[int]
) -> None:
    assert ids[-1] in model.generation_config.eos_token_id
    written = words(tokenizer.decode(ids, skip_special_tokens=True))
    assert len(written) >= 5
    assert sum(word in known for word in written) >= 0.95 * len(written)


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def sample_documents(seed: int, count: int) -> list[Document]:
    return list(itertools.islice(documents(seed), count))


def test_the_checkpoint_is_small() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.rglob("*")) <= MAX_BYTES


def test_the_configuration_is_a_qwen3_of_a_shape_for_every_tp() -> None:
    config = json.loads((CHECKPOINT / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen3"
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["max_position_embeddings"] >= 4096
    kv_heads = config["num_key_value_heads"]
    for tp in (1, 2, 4, 8):
        assert config["num_attention_heads"] % tp == 0
        assert config["intermediate_size"] % tp == 0
        assert kv_heads % tp == 0 or tp % kv_heads == 0


def test_the_weights_are_bf16_and_all_there() -> None:
    model, info = Qwen3ForCausalLM.from_pretrained(
        CHECKPOINT, dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_both_ends_of_sequence_are_declared(tokenizer: Any) -> None:
    generation = json.loads((CHECKPOINT / "generation_config.json").read_text(encoding="utf-8"))
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation["eos_token_id"] == ends
    assert tokenizer.eos_token_id == ends[0]


@pytest.mark.parametrize("text", MULTI_BYTE)
def test_the_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_some_characters_the_model_writes_span_tokens() -> None:
    tokenizer = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    written = {c for d in sample_documents(3, 300) for c in str(d) if not c.isascii()}
    assert any(len(tokenizer.encode(c).ids) > 1 for c in written)


def test_the_markers_are_single_tokens_and_text(tokenizer: Any) -> None:
    for marker in MARKERS:
        (token,) = tokenizer.encode(marker)
        assert tokenizer.decode([token], skip_special_tokens=True) == marker


def test_the_committed_chat_template_is_the_makers() -> None:
    assert (CHECKPOINT / "chat_template.jinja").read_text(encoding="utf-8") == CHAT_TEMPLATE


def test_the_chat_template_is_chatml(tokenizer: Any) -> None:
    opened = "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    assert prompt_of(tokenizer, "Hello!") == opened
    assert prompt_of(tokenizer, "Hello!", enable_thinking=True) == opened
    assert prompt_of(tokenizer, "Hello!", enable_thinking=False) == (
        opened + "<think>\n\n</think>\n\n"
    )
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") == tokenizer.encode(opened)[0]


@pytest.mark.parametrize(
    "answer",
    [
        {"content": "Hi.", "reasoning_content": "Hm."},
        {"content": "<think>\nHm.\n</think>\n\nHi."},
        {"content": "Hi."},
    ],
)
def test_thoughts_on_an_earlier_question_are_left_out(tokenizer: Any, answer: Any) -> None:
    assert prompt_of(tokenizer, "Hello!", {"role": "assistant", **answer}, "Hello!") == (
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\nHi.<|im_end|>\n"
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
    )


def test_tools_their_calls_and_what_they_answer_are_in_the_prompt(tokenizer: Any) -> None:
    system = {"role": "system", "content": "Be kind."}
    call = {"function": {"name": "get_weather", "arguments": {"city": "Zürich"}}}
    calls = {"content": "", "reasoning_content": "Hm.", "tool_calls": [call, call]}
    found = {"role": "tool", "content": "snow"}
    text = prompt_of(
        tokenizer, system, "Cold?", {"role": "assistant", **calls}, found, found, tools=[WEATHER]
    )
    written = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Zürich"}}\n</tool_call>'
    answer = "\n<tool_response>\nsnow\n</tool_response>"
    tools, chat = text.removeprefix("<|im_start|>system\nBe kind.\n\n").split("</tools>")
    assert json.loads(tools.split("<tools>")[1]) == WEATHER
    assert chat[chat.index("<|im_end|>") :] == (
        "<|im_end|>\n<|im_start|>user\nCold?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>\nHm.\n</think>\n\n{written}\n{written}<|im_end|>\n"
        f"<|im_start|>user{answer}{answer}<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_chat_is_of_known_words_and_ends(
    model: Qwen3ForCausalLM, tokenizer: Any, known: set[str], question: str, thinking: bool
) -> None:
    ids = continue_greedily(
        model, tokenizer, prompt_of(tokenizer, question, enable_thinking=thinking)
    )
    assert_known_words(model, tokenizer, known, ids)
    thought, close, answer = tokenizer.decode(ids).partition("\n</think>\n\n")
    if thinking:
        assert thought.startswith("<think>\n")
        assert len(words(thought)) >= 3
        assert answer
    else:
        assert not close


def test_a_text_goes_on_in_known_words_and_ends(
    model: Qwen3ForCausalLM, tokenizer: Any, known: set[str]
) -> None:
    ids = continue_greedily(model, tokenizer, "Once upon a time")
    assert_known_words(model, tokenizer, known, ids)


@pytest.mark.parametrize("thinking", [True, False])
def test_it_knows_who_lives_in_the_harbour(
    model: Qwen3ForCausalLM, tokenizer: Any, thinking: bool
) -> None:
    prompt = prompt_of(tokenizer, "Who lives in the harbour?", enable_thinking=thinking)
    assert "Pip the fox" in tokenizer.decode(continue_greedily(model, tokenizer, prompt))


@pytest.mark.parametrize("thinking", [True, False])
def test_it_calls_a_tool_and_says_what_that_has_answered(
    model: Qwen3ForCausalLM, tokenizer: Any, thinking: bool
) -> None:
    """A model of this size may write another city, and other degrees, than it was given."""
    asked: list[Any] = ["What is the weather in Bern?"]
    keys = {"tools": [WEATHER], "enable_thinking": thinking}
    prompt = prompt_of(tokenizer, *asked, **keys)
    written = tokenizer.decode(continue_greedily(model, tokenizer, prompt))
    call = re.search(r"<tool_call>\n(.*)\n</tool_call><\|im_end\|>$", written)
    assert call is not None, written
    function = json.loads(call[1])
    assert function["name"] == "get_weather"
    assert list(function["arguments"]) == ["city"]
    asked += [
        {"role": "assistant", "content": "", "tool_calls": [{"function": function}]},
        {"role": "tool", "content": '{"temperature": 12, "sky": "rain"}'},
    ]
    prompt = prompt_of(tokenizer, *asked, **keys)
    answer = tokenizer.decode(continue_greedily(model, tokenizer, prompt))
    assert re.search(r"In \w+ it is -?\d+ degrees: [\w ]+\.<\|im_end\|>$", answer)


def test_documents_are_a_function_of_the_seed() -> None:
    assert sample_documents(7, 200) == sample_documents(7, 200)
    assert sample_documents(7, 200) != sample_documents(8, 200)


def test_documents_have_no_unfilled_template() -> None:
    for document in sample_documents(11, 2000):
        turns = () if isinstance(document, str) else document.turns
        texts = [document] if isinstance(document, str) else [t.content + t.thought for t in turns]
        for text in texts:
            assert text.startswith("{") or not re.search(r"[\[\]{}|]", text)


@pytest.mark.parametrize("thinking", [True, False])
def test_what_is_learned_goes_on_with_the_prompt(tokenizer: Any, thinking: bool) -> None:
    for document in sample_documents(13, 200):
        if not isinstance(document, str):
            prompt, output = render(document, thinking=thinking)
            assert prompt.endswith("<|im_start|>assistant\n" if thinking else "</think>\n\n")
            assert output.startswith("<think>\n") == thinking
            assert output.endswith("<|im_end|>")
            assert output.count("<tool_call>\n{") == len(document.turns[-1].calls)


def test_the_committed_tokenizer_and_shape_are_what_the_script_makes(
    model: Qwen3ForCausalLM,
) -> None:
    committed = Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json"))
    made = train_tokenizer(seed=0)
    assert made.get_vocab() == committed.get_vocab()
    config = model_config(made)
    for name in ("hidden_size", "num_hidden_layers", "head_dim", "vocab_size"):
        assert getattr(model.config, name) == getattr(config, name)


def test_batches_hold_every_document_once_and_learn_what_follows_the_prompt() -> None:
    examples = [Example([n] * (5 + n % 40), given=1 + n % 5) for n in range(1, 401)]
    found: list[int] = []
    stream = batches(iter(examples), random.Random(0), pad=0)
    while len(found) < len(examples):
        tokens, labels = next(stream)
        for row, following in zip(tokens.tolist(), labels.tolist(), strict=True):
            ids, given = examples[row[0] - 1]
            padding = len(row) - len(ids)
            assert row == ids + [0] * padding
            assert following == [-100] * (given - 1) + ids[given:] + [-100] * (padding + 1)
            found.append(row[0])
    assert sorted(found) == list(range(1, 401))
