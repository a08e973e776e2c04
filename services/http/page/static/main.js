// The page: a chat, and beside it the pipeline that answers.

import { Chat } from "./chat.js";
import { Diagram } from "./diagram.js";
import { $, announce, el, say } from "./dom.js";
import { Pipeline, nameOf } from "./pipeline.js";
import { ask, events, kill, mayKill, pause, Refused } from "./server.js";
import { Store } from "./store.js";

const SPARKS = 60;
const MOST_EVENTS = 100;
const AGAIN_MS = 500;

const chat = new Chat(new Store());
const diagram = new Diagram($("diagram"), mayKill ? strike : null);
const rates = [];
if (!mayKill) say($("invitation"), "Kill one with a signal while the model answers: the answer goes on.");

function tell(kind, text) {
  const list = $("events");
  list.querySelector(".muted")?.remove();
  const time = new Date().toLocaleTimeString([], { hour12: false });
  list.prepend(el("li", { class: kind }, el("time", {}, time), ` ${text}`));
  while (list.children.length > MOST_EVENTS) list.lastChild.remove();
}

async function strike(service) {
  const name = nameOf(service);
  diagram.struck(name);
  tell("struck", `you killed ${name}`);
  try {
    await kill(service);
  } catch (error) {
    if (error instanceof Refused) tell("error", `${name} was not killed: ${error.message}`);
    // else the HTTP server has died, before it could say that it will
  }
}

function show(pipeline, status) {
  say($("model"), `serves ${status.model}`);
  const { rate, running, waiting, firstToken } = pipeline.figures;
  rates.push(rate);
  rates.splice(0, rates.length - SPARKS);
  const most = Math.max(1, ...rates);
  const points = rates.map((one, index) => `${index},${19 - (18 * one) / most}`);
  document.querySelector("#spark polyline").setAttribute("points", points.join(" "));
  say($("rate"), `${Math.round(rate)}`);
  say($("running"), `${running}`);
  say($("waiting"), `${waiting}`);
  say($("first-token"), firstToken === null ? "–" : firstToken < 1 ? `${Math.round(firstToken * 1000)} ms` : `${firstToken.toFixed(1)} s`);
}

/** Follows the status while the page can be seen, whichever HTTP server tells it. */
async function follow() {
  let pipeline = new Pipeline();
  for (;;) {
    if (document.hidden) {
      await new Promise((seen) => document.addEventListener("visibilitychange", seen, { once: true }));
      pipeline = new Pipeline(); // what happened meanwhile is no news
      continue;
    }
    const abort = new AbortController();
    const leave = () => document.hidden && abort.abort();
    document.addEventListener("visibilitychange", leave);
    try {
      for await (const data of events(await ask("/pipeline", { signal: abort.signal }))) {
        const status = JSON.parse(data);
        for (const news of pipeline.update(status, performance.now())) {
          tell(news.kind, news.text);
          announce(news.text);
          chat.note(news);
        }
        document.body.classList.add("connected");
        diagram.update(pipeline);
        show(pipeline, status);
      }
    } catch (error) {
      if (error instanceof Refused && error.status === 401) throw error; // the visitor has no key
    } finally {
      document.removeEventListener("visibilitychange", leave);
    }
    await pause(AGAIN_MS);
  }
}

follow().catch((error) => say($("invitation"), error.message));
