// One answer of the model, as it streams in.

import { ask, events, pause, Refused, Unreachable } from "./server.js";

// So long an answer waits for an HTTP server that has died, or that is about to end.
const PATIENCE_MS = 60_000;
const AGAIN_MS = 250;
const TIMED = { "X-Nanovllm-Timings": "1" };
const PASSING = new Set(["shutting_down", "unavailable"]);

/** Whether a call's arguments are there to their end, and not broken or cut off. */
export function isWhole({ arguments: text }) {
  try {
    return JSON.parse(text) instanceof Object;
  } catch {
    return false;
  }
}

export const emptyAnswer = () => ({ role: "assistant", reasoning: "", content: "", calls: [] });

/**
 * Streams an answer; calls `show` with it whenever more of it is there. Resolves to its usage, and to
 * its timings: name and µs of each phase. The last phase, "door", is the rest of the time that it took.
 *
 * A death behind the HTTP server is a pause of the stream. If the HTTP server itself dies, the same
 * question with the same seed gets the same answer from the next one.
 */
export async function stream(request, show, signal) {
  const asked = { ...request, seed: crypto.getRandomValues(new Uint32Array(1))[0] >>> 1 };
  let shown = 0;
  const askedAt = performance.now();
  let triedAt = askedAt;
  for (;;) {
    const answer = emptyAnswer();
    try {
      const response = await ask("/v1/chat/completions", { body: asked, headers: TIMED, signal });
      let end = {};
      for await (const data of events(response)) {
        if (data === "[DONE]") return { ...end, timings: timingsOf(end, performance.now() - askedAt) };
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Refused(500, chunk.error.code, chunk.error.message);
        end = { ...end, ...take(answer, chunk) };
        if (size(answer) > shown) {
          shown = size(answer);
          triedAt = performance.now();
          show(answer);
        }
      }
    } catch (error) {
      if (signal.aborted) throw error;
      const passes = error instanceof Unreachable || (error instanceof Refused && PASSING.has(error.code));
      if (!passes) throw error;
    }
    if (performance.now() - triedAt > PATIENCE_MS) throw new Error("the server does not answer");
    await pause(AGAIN_MS);
  }
}

/** Adds a chunk to the answer; the finish reason and the usage, if the chunk has them. */
function take(answer, chunk) {
  const end = {};
  if (chunk.usage) end.usage = chunk.usage;
  for (const { delta, finish_reason: reason } of chunk.choices) {
    if (reason) end.reason = reason;
    answer.reasoning += delta.reasoning_content ?? "";
    answer.content += delta.content ?? "";
    for (const piece of delta.tool_calls ?? []) {
      const call = (answer.calls[piece.index] ??= { id: "", name: "", arguments: "" });
      call.id ||= piece.id ?? "";
      call.name += piece.function.name ?? "";
      call.arguments += piece.function.arguments ?? "";
    }
  }
  return end;
}

function timingsOf({ usage }, ms) {
  const timings = usage?.timings ?? [];
  const known = timings.reduce((sum, [, us]) => sum + us, 0);
  return timings.length ? [...timings, ["door", Math.max(0, Math.round(ms * 1000) - known)]] : [];
}

function size({ reasoning, content, calls }) {
  const called = calls.reduce((sum, call) => sum + call.name.length + call.arguments.length, 0);
  return reasoning.length + content.length + called;
}
