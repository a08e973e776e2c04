// How the model is asked: a form, which the browser keeps.

import { $ } from "./dom.js";

const ENDLESS_TOKENS = "2000";
const EXAMPLE_TOOL = [
  {
    type: "function",
    function: {
      name: "get_weather",
      description: "The weather in a city.",
      parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
    },
  },
];

export class Settings {
  constructor(store) {
    this.store = store;
    this.form = $("settings");
    this.fields = this.form.elements;
    const kept = store.settings;
    for (const field of this.fields) {
      const value = kept[field.name];
      if (field.type === "checkbox") field.checked = value === true;
      else if (typeof value === "string") field.value = value;
    }
    this.#keep();
    $("settings-button").addEventListener("click", () => {
      this.form.hidden = !this.form.hidden;
      $("settings-button").setAttribute("aria-expanded", !this.form.hidden);
    });
    $("example-tool").addEventListener("click", () => this.offerTool());
    this.form.addEventListener("submit", (event) => event.preventDefault());
    this.form.addEventListener("change", () => this.#keep());
  }

  offerTool() {
    this.fields.tools.value = JSON.stringify(EXAMPLE_TOOL, null, 1);
    this.#keep();
  }

  writeWithoutEnd(endless) {
    const { endless: box, maxTokens } = this.fields;
    box.checked = endless;
    if (endless) maxTokens.value ||= ENDLESS_TOKENS;
    else if (maxTokens.value === ENDLESS_TOKENS) maxTokens.value = "";
    this.#keep();
  }

  get system() {
    return this.kept.system;
  }

  /** The keys of a request that say how to answer. */
  get keys() {
    const { temperature, maxTokens, thinking, endless, tools } = this.kept;
    const keys = {};
    if (temperature) keys.temperature = Number(temperature);
    if (maxTokens) keys.max_tokens = Number(maxTokens);
    if (thinking) keys.chat_template_kwargs = { enable_thinking: thinking === "on" };
    if (endless) keys.ignore_eos = true;
    if (tools) keys.tools = JSON.parse(tools);
    return keys;
  }

  #keep() {
    const { temperature, maxTokens, thinking, endless, system, tools } = this.fields;
    let error = "";
    try {
      if (tools.value.trim()) JSON.parse(tools.value);
    } catch (problem) {
      error = `The tools are no JSON, and not offered: ${problem.message}`;
    }
    $("tools-error").textContent = error;
    this.kept = {
      temperature: temperature.value,
      maxTokens: maxTokens.value,
      thinking: thinking.value,
      endless: endless.checked,
      system: system.value,
      tools: error ? "" : tools.value.trim(),
    };
    this.store.settings = this.kept;
  }
}
