// The chat: conversations, messages, and the answer that is being written.

import { emptyAnswer, isWhole, stream } from "./answer.js";
import { $, announce, el } from "./dom.js";
import { showMessages } from "./messages.js";
import { ask } from "./server.js";
import { Settings } from "./settings.js";

const TITLE = 40;

export class Chat {
  constructor(store) {
    this.store = store;
    this.running = null; // { conversation, abort, deaths, ... } while an answer is being written
    this.settings = new Settings(store);
    $("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send($("prompt").value);
    });
    $("prompt").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.send($("prompt").value);
    });
    $("stop").addEventListener("click", () => this.stop());
    $("new").addEventListener("click", () => this.#open(null));
    addEventListener("storage", ({ key }) => {
      if (this.store.hear(key, this.running?.conversation)) this.#show();
    });
    for (const example of $("welcome").querySelectorAll("button")) {
      example.addEventListener("click", () => {
        const { prompt, endless, tool } = example.dataset;
        this.settings.writeWithoutEnd(Boolean(endless));
        if (tool) this.settings.offerTool();
        this.send(prompt);
      });
    }
    addEventListener("pagehide", () => {
      if (this.running) this.running.answer.note = "Cut off: the page was left.";
      this.store.save();
    });
    this.#show();
  }

  get model() {
    this.named ??= ask("/v1/models")
      .then((response) => response.json())
      .then(({ data }) => data[0].id);
    this.named.catch(() => (this.named = null));
    return this.named;
  }

  /** Whether an answer is being written. */
  get answers() {
    return this.running !== null;
  }

  /** A process has died: the answer that is being written shows where. */
  died(name) {
    if (!this.running) return;
    const { deaths, answer } = this.running;
    deaths.push(name);
    if (answer.content) (answer.marks ??= []).push({ at: answer.content.length, name });
    this.#showMessages();
  }

  stop() {
    this.running?.abort.abort();
  }

  async send(text) {
    if (!text.trim() || this.running) return;
    $("prompt").value = "";
    const { current } = this.store;
    current.title ||= text.trim().slice(0, TITLE);
    current.messages.push({ role: "user", content: text.trim() });
    await this.#ask();
  }

  /** Takes a tool's result; asks the model again once all of its calls have one. */
  #give(call, result) {
    if (this.running) return;
    const { messages } = this.store.current;
    messages.push({ role: "tool", id: call.id, content: result });
    const { calls } = messages.findLast(({ role }) => role === "assistant");
    const given = new Set(messages.map(({ id }) => id));
    if (calls.filter(isWhole).every(({ id }) => given.has(id))) this.#ask();
    else this.#showMessages();
  }

  // What is asked, and how ---------------------------------------------------------------------

  async #ask() {
    const { current } = this.store;
    const answer = emptyAnswer();
    const abort = new AbortController();
    this.running = { conversation: current, abort, deaths: [], answer, began: performance.now(), first: null, last: null, longest: 0 };
    dispatchEvent(new Event("answering"));
    this.#buttons();
    this.#show();
    announce("The model answers.");
    try {
      const request = { model: await this.model, messages: this.#history(current), stream: true, stream_options: { include_usage: true }, ...this.settings.keys };
      current.messages.push(answer);
      this.#showMessages();
      const end = await stream(request, (news) => this.#news(news), abort.signal);
      answer.note = this.#note(end);
      answer.timings = end.timings;
    } catch (error) {
      if (!current.messages.includes(answer)) current.messages.push(answer);
      answer.note = abort.signal.aborted ? "Stopped." : "";
      answer.error = abort.signal.aborted ? "" : error.message;
    }
    this.running = null;
    dispatchEvent(new Event("answered"));
    this.store.save();
    this.#buttons();
    this.#show();
    announce(answer.error || answer.content || (answer.calls.length ? `The model calls ${answer.calls[0].name}.` : answer.note));
  }

  #history({ messages }) {
    const { system } = this.settings;
    const history = system ? [{ role: "system", content: system }] : [];
    for (const { role, content, reasoning, calls, id } of messages) {
      if (role === "tool") history.push({ role, content, tool_call_id: id });
      else if (role === "user") history.push({ role, content });
      else if (content || reasoning || calls.some(isWhole)) {
        const message = { role, content };
        if (reasoning) message.reasoning_content = reasoning;
        if (calls.some(isWhole)) {
          message.tool_calls = calls.filter(isWhole).map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
        }
        history.push(message);
      }
    }
    return history;
  }

  // The answer that comes ----------------------------------------------------------------------

  #news(news) {
    const { running } = this;
    const now = performance.now();
    running.first ??= now;
    if (running.last !== null) running.longest = Math.max(running.longest, now - running.last);
    running.last = now;
    Object.assign(running.answer, news);
    running.drawing ||= requestAnimationFrame(() => {
      running.drawing = 0;
      if (this.running === running) this.#showMessages();
    });
  }

  #note({ usage, reason }) {
    const { began, first, deaths, longest } = this.running;
    const seconds = (ms) => `${(ms / 1000).toFixed(ms < 995 ? 2 : 1)} s`;
    const parts = [];
    if (usage) {
      const rate = usage.completion_tokens / Math.max(0.001, (performance.now() - first) / 1000);
      parts.push(`${usage.completion_tokens} tokens`, `first after ${seconds(first - began)}`, `${Math.round(rate)} a second`);
    }
    if (reason === "length") parts.push("cut at the most tokens");
    const note = parts.join(" · ");
    if (!deaths.length) return note;
    return `${note}\n⚡ ${[...new Set(deaths)].join(", ")} died meanwhile: a pause of ${seconds(longest)}, and nothing was lost.`;
  }

  #buttons() {
    const answering = this.running !== null;
    const focused = [$("stop"), $("send")].includes(document.activeElement);
    $("stop").hidden = !answering;
    $("send").hidden = answering;
    if (focused) $(answering ? "stop" : "send").focus();
    document.body.classList.toggle("answering", answering);
  }

  // What is shown ------------------------------------------------------------------------------

  #open(conversation) {
    if (conversation !== this.store.current) this.stop();
    if (conversation) this.store.current = conversation;
    else if (this.store.current.messages.length) this.store.add();
    this.#show();
    $("prompt").focus();
  }

  #show() {
    const { conversations, current } = this.store;
    $("conversations").replaceChildren(
      ...conversations.map((one) =>
        el(
          "li",
          {},
          el("button", { type: "button", class: "open", "aria-current": one === current ? "true" : false, onclick: () => this.#open(one) }, one.title || "New chat"),
          el("button", { type: "button", class: "remove", "aria-label": `Delete “${one.title || "New chat"}”`, onclick: () => this.#remove(one) }, "×"),
        ),
      ),
    );
    $("messages").replaceChildren();
    this.#showMessages();
  }

  #remove(conversation) {
    if (conversation === this.store.current) this.stop();
    this.store.remove(conversation);
    this.#show();
    $("new").focus();
  }

  #showMessages() {
    showMessages(this.store.current.messages, this.running?.answer, (call, result) => this.#give(call, result));
  }
}
