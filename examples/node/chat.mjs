// A client of nanovllm's ingress in another language: streams one chat, and aborts another. Where its
// connection ends, it connects again, and goes on where it was.
//
//   nanovllm-launch &                       # in the project: a pipeline with the demo model
//   npm install
//   node chat.mjs [ENDPOINT [KEY_FILE]]     # default tcp://127.0.0.1:5555, and NANOVLLM_KEYS
//
// All that it takes is a DEALER socket and MessagePack maps; docs/protocol.md has every key.

import { readFileSync } from "node:fs";
import { decode, encode } from "@msgpack/msgpack";
import { Dealer } from "zeromq";

const endpoint = process.argv[2] ?? "tcp://127.0.0.1:5555";
const keyFile = process.argv[3] ?? process.env.NANOVLLM_KEYS;
const ANSWER_TIMEOUT_MS = 60_000;
const RECONNECT_MS = 500;

// The socket options for a pipeline with keys, from a file that `nanovllm keygen` has made.
function curveOptions(file) {
  if (!file || !endpoint.startsWith("tcp:")) return {};
  const text = readFileSync(file, "utf8");
  const key = (name) => {
    const found = text.match(new RegExp(`^\\s*${name}\\s*=\\s*"(.{40})"`, "m"));
    if (!found) throw new Error(`${file} has no ${name}`);
    return found[1];
  };
  return {
    curveServerKey: key("server-key"),
    curvePublicKey: key("public-key"),
    curveSecretKey: key("secret-key"),
  };
}

// Messages go both ways at any time, so what arrives is sorted by the id of its request.
class Client {
  #endpoint;
  #options;
  #socket;
  #refused = false;
  #heardAt = Date.now();
  #told = false; // that the connection has ended, since the last answer
  #pending = new Map(); // by id: the request, as it is to be sent again, and what has arrived

  constructor(endpoint, options) {
    this.#endpoint = endpoint;
    this.#options = { linger: 0, receiveTimeout: ANSWER_TIMEOUT_MS, ...options };
    this.#connect();
  }

  async send(message) {
    const socket = this.#socket;
    try {
      await socket.send(encode(message, { useBigInt64: true }));
    } catch (error) {
      this.#throwIfLast(socket, error);
    }
  }

  // Sends a request, and yields the messages that answer it until the last one.
  async *request(message) {
    const inbox = [];
    this.#pending.set(message.id, { message, inbox });
    await this.send(message);
    for (;;) {
      while (inbox.length === 0) await this.#receive();
      const answer = inbox.shift();
      if (answer.type === "error") throw new Error(`${answer.code}: ${answer.message}`);
      yield answer;
      if (answer.type === "finish" || answer.type === "pong") break;
    }
    this.#pending.delete(message.id);
  }

  close() {
    this.#socket.close();
  }

  // A session is one connection, so each gets a socket of its own: nothing that was meant for an
  // earlier session is sent in the next one.
  #connect() {
    const socket = new Dealer(this.#options);
    for (const reason of ["auth", "protocol"]) {
      socket.events.on(`handshake:error:${reason}`, () => (this.#refused = true));
    }
    socket.events.on("disconnect", () => setTimeout(() => this.#reconnect(socket), RECONNECT_MS));
    socket.connect(this.#endpoint);
    this.#socket = socket;
  }

  #reconnect(ended) {
    if (this.#socket !== ended || ended.closed) return;
    if (!this.#refused) {
      if (!this.#told) console.error("[disconnected; going on]");
      this.#told = true;
      this.#connect();
      for (const { message } of this.#pending.values()) this.send(message);
    }
    ended.close();
  }

  // After a socket's error: most often the socket was closed, and there is another one. An open one
  // has waited for ANSWER_TIMEOUT_MS, by a clock that can be ahead of Date.now().
  #throwIfLast(socket, error) {
    if (this.#refused) throw new Error(`${this.#endpoint} refuses this client's key, or its lack of one`);
    if (!socket.closed || Date.now() - this.#heardAt >= ANSWER_TIMEOUT_MS) throw error;
  }

  // One frame holds an array of messages, perhaps of several requests. Seeds are int64.
  async #receive() {
    const socket = this.#socket;
    let frame;
    try {
      [frame] = await socket.receive();
    } catch (error) {
      this.#throwIfLast(socket, error);
      return;
    }
    this.#heardAt = Date.now();
    this.#told = false;
    for (const message of decode(frame, { useBigInt64: true })) {
      const request = this.#pending.get(message.id);
      if (request === undefined) continue;
      request.message = resumed(request.message, message);
      request.inbox.push(message);
    }
  }
}

// The request that goes on after this answer, should the connection end now.
function resumed(request, answer) {
  if (answer.type === "accepted") {
    return { ...request, sampling: { ...request.sampling, seed: answer.seed } };
  }
  if (answer.type === "delta") {
    const had = request.resume_token_ids ?? [];
    return { ...request, resume_token_ids: [...had, ...answer.token_ids] };
  }
  return request;
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

const options = curveOptions(keyFile);
const client = new Client(endpoint, options);
try {
  for await (const pong of client.request({ type: "ping", id: "ping" })) {
    console.log(`${pong.model} at ${endpoint}`);
  }
  await streamChat(client);
  await abortChat(client);
} catch (error) {
  const silent = error.code !== undefined; // one of ZeroMQ's
  const orKey = options.curveServerKey ? ", or it has another server-key" : "";
  console.error(silent ? `no pipeline answers at ${endpoint}${orKey}` : String(error));
  process.exitCode = 1;
} finally {
  client.close();
}
