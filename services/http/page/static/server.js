// Requests to the HTTP server that this page came from, with the visitor's key if one is needed.

import { $ } from "./dom.js";

const KEY = "nanovllm.key";
const token = document.querySelector("meta[name=page-token]").content;

/** Whether this page may kill services, perhaps with an admin key. */
export const mayKill = token !== "";

/** The server has answered, and said no. */
export class Refused extends Error {
  constructor(status, code, message) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** The server does not answer, or no more. */
export class Unreachable extends Error {}

const unreachable = (error) => {
  throw new Unreachable(error.message);
};

let asking = null; // the visitor, for a key

/** A response that is a success; asks the visitor for a key where one is needed. */
export async function ask(path, { body, headers = {}, signal } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const sent = { ...headers };
    if (key) sent.Authorization = `Bearer ${key}`;
    if (body !== undefined) sent["Content-Type"] = "application/json";
    const response = await fetch(path, {
      method: body === undefined ? "GET" : "POST",
      headers: sent,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      cache: "no-store",
    }).catch(unreachable);
    if (response.ok) return response;
    const refused = await refusal(response);
    if (response.status !== 401) throw refused;
    if (refused.code === "invalid_api_key") {
      refused.message = key ? "The server does not know this key." : "The server answers only those who have a key.";
    }
    if (sessionStorage.getItem(KEY) === key) {
      asking ??= keyFromVisitor(refused.message).finally(() => (asking = null));
      if (!(await asking)) throw refused;
    }
  }
}

export function kill(service) {
  const { role, index, engine } = service;
  return ask("/pipeline/kill", { body: { role, index, engine }, headers: { "X-Page-Token": token } });
}

/** The data of each server-sent event of a response. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch(unreachable);
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function refusal(response) {
  const text = await response.text().catch(unreachable);
  try {
    const { code, message } = JSON.parse(text).error;
    return new Refused(response.status, code, message);
  } catch {
    return new Refused(response.status, null, `${response.status} ${response.statusText}`);
  }
}

function keyFromVisitor(why) {
  const dialog = $("key-dialog");
  $("key-why").textContent = why;
  $("key").value = "";
  dialog.returnValue = "";
  $("key-cancel").onclick = () => dialog.close();
  dialog.showModal();
  return new Promise((done) => {
    dialog.addEventListener(
      "close",
      () => {
        const given = dialog.returnValue === "use" && $("key").value.trim();
        if (given) {
          sessionStorage.setItem(KEY, given);
          dispatchEvent(new Event("key"));
        }
        done(Boolean(given));
      },
      { once: true },
    );
  });
}
