// Conversations and settings, kept in this browser.

const CONVERSATIONS = "nanovllm.conversations";
const SETTINGS = "nanovllm.settings";
const MOST_CONVERSATIONS = 50;

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

export class Store {
  constructor() {
    this.conversations = read(CONVERSATIONS, []);
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
    if (!this.conversations.length) this.add();
    if (this.current === conversation) this.current = this.conversations[0];
    this.save();
  }

  /** Where there is no room for all conversations, the oldest go. */
  save() {
    const kept = this.conversations.filter((one) => one.messages.length);
    for (;;) {
      try {
        localStorage.setItem(CONVERSATIONS, JSON.stringify(kept));
        return;
      } catch {
        if (!kept.pop()) return; // the browser keeps nothing
      }
    }
  }

  get settings() {
    return read(SETTINGS, {});
  }

  set settings(settings) {
    try {
      localStorage.setItem(SETTINGS, JSON.stringify(settings));
    } catch {
      // They hold for this page alone then: the form has them.
    }
  }
}
