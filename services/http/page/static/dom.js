// Elements. Text is only ever set as text: nothing that the model writes becomes HTML.

const SVG = "http://www.w3.org/2000/svg";

export const $ = (id) => document.getElementById(id);

/** An element with attributes and listeners (`onclick`), and children: elements or text. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

/** Sets an element's text, if it is another: the screen reader's place and selections stay. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Has screen readers say this when they have time. */
export function announce(text) {
  $("announcer").textContent = text;
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children);
  return element;
}

/**
 * Shows text in an element: prose, and blocks of code between lines of ```. `marks` are what
 * happened at places in the text: `at` is a place, `name` what died there.
 */
export function showText(element, text, marks = []) {
  const parts = text.split(/^```/m);
  let begin = 0;
  parts.forEach((part, index) => {
    const tag = index % 2 ? "PRE" : "DIV";
    let block = element.children[index];
    if (block?.tagName !== tag) {
      const fresh = el(tag, index % 2 ? { tabindex: 0 } : {});
      block ? block.replaceWith(fresh) : element.append(fresh);
      block = fresh;
    }
    if (index % 2) say(block, part.replace(/^[^\n]*\n?/, ""));
    else showProse(block, part, marks.map(({ at, name }) => ({ at: at - begin, name })));
    begin += part.length + 3;
  });
  while (element.children.length > parts.length) element.lastChild.remove();
}

function showProse(block, text, marks) {
  const inside = marks.filter(({ at }) => at >= 0 && at <= text.length);
  const ends = [...inside.map(({ at }) => at), text.length];
  if (block.childNodes.length !== 2 * ends.length - 1) {
    block.replaceChildren("", ...inside.flatMap(({ name }) => [mark(name), ""]));
  }
  ends.forEach((end, index) => {
    const node = block.childNodes[2 * index];
    const said = text.slice(index ? ends[index - 1] : 0, end);
    if (node.data !== said) node.data = said;
  });
}

function mark(name) {
  return el("span", { class: "mark", role: "img", "aria-label": `Here ${name} died`, title: `Here ${name} died` }, "⚡");
}
