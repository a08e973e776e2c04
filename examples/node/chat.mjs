// A client of nanovllm's ingress in another language: streams one chat, and aborts another.
//
//   nanovllm-launch &            # in the project: a pipeline with the demo model
//   npm install
//   node chat.mjs [ENDPOINT]     # default tcp://127.0.0.1:5555
//
// All that it takes is a DEALER socket and MessagePack maps; docs/protocol.md has every key.

import { decode, encode } from "@msgpack/msgpack";
import { Dealer } from "zeromq";

const endpoint = process.argv[2] ?? "tcp://127.0.0.1:5555";
const ANSWER_TIMEOUT_MS = 60_000;

// Messages go both ways at any time, so what arrives is sorted by the id of its request.
class Client {
  #socket = new Dealer({ linger: 0, receiveTimeout: ANSWER_TIMEOUT_MS });
  #inboxes = new Map();

  constructor(endpoint) {
    this.#socket.connect(endpoint);
  }

  send(message) {
    return this.#socket.send(encode(message));
  }

  // Sends a request, and yields the messages that answer it until the last one.
  async *request(message) {
    const inbox = [];
    this.#inboxes.set(message.id, inbox);
    await this.send(message);
    for (;;) {
      while (inbox.length === 0) await this.#receive();
      const answer = inbox.shift();
      if (answer.type === "error") throw new Error(`${answer.code}: ${answer.message}`);
      yield answer;
      if (answer.type === "finish" || answer.type === "pong") break;
    }
    this.#inboxes.delete(message.id);
  }

  close() {
    this.#socket.close();
  }

  // One frame holds an array of messages, perhaps of several requests. Seeds are int64.
  async #receive() {
    const [frame] = await this.#socket.receive();
    for (const message of decode(frame, { useBigInt64: true })) {
      this.#inboxes.get(message.id)?.push(message);
    }
  }
}

async function streamChat(client) {
  const request = {
    type: "generate",
    id: "chat",
    messages: [{ role: "user", content: "Tell me a story about a fox." }],
    sampling: { temperature: 0.6, max_tokens: 200, seed: 7 },
  };
  for await (const message of client.request(request)) {
    if (message.type === "delta") process.stdout.write(message.text);
    if (message.type === "finish") {
      const { prompt_tokens, completion_tokens } = message.usage;
      console.log(
        `\n[${message.finish_reason}: ${prompt_tokens} + ${completion_tokens} tokens]`,
      );
    }
  }
}

async function abortChat(client) {
  const request = {
    type: "generate",
    id: "aborted",
    messages: [{ role: "user", content: "Tell me another one." }],
    // Without an end of sequence it would go on for as long as the model's length allows.
    sampling: { max_tokens: 100_000, ignore_eos: true },
  };
  let deltas = 0;
  for await (const message of client.request(request)) {
    if (message.type === "delta" && ++deltas === 3) {
      await client.send({ type: "abort", id: request.id });
    }
    if (message.type === "finish") {
      console.log(`[${message.finish_reason}, after ${message.usage.completion_tokens} tokens]`);
      if (message.finish_reason !== "abort") throw new Error("it was not aborted");
    }
  }
}

const client = new Client(endpoint);
try {
  for await (const pong of client.request({ type: "ping", id: "ping" })) {
    console.log(`${pong.model} at ${endpoint}`);
  }
  await streamChat(client);
  await abortChat(client);
} catch (error) {
  const silent = error.code === "EAGAIN";
  console.error(silent ? `no pipeline answers at ${endpoint}` : String(error));
  process.exitCode = 1;
} finally {
  client.close();
}
