// The chat: conversations, messages, and the answer that is being written.

import { $, announce, el, say, showText } from "./dom.js";
import { ask } from "./server.js";
import { emptyAnswer, stream } from "./answer.js";

const ENDLESS_TOKENS = "2000";
const EXAMPLE_TOOL = JSON.stringify([
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
], null, 1);
const TITLE = 40;

export class Chat {
  constructor(store) {
    this.store = store;
    this.running = null; // { abort, deaths, ... } while an answer is being written
    this.settings = $("settings");
    this.#restoreSettings();
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
    $("settings-button").addEventListener("click", () => this.#toggleSettings());
    $("example-tool").addEventListener("click", () => this.#set({ tools: EXAMPLE_TOOL }));
    for (const example of $("welcome").querySelectorAll("button")) {
      example.addEventListener("click", () => {
        const { prompt, endless, tool } = example.dataset;
        if (endless) this.#set({ endless: true, maxTokens: ENDLESS_TOKENS });
        if (tool) this.#set({ tools: EXAMPLE_TOOL });
        this.send(prompt);
      });
    }
    this.settings.addEventListener("submit", (event) => event.preventDefault());
    this.settings.addEventListener("change", () => this.#keepSettings());
    addEventListener("pagehide", () => this.store.save());
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
    await this.#ask({ role: "user", content: text.trim() });
  }

  // What is asked, and how ---------------------------------------------------------------------

  async #ask(...messages) {
    const { current } = this.store;
    current.messages.push(...messages);
    const answer = emptyAnswer();
    const abort = new AbortController();
    dispatchEvent(new Event("answering"));
    this.running = { abort, deaths: [], answer, began: performance.now(), first: null, last: null, longest: 0 };
    this.#buttons();
    this.#show();
    announce("The model answers.");
    try {
      const request = { model: await this.model, messages: this.#history(current), stream: true, stream_options: { include_usage: true }, ...this.#sampling() };
      current.messages.push(answer);
      this.#showMessages();
      const end = await stream(request, (news) => this.#news(news), abort.signal);
      answer.note = this.#note(end);
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
    const { system } = this.store.settings;
    const history = system ? [{ role: "system", content: system }] : [];
    for (const { role, content, reasoning, calls, id } of messages) {
      if (role === "tool") history.push({ role, content, tool_call_id: id });
      else if (role === "user") history.push({ role, content });
      else if (content || reasoning || calls.length) {
        const message = { role, content };
        if (reasoning) message.reasoning_content = reasoning;
        if (calls.length) {
          message.tool_calls = calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
        }
        history.push(message);
      }
    }
    return history;
  }

  #sampling() {
    const { temperature, maxTokens, thinking, endless, tools } = this.store.settings;
    const sampling = {};
    if (temperature) sampling.temperature = Number(temperature);
    if (maxTokens) sampling.max_tokens = Number(maxTokens);
    if (thinking) sampling.chat_template_kwargs = { enable_thinking: thinking === "on" };
    if (endless) sampling.ignore_eos = true;
    if (tools) sampling.tools = JSON.parse(tools);
    return sampling;
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
    this.stop();
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
    const { messages } = this.store.current;
    const log = $("messages");
    const follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    $("welcome").hidden = messages.length > 0;
    log.hidden = !messages.length;
    messages.forEach((message, index) => {
      let shown = log.children[index];
      if (!shown) log.append((shown = this.#newMessage(message)));
      this.#showMessage(shown, message);
    });
    while (log.children.length > messages.length) log.lastChild.remove();
    if (follows) log.scrollTop = log.scrollHeight;
  }

  #newMessage({ role }) {
    const label = { user: "You", assistant: "The model", tool: "The tool’s result" }[role];
    const message = el("article", { class: `message ${role}`, "aria-label": label });
    if (role === "assistant") {
      message.append(el("details", { class: "thinking", hidden: true }, el("summary"), el("div", { class: "text" })));
    }
    message.append(el("div", { class: "text" }));
    if (role === "assistant") message.append(el("div", { class: "calls" }), el("p", { class: "note" }), el("p", { class: "error" }));
    return message;
  }

  #showMessage(shown, message) {
    showText(shown.querySelector(":scope > .text"), message.content ?? "", message.marks);
    if (message.role !== "assistant") return;
    const writing = this.running?.answer === message;
    shown.classList.toggle("writing", writing);
    const thinking = shown.querySelector(".thinking");
    thinking.hidden = !message.reasoning;
    const thinks = writing && !message.content && !message.calls.length;
    say(thinking.querySelector("summary"), thinks ? "Thinking …" : "What the model thought");
    showText(thinking.querySelector(".text"), message.reasoning);
    const calls = shown.querySelector(".calls");
    message.calls.forEach((call, index) => {
      if (!calls.children[index]) calls.append(this.#newCall(call));
      this.#showCall(calls.children[index], call, writing);
    });
    say(shown.querySelector(".note"), message.note ?? "");
    say(shown.querySelector(".error"), message.error ?? "");
  }

  #newCall() {
    return el("div", { class: "call" }, el("span", { class: "call-name" }), el("pre", { tabindex: 0 }));
  }

  #showCall(shown, call, writing) {
    say(shown.querySelector(".call-name"), `Calls ${call.name}`);
    say(shown.querySelector("pre"), call.arguments);
    const answered = this.store.current.messages.some(({ role, id }) => role === "tool" && id === call.id);
    const form = shown.querySelector("form");
    if (answered || writing) form?.remove();
    else if (!form) shown.append(this.#resultForm(call));
  }

  /** Where the visitor says what the tool's result is. */
  #resultForm(call) {
    const input = el("input", { "aria-label": `Result of ${call.name}`, placeholder: "its result, such as {\"temperature\": 12}" });
    const give = (event) => {
      event.preventDefault();
      if (!this.running) this.#ask({ role: "tool", id: call.id, content: input.value });
    };
    return el("form", { onsubmit: give }, input, el("button", { type: "submit" }, "Give result"));
  }

  // Settings -----------------------------------------------------------------------------------

  #toggleSettings() {
    this.settings.hidden = !this.settings.hidden;
    $("settings-button").setAttribute("aria-expanded", !this.settings.hidden);
  }

  #restoreSettings() {
    for (const [name, value] of Object.entries(this.store.settings)) {
      const field = this.settings.elements[name];
      if (field?.type === "checkbox") field.checked = value;
      else if (field) field.value = value;
    }
  }

  #set({ tools, endless, maxTokens }) {
    const { elements } = this.settings;
    if (tools) elements.tools.value = tools;
    if (endless) elements.endless.checked = true;
    if (maxTokens) elements.maxTokens.value ||= maxTokens;
    this.#keepSettings();
  }

  #keepSettings() {
    const { temperature, maxTokens, thinking, endless, system, tools } = this.settings.elements;
    let error = "";
    try {
      if (tools.value.trim()) JSON.parse(tools.value);
    } catch (problem) {
      error = `The tools are no JSON: ${problem.message}`;
    }
    $("tools-error").textContent = error;
    this.store.settings = {
      temperature: temperature.value,
      maxTokens: maxTokens.value,
      thinking: thinking.value,
      endless: endless.checked,
      system: system.value,
      tools: error ? "" : tools.value.trim(),
    };
  }
}
