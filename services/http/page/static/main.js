// The page: a chat, and beside it the pipeline that answers.

import { Chat } from "./chat.js";
import { Diagram } from "./diagram.js";
import { $, announce, el, say, svg } from "./dom.js";
import { Pipeline, nameOf } from "./pipeline.js";
import { ask, events, kill, mayKill, pause, Refused, Unreachable } from "./server.js";
import { Store } from "./store.js";

const SAMPLES = 150; // of a minute, as the status comes every 0.4 s
const STORY = mayKill
  ? "Each box is a process of this server. Ask something, then kill one."
  : "Each box is a process of this server. Send one a SIGKILL while the model answers.";
const MOST_EVENTS = 100;
const AGAIN_MS = 500;
const LOST_MS = 5000; // so long no HTTP server answers until the page says so

const chat = new Chat(new Store());
const diagram = new Diagram($("diagram"), mayKill ? strike : null);
const struck = new Set(); // by this visitor, and not yet seen dead
const samples = []; // { rate, deaths }

const story = (text) => say($("story"), text);
const begin = () => story(chat.answers ? "The model is answering. Now kill a process." : STORY);
begin();
addEventListener("answering", begin);
addEventListener("answered", begin);

function tell(kind, text) {
  const list = $("events");
  list.querySelector(".muted")?.remove();
  const time = new Date().toLocaleTimeString([], { hour12: false });
  list.prepend(el("li", { class: kind }, el("time", {}, time), ` ${text}`));
  while (list.children.length > MOST_EVENTS) list.lastChild.remove();
}

async function strike(service) {
  const name = nameOf(service);
  diagram.strike(name);
  try {
    await kill(service);
  } catch (error) {
    if (error instanceof Refused) {
      diagram.strike(name, false);
      tell("error", `${name} was not killed: ${error.message}`);
      return;
    }
    if (!(error instanceof Unreachable)) throw error;
    // The HTTP server has died, before it could say that it will.
  }
  tell("struck", `You killed ${name}`);
  chat.died(name);
  struck.add(name);
}

function show(pipeline, status) {
  say($("model"), `serves ${status.model}`);
  const { rate, running, waiting, firstToken } = pipeline.figures;
  say($("rate"), `${Math.round(rate)}`);
  say($("running"), `${running}`);
  say($("waiting"), `${waiting}`);
  say($("first-token"), firstToken === null ? "–" : firstToken < 1 ? `${Math.round(firstToken * 1000)} ms` : `${firstToken.toFixed(1)} s`);
}

/** Takes what has happened since the last status. */
function hear({ kind, name, text }) {
  tell(kind, text);
  announce(text);
  if (kind === "death" && !struck.delete(name)) chat.died(name);
  if (!chat.answers) return;
  if (kind === "death") story(`${name} has died. What it had in hand is given out anew …`);
  else if (kind === "back") story(`${name} is back, and the answer goes on.`);
}

/** Draws the last minute: the tokens a second, and where processes died. */
function draw(rate, deaths) {
  samples.push({ rate, deaths });
  samples.splice(0, samples.length - SAMPLES);
  const most = Math.max(1, ...samples.map((sample) => sample.rate));
  const from = SAMPLES - samples.length;
  const points = samples.map((sample, index) => `${from + index} ${(39 - (36 * sample.rate) / most).toFixed(1)}`);
  $("chart").querySelector(".line").setAttribute("d", `M${points.join("L")}`);
  $("chart").querySelector(".area").setAttribute("d", `M${from} 40L${points.join("L")}L${SAMPLES - 1} 40Z`);
  const at = samples.flatMap((sample, index) => (sample.deaths ? [from + index] : []));
  $("chart").querySelector("g").replaceChildren(...at.map((x) => svg("path", { class: "death", d: `M${x} 0V40` })));
}

/** Follows the status while the page can be seen, whichever HTTP server tells it. */
async function follow() {
  let pipeline = new Pipeline();
  let heardAt = performance.now();
  let lost = false; // whether the page says that nothing is heard
  for (;;) {
    if (document.hidden) {
      await new Promise((seen) => document.addEventListener("visibilitychange", seen, { once: true }));
      pipeline = new Pipeline(); // what happened meanwhile is no news
      heardAt = performance.now();
      continue;
    }
    const abort = new AbortController();
    const leave = () => document.hidden && abort.abort();
    document.addEventListener("visibilitychange", leave);
    try {
      for await (const data of events(await ask("/pipeline", { signal: abort.signal }))) {
        const status = JSON.parse(data);
        heardAt = performance.now();
        if (lost) begin();
        lost = false;
        const news = pipeline.update(status, performance.now());
        news.forEach(hear);
        draw(pipeline.figures.rate, news.filter(({ kind }) => kind === "death").length);
        diagram.update(pipeline);
        show(pipeline, status);
      }
    } catch (error) {
      if (error instanceof Refused && error.status === 401) {
        lost = true;
        story(error.message);
        await new Promise((given) => addEventListener("key", given, { once: true }));
      } else if (!(error instanceof Refused || error instanceof Unreachable)) {
        lost = true;
        story(`The page cannot show the pipeline: ${error.message}`);
        reportError(error);
      } else if (performance.now() - heardAt > LOST_MS) {
        lost = true;
        story(error instanceof Refused ? error.message : "The server does not answer. The page asks again …");
      }
    } finally {
      document.removeEventListener("visibilitychange", leave);
    }
    await pause(AGAIN_MS);
  }
}

follow();
