"""Offline generation: chats in, answers out.

python examples/quickstart.py                        # the small demo model, no GPU needed
python examples/quickstart.py ~/models/Qwen3-0.6B    # a checkpoint directory
"""

import os
import sys

from transformers import AutoTokenizer

from nanovllm import LLM, SamplingParams
from nanovllm.checkpoint import DEMO_CHECKPOINT


def main() -> None:
    path = os.path.expanduser(sys.argv[1]) if len(sys.argv) > 1 else str(DEMO_CHECKPOINT)
    tokenizer = AutoTokenizer.from_pretrained(path)
    llm = LLM(path, enforce_eager=True, tensor_parallel_size=1)

    questions = ["Tell me a story about a fox.", "Who are you?"]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.6, max_tokens=256))

    for question, output in zip(questions, outputs, strict=True):
        print(f"\n> {question}\n{output['text']}")


if __name__ == "__main__":
    main()
