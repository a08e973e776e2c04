// The pipeline as a diagram: each process a node, and between them what flows and what waits.

import { el, say, svg } from "./dom.js";
import { join } from "./lines.js";

const GAP = 7; // between the two directions of a connection, in pixels
const count = (number, what) => `${number} ${what}${number === 1 ? "" : "s"}`;
const WORK = {
  ingress: (s) => `${s.requests} unfinished · ${count(s.sessions, "client")}`,
  tokenizer: (s) => `${s.queued} queued`,
  scheduler: (s) => `${s.running} running · ${s.waiting} waiting`,
  gpu_worker: (s) => `${count(s.slots_used, "slot")} · ${s.in_flight} in flight`,
  detokenizer: (s) => count(s.requests, "answer"),
  http: (s) => count(s.running, "stream"),
};

const PURPOSE = {
  http: "speaks HTTP with clients",
  ingress: "holds every request until its end: the others can be rebuilt from it",
  tokenizer: "text to tokens",
  scheduler: "plans each step",
  gpu_worker: "runs the model",
  detokenizer: "tokens to text",
};

const percent = (share) => (share === undefined ? "–" : `${Math.round(share * 100)}%`);

export class Diagram {
  /** `kill` is called with a service; null if this page may kill none. */
  constructor(root, kill) {
    this.root = root;
    this.kill = kill;
    this.nodes = new Map();
    this.engines = new Map();
    this.lines = svg("svg", { class: "lines", "aria-hidden": "true" });
    this.http = group("http", "HTTP servers");
    this.ingress = group("ingress", "Ingress");
    this.tokenizers = group("tokenizer", "Tokenizers");
    this.detokenizers = group("detokenizer", "Detokenizers");
    this.engineList = el("div", { class: "engines" });
    root.append(this.lines, this.http, this.ingress, this.tokenizers, this.engineList, this.detokenizers);
    this.paths = new Map();
    new ResizeObserver(() => this.#draw()).observe(root);
  }

  update(pipeline) {
    this.pipeline = pipeline;
    this.#fill(this.http, pipeline.of("http"));
    this.#fill(this.ingress, pipeline.of("ingress"));
    this.#fill(this.tokenizers, pipeline.of("tokenizer"));
    this.#fill(this.detokenizers, pipeline.of("detokenizer"));
    const engines = pipeline.engines;
    for (const [number, engine] of [...engines].sort(([a], [b]) => a - b)) this.#engine(number, engine);
    for (const [number, card] of this.engines) {
      if (!engines.has(number)) {
        card.remove();
        this.engines.delete(number);
      }
    }
    for (const [name, node] of this.nodes) {
      if (pipeline.services.has(name)) continue;
      node.remove();
      this.nodes.delete(name);
    }
    this.root.classList.toggle("many", this.engines.size > 1);
    this.#draw();
  }

  /** Shows at once that a service is being killed, or is spared. */
  strike(name, is = true) {
    this.nodes.get(name)?.classList.toggle("struck", is);
  }

  #fill(where, services) {
    for (const one of services) this.#node(where.querySelector("ul"), one);
  }

