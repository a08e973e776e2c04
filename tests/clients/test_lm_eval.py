"""lm-eval's `local-completions`: a task of choices and one of generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.support.pipeline import Pipeline
from nanovllm import Client, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT
from tests.http.server import Server

pytest.importorskip("lm_eval")

TIMEOUT_S = 240.0
QUESTIONS = ["Once upon a time there was a", "The fox and the"]
OTHERS = [" bird", " cat. \N{GRINNING FACE}"]

COMMON = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
target_delimiter: ""
"""
CHOICES = """
output_type: multiple_choice
doc_to_choice: "{{answers}}"
doc_to_target: 0
metric_list: [{metric: acc}]
"""
GENERATION = """
output_type: generate_until
doc_to_target: "{{answers[0]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, temperature: 0}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def samples(
    server: Server, pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """What lm-eval says of each question, by task. The first answer is the model's own."""
    directory = tmp_path_factory.mktemp("lm_eval")
    data = directory / "questions.jsonl"
    own = SamplingParams(temperature=0, max_tokens=3)
    with Client(pipeline.endpoint) as raw:
        answers = [[raw.generate(question, own).text, *OTHERS] for question in QUESTIONS]
    rows = [{"question": q, "answers": a} for q, a in zip(QUESTIONS, answers, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for task, rest in (("choices", CHOICES), ("generation", GENERATION)):
        (directory / f"{task}.yaml").write_text(COMMON.format(task=task, data=data) + rest)
    model = f"model=demo,base_url={server.url}/v1/completions,tokenizer={DEMO_CHECKPOINT}"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "local-completions"]
    command += ["--model_args", f"{model},tokenizer_backend=huggingface,max_retries=1"]
    command += ["--tasks", "choices,generation", "--include_path", str(directory)]
    command += ["--batch_size", "4", "--log_samples", "--output_path", str(directory / "out")]
    offline = {"HF_HOME": str(directory / "hf"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(
        command, env={**os.environ, **offline}, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    found: dict[str, list[dict[str, Any]]] = {}
    for path in (directory / "out").rglob("samples_*.jsonl"):
        task = path.name.split("_")[1]
        found[task] = sorted(map(json.loads, path.open()), key=lambda sample: sample["doc_id"])
    return found


def test_loglikelihoods_are_the_models(
    samples: dict[str, list[dict[str, Any]]], server: Server, pipeline: Pipeline
) -> None:
    greedy: set[bool] = set()
    with Client(pipeline.endpoint) as raw:
        for sample, question in zip(samples["choices"], QUESTIONS, strict=True):
            context = len(tokens_of(server, question))
            answers = sample["doc"]["answers"]
            for answer, response in zip(answers, sample["filtered_resps"], strict=True):
                params = SamplingParams(max_tokens=1, prompt_logprobs=1)
                prompt = tokens_of(server, question + answer)
                entries = raw.generate(prompt, params).prompt_logprobs
                assert entries is not None
                told = [entry for entry in entries[context:] if entry]
                logprob, is_greedy = float(response[0]), response[1] in (True, "True")
                assert logprob == pytest.approx(sum(e[0][1] for e in told), abs=1e-3)
                assert is_greedy == all(e[0][0] == e[1][0] for e in told)
                greedy.add(is_greedy)
    assert greedy == {True, False}


def test_generation_is_the_pipelines(
    samples: dict[str, list[dict[str, Any]]], pipeline: Pipeline
) -> None:
    params = SamplingParams(temperature=0, max_tokens=12, stop=["."])
    with Client(pipeline.endpoint) as raw:
        texts = [raw.generate(question, params).text for question in QUESTIONS]
    assert [sample["filtered_resps"] for sample in samples["generation"]] == [[t] for t in texts]


def tokens_of(server: Server, text: str) -> list[int]:
    tokens: list[int] = server.post("/tokenize", {"prompt": text}).json["tokens"]
    return tokens
