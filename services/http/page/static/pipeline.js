// What two reports of the pipeline's status say together: rates, deaths, and who is back.

const FIRST_TOKEN_MS = 30_000; // over so long is the mean of times to the first token

export function nameOf({ role, index, engine, machine }) {
  const number = role === "scheduler" ? engine : role === "gpu_worker" ? `${engine}.${index}` : index;
  return `${role} ${number}${machine ? ` on ${machine}` : ""}`;
}

export class Pipeline {
  constructor() {
    this.services = new Map(); // by name, what is known of each
    this.first = []; // [time, requests, seconds] of first tokens
    this.at = null; // of the last report
  }

  /** Takes a `Status`; returns what has happened since the last one. */
  update(status, now) {
    const news = [];
    const there = new Set();
    for (const service of status.services) {
      const name = nameOf(service);
      there.add(name);
      const before = this.services.get(name);
      this.services.set(name, this.#known(name, service, before, now, news));
    }
    for (const name of this.services.keys()) {
      if (there.has(name)) continue;
      this.services.delete(name);
      news.push({ kind: "left", name, text: `${name} has left` });
    }
    this.first = this.first.filter(([at]) => now - at < FIRST_TOKEN_MS);
    this.at = now;
    return news;
  }

  of(role) {
    return [...this.services.values()].filter((one) => one.service.role === role);
  }

  /** Engines by number: each its scheduler and its workers. */
  get engines() {
    const engines = new Map();
    for (const one of [...this.of("scheduler"), ...this.of("gpu_worker")]) {
      const engine = engines.get(one.service.engine) ?? { workers: [] };
      if (one.service.role === "scheduler") engine.scheduler = one;
      else engine.workers.push(one);
      engines.set(one.service.engine, engine);
    }
    return engines;
  }

  get figures() {
    const sum = (role, value) => this.of(role).reduce((total, one) => total + (value(one) ?? 0), 0);
    const running = sum("scheduler", (one) => one.stats?.running);
    const [requests, seconds] = this.first.reduce(([n, s], [, count, time]) => [n + count, s + time], [0, 0]);
    return {
      rate: sum("scheduler", (one) => one.rates.generated),
      running,
      waiting: Math.max(0, sum("ingress", (one) => one.stats?.requests) - running),
      firstToken: requests ? seconds / requests : null,
    };
  }

  #known(name, service, before, now, news) {
    const up = service.state === "ready";
    const same = before?.service.pid === service.pid;
    let downSince = before?.downSince ?? null;
    if (before ? downSince === null && !(up && same) : !up) {
      downSince = up ? (this.at ?? now) : now; // it is ready again: it died some time before
      if (before) news.push({ kind: "death", name, text: `${name} died` });
      else if (this.at !== null) news.push({ kind: "new", name, text: `${name} is started` });
    } else if (!before && this.at !== null) {
      news.push({ kind: "back", name, text: `${name} has come` });
    }
    if (downSince !== null && up) {
      const seconds = ((now - downSince) / 1000).toFixed(1);
      news.push({ kind: "back", name, text: `${name} is ready after ${seconds} s, as process ${service.pid}` });
      downSince = null;
    }
    return { name, service, downSince, stats: service.stats, ...this.#measured(service, same ? before : null, now) };
  }

  /** Rates between the last two reports of one process. */
  #measured(service, before, now) {
    const report = { at: service.at_s, cpu: service.cpu_s, stats: service.stats };
    const last = before?.report;
    if (!service.stats) return { report: null, rates: {} };
    if (!last) return { report, rates: {} };
    const seconds = report.at - last.at;
    if (seconds < 0.3) return { report: last, rates: before.rates };
    const rates = { cpu: (report.cpu - last.cpu) / seconds };
    for (const counter of ["generated", "busy_s", "tokens", "tokenized"]) {
      if (counter in report.stats) rates[counter] = (report.stats[counter] - last.stats[counter]) / seconds;
    }
    if (service.role === "http") {
      const count = ({ first_token: { counts } }) => counts.reduce((a, b) => a + b, 0);
      const requests = count(report.stats) - count(last.stats);
      if (requests > 0) {
        this.first.push([now, requests, report.stats.first_token.sum_s - last.stats.first_token.sum_s]);
      }
    }
    return { report, rates };
  }
}