  #engine(number, { scheduler, workers }) {
    let card = this.engines.get(number);
    if (!card) {
      card = el(
        "section",
        { class: "engine", "aria-label": `Engine ${number}` },
        el("h3", {}, `Engine ${number}`, el("span", { class: "speed" })),
        el("ul", { class: "nodes" }),
        el("div", { class: "kv", role: "meter", "aria-label": `KV cache of engine ${number}`, "aria-valuemin": 0 }, el("span")),
        el("p", { class: "kv-text" }),
      );
      this.engines.set(number, card);
      this.engineList.append(card);
    }
    for (const one of [scheduler, ...workers]) if (one) this.#node(card.querySelector("ul"), one);
    const stats = scheduler?.stats;
    const busy = workers[0]?.rates.busy_s;
    const speed = scheduler?.rates.generated;
    say(card.querySelector(".speed"), speed === undefined ? "" : `${Math.round(speed)} tokens/s · device ${percent(Math.min(1, busy ?? 0))} busy`);
    if (!stats) return; // of its cache the last is shown until it is back
    const { blocks_used: used, blocks_total: total } = stats;
    const meter = card.querySelector(".kv");
    meter.setAttribute("aria-valuemax", Math.max(1, total));
    meter.setAttribute("aria-valuenow", used);
    meter.firstChild.style.width = `${(100 * used) / Math.max(1, total)}%`;
    const cached = stats.prompt_tokens ? ` · ${percent(stats.cached_tokens / stats.prompt_tokens)} of prompts cached` : "";
    say(card.querySelector(".kv-text"), `KV ${used} of ${total} blocks${cached}`);
  }

  #node(list, one) {
    const { name, service } = one;
    let node = this.nodes.get(name);
    if (!node) {
      node = this.#newNode(one);
      this.nodes.set(name, node);
      list.append(node);
    }
    node.service = service;
    const up = one.downSince === null && service.state === "ready";
    if (node.pid !== service.pid || !up) node.classList.remove("struck");
    if (up && node.dataset.state === "down") {
      node.classList.add("back");
      setTimeout(() => node.classList.remove("back"), 2500);
    }
    node.pid = service.pid;
    node.dataset.state = up ? "up" : "down";
    const loading = service.loading ? `${service.loading.stage} ${percent(service.loading.done / Math.max(1, service.loading.total))}` : service.state;
    say(node.querySelector(".work"), up ? (one.stats ? WORK[service.role](one.stats) : "ready") : loading);
    const again = service.restarts ? ` · restarted ${service.restarts}×` : "";
    say(node.querySelector(".load"), `CPU ${up ? percent(one.rates.cpu) : "–"}${again}`);
    node.querySelector(".bar span").style.width = `${Math.min(100, 100 * ((up && one.rates.cpu) || 0))}%`;
    node.querySelector("button")?.setAttribute("aria-disabled", !up);
  }

  #newNode({ name, service }) {
    const node = el(
      "li",
      { class: "node" },
      el("span", { class: "name" }, name),
      el("span", { class: "what" }, PURPOSE[service.role]),
      el("span", { class: "work" }),
      el("span", { class: "load" }),
      el("span", { class: "bar", "aria-hidden": "true" }, el("span")),
    );
    if (this.kill) {
      const press = () => node.dataset.state === "up" && this.kill(node.service);
      node.querySelector(service.role === "ingress" ? ".what" : ".name").after(el("button", { type: "button", class: "kill", "aria-label": `Kill ${name}`, title: `Kill ${name} (SIGKILL)`, onclick: press }, "Kill"));
    }
    return node;
  }

  /** Draws the connections between the nodes, wherever they are. */
  #draw() {
    if (!this.pipeline) return;
    const at = this.root.getBoundingClientRect();
    const box = (element) => {
      const { left, right, top, bottom } = element.getBoundingClientRect();
      return { left: left - at.left, right: right - at.left, top: top - at.top, bottom: bottom - at.top };
    };
    this.lines.setAttribute("viewBox", `0 0 ${at.width} ${at.height}`);
    const drawn = new Set();
    const draw = (id, from, to, shift, flows, waiting = 0, what = "") => {
      drawn.add(id);
      this.#line(id, join(box(from), box(to), shift), flows, waiting ? `${waiting} ${what}` : "");
    };
    const ingress = this.ingress.querySelector(".node");
    if (!ingress) return;
    const { rate, running, waiting } = this.pipeline.figures;
    const busy = rate > 0 || running > 0;
    for (const one of this.pipeline.of("http")) {
      const node = this.nodes.get(one.name);
      const answers = one.stats?.running > 0 && busy;
      draw(`${one.name} in`, node, ingress, -GAP, answers);
      draw(`${one.name} out`, ingress, node, GAP, answers);
    }
    for (const one of this.pipeline.of("tokenizer")) {
      const node = this.nodes.get(one.name);
      draw(`${one.name} in`, ingress, node, -GAP, one.rates.tokenized > 0, one.stats?.queued, "queued");
      draw(`${one.name} out`, node, ingress, GAP, one.rates.tokenized > 0);
    }
    for (const { scheduler, workers } of this.pipeline.engines.values()) {
      const runs = scheduler?.rates.generated > 0;
      for (const one of scheduler ? workers : []) {
        const [from, to] = [this.nodes.get(scheduler.name), this.nodes.get(one.name)];
        draw(`${one.name} plans`, from, to, -GAP, runs);
        draw(`${one.name} tokens`, to, from, GAP, runs);
      }
    }
    if (this.engines.size) draw("engines", ingress, this.engineList, 0, rate > 0, waiting, "waiting");
    for (const one of this.pipeline.of("detokenizer")) {
      const node = this.nodes.get(one.name);
      if (this.engines.size) draw(`${one.name} in`, this.engineList, node, 0, rate > 0);
      draw(`${one.name} out`, node, ingress, 0, one.rates.tokens > 0);
    }
    for (const [id, { path, label }] of this.paths) {
      if (drawn.has(id)) continue;
      path.remove();
      label.remove();
      this.paths.delete(id);
    }
  }

  #line(id, { d, middle }, flows, text) {
    let line = this.paths.get(id);
    if (!line) {
      line = { path: svg("path"), label: el("span", { class: "queue" }) };
      this.paths.set(id, line);
      this.lines.append(line.path);
      this.root.append(line.label);
    }
    line.path.setAttribute("d", d);
    line.path.classList.toggle("flows", Boolean(flows));
    say(line.label, text);
    line.label.hidden = !text;
    line.label.style.left = `${middle.x}px`;
    line.label.style.top = `${middle.y}px`;
  }
}

function group(role, label) {
  return el("div", { class: `group ${role}` }, el("ul", { class: "nodes", "aria-label": label }));
}
