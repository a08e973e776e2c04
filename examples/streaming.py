"""Many streams at once from a running pipeline (`nanovllm-launch` starts one).

python examples/streaming.py [ENDPOINT]
"""

import asyncio
import sys

from nanovllm import AsyncClient, SamplingParams
from nanovllm.settings import DEFAULT_INGRESS

PROMPTS = ["Once upon a time", "In the harbour", "A fox"]


async def tell(client: AsyncClient, prompt: str) -> None:
    params = SamplingParams(temperature=0.6, max_tokens=100)
    stream = client.generate(prompt, params, stream=True)
    async for delta in stream:
        print(f"{prompt!r} + {delta.text!r}")
    completion = await stream.result()
    print(f"\n{prompt}{completion.text} [{completion.finish_reason}]\n")


async def main() -> None:
    endpoint = sys.argv[1] if len(sys.argv) > 1 else DEFAULT_INGRESS
    async with AsyncClient(endpoint) as client, asyncio.TaskGroup() as tasks:
        for prompt in PROMPTS:
            tasks.create_task(tell(client, prompt))


if __name__ == "__main__":
    asyncio.run(main())
