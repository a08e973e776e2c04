// The messages of a conversation, as they are shown.

import { isWhole } from "./answer.js";
import { $, el, say, showText } from "./dom.js";
import { newTimings, showTimings } from "./timings.js";

const LABEL = { user: "You", assistant: "The model", tool: "The tool’s result" };
const NEAR = 60; // pixels to the end: whoever is so near reads along

/**
 * Shows messages; of those shown before only what has changed.
 *
 * `written` is the answer that is being written, or null. `give` is called with a tool call and the
 * result that the visitor has typed.
 */
export function showMessages(messages, written, give) {
  const log = $("messages");
  const follows = log.scrollHeight - log.scrollTop - log.clientHeight < NEAR;
  $("welcome").hidden = messages.length > 0;
  log.hidden = !messages.length;
  const answered = new Set(messages.filter(({ role }) => role === "tool").map(({ id }) => id));
  messages.forEach((message, index) => {
    if (!log.children[index]) log.append(newMessage(message));
    const shown = log.children[index];
    showText(shown.querySelector(":scope > .text"), message.content, message.marks);
    if (message.role === "assistant") showAnswer(shown, message, message === written, answered, give);
  });
  while (log.children.length > messages.length) log.lastChild.remove();
  if (follows) log.scrollTop = log.scrollHeight;
}

function newMessage({ role }) {
  const message = el("article", { class: `message ${role}`, "aria-label": LABEL[role] }, el("div", { class: "text" }));
  if (role === "assistant") {
    message.prepend(el("details", { class: "thinking" }, el("summary"), el("div", { class: "text" })));
    message.append(el("div", { class: "calls" }), el("p", { class: "note" }), newTimings(), el("p", { class: "error" }));
  }
  return message;
}

function showAnswer(shown, answer, writing, answered, give) {
  shown.classList.toggle("writing", writing);
  const thinking = shown.querySelector(".thinking");
  thinking.hidden = !answer.reasoning;
  const thinks = writing && !answer.content && !answer.calls.length;
  say(thinking.querySelector("summary"), thinks ? "Thinking …" : "What the model thought");
  showText(thinking.querySelector(".text"), answer.reasoning);
  const calls = shown.querySelector(".calls");
  answer.calls.forEach((call, index) => {
    if (!calls.children[index]) {
      calls.append(el("div", { class: "call" }, el("span", { class: "call-name" }), el("pre", { tabindex: 0 })));
    }
    showCall(calls.children[index], call, !writing && isWhole(call) && !answered.has(call.id), give);
  });
  say(shown.querySelector(".note"), answer.note ?? "");
  showTimings(shown.querySelector(".timings"), answer.timings);
  say(shown.querySelector(".error"), answer.error ?? "");
}

/** `open`: whether the visitor is to say what the tool's result is. */
function showCall(shown, call, open, give) {
  say(shown.querySelector(".call-name"), `Calls ${call.name}`);
  say(shown.querySelector("pre"), call.arguments);
  const form = shown.querySelector("form");
  if (!open) form?.remove();
  else if (!form) shown.append(resultForm(call, give));
}

function resultForm(call, give) {
  const input = el("input", { "aria-label": `Result of ${call.name}`, placeholder: 'its result, such as {"temperature": 12}' });
  const onsubmit = (event) => {
    event.preventDefault();
    give(call, input.value);
  };
  return el("form", { onsubmit }, input, el("button", { type: "submit" }, "Give result"));
}
