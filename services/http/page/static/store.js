// Conversations and settings, kept in this browser.

const CONVERSATIONS = "nanovllm.conversations";
const SETTINGS = "nanovllm.settings";
const MOST_CONVERSATIONS = 50;

/** What the browser has kept; null if that is nothing, or no JSON. */
function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null;
  }
}

const areTexts = (...values) => values.every((value) => typeof value === "string");

function isMessage(message) {
  const { role, content, id, reasoning, calls, marks = [], timings = [] } = message ?? {};
  if (role === "user") return areTexts(content);
  if (role === "tool") return areTexts(content, id);
  if (role !== "assistant" || !areTexts(content, reasoning)) return false;
  const isList = (list, isOne) => Array.isArray(list) && list.every(isOne);
  return (
    isList(calls, (call) => areTexts(call?.id, call?.name, call?.arguments)) &&
    isList(marks, (mark) => areTexts(mark?.name)) &&
    isList(timings, (timing) => areTexts(timing?.[0]))
  );
}

/** The conversations that the browser has kept, but for what is none: other programs write there, too. */
function readConversations() {
  const kept = read(CONVERSATIONS);
  if (!Array.isArray(kept)) return [];
  return kept.filter((one) => areTexts(one?.id, one?.title) && Array.isArray(one.messages) && one.messages.every(isMessage));
}

export class Store {
  constructor() {
    this.removed = new Set(); // ids
    this.conversations = readConversations();
    if (!this.conversations.length) this.add();
    this.current = this.conversations[0];
  }

  add() {
    this.conversations.unshift({ id: crypto.randomUUID?.() ?? `${Date.now()}`, title: "", messages: [] });
    this.conversations.length = Math.min(this.conversations.length, MOST_CONVERSATIONS);
    this.current = this.conversations[0];
  }

  remove(conversation) {
    this.conversations = this.conversations.filter((one) => one !== conversation);
    this.removed.add(conversation.id);
    if (!this.conversations.length) this.add();
    if (this.current === conversation) this.current = this.conversations[0];
    this.save();
  }

  /** Keeps what other tabs have kept, too. Where there is no room for all, the oldest go. */
  save() {
    const known = new Set([...this.removed, ...this.conversations.map(({ id }) => id)]);
    const kept = this.conversations.filter((one) => one.messages.length);
    kept.push(...readConversations().filter(({ id }) => !known.has(id)));
    kept.length = Math.min(kept.length, MOST_CONVERSATIONS);
    for (;;) {
      try {
        localStorage.setItem(CONVERSATIONS, JSON.stringify(kept));
        return;
      } catch {
        if (!kept.pop()) return; // the browser keeps nothing
      }
    }
  }

  /**
   * Takes what another tab has kept, but for the conversation that is being `written` here. Returns
   * whether there was anything, given what the browser says has changed.
   */
  hear(changed, written) {
    if (changed !== CONVERSATIONS) return false;
    const kept = new Map(readConversations().map((one) => [one.id, one]));
    this.conversations = this.conversations.filter((one) => one === written || !one.messages.length || kept.has(one.id));
    for (const one of this.conversations) {
      if (one !== written) Object.assign(one, kept.get(one.id));
      kept.delete(one.id);
    }
    this.conversations.push(...[...kept.values()].filter(({ id }) => !this.removed.has(id)));
    if (!this.conversations.length) this.add();
    if (!this.conversations.includes(this.current)) this.current = this.conversations[0];
    return true;
  }

  get settings() {
    return read(SETTINGS) ?? {};
  }

  set settings(settings) {
    try {
      localStorage.setItem(SETTINGS, JSON.stringify(settings));
    } catch {
      // They hold for this page alone then.
    }
  }
}
