// The `openai` package as a client of nanovllm's HTTP server: streams one chat.
//
//   nanovllm-launch &            # in the project: a pipeline with the demo model
//   npm install
//   node openai.mjs [URL]        # default http://127.0.0.1:8000/v1

import OpenAI from "openai";

const baseURL = process.argv[2] ?? "http://127.0.0.1:8000/v1";
const client = new OpenAI({ baseURL, apiKey: "none" });

const models = await client.models.list();
const stream = await client.chat.completions.create({
  model: models.data[0].id,
  messages: [{ role: "user", content: "Tell me a story." }],
  max_tokens: 200,
  stream: true,
  stream_options: { include_usage: true },
});
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0]?.delta.content ?? "");
  if (chunk.usage) console.log(`\n[${chunk.usage.completion_tokens} tokens]`);
}
