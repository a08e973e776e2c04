// Where the time of an answer went: a bar, and the same in words.

import { el } from "./dom.js";

/** What `showTimings` fills. */
export const newTimings = () => el("figure", { class: "timings", hidden: true }, el("div", { class: "bar", "aria-hidden": "true" }), el("figcaption"));

/** `timings`: name and µs of each phase, in order. */
export function showTimings(shown, timings = []) {
  shown.hidden = !timings.length;
  const bar = shown.querySelector(".bar");
  if (bar.children.length === timings.length) return;
  shown.querySelector("figcaption").replaceChildren(...timings.map(([name, us]) => el("span", { class: name }, `${name} ${inWords(us)} `)));
  bar.replaceChildren(...timings.map(([name]) => el("span", { class: name })));
  timings.forEach(([, us], index) => (bar.children[index].style.flexGrow = us));
}

const inWords = (us) => (us < 9_950 ? `${(us / 1000).toFixed(1)} ms` : us < 995_000 ? `${Math.round(us / 1000)} ms` : `${(us / 1e6).toFixed(2)} s`);
