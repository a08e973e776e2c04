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

/** Shows text in an element: paragraphs, and blocks of code between lines of ```. */
export function showText(element, text) {
  const parts = text.split(/^```/m);
  parts.forEach((part, index) => {
    const tag = index % 2 ? "PRE" : "DIV";
    const shown = index % 2 ? part.replace(/^[^\n]*\n?/, "") : part.replace(/^\n+|\n+$/g, "");
    let block = element.children[index];
    if (block?.tagName !== tag) {
      const fresh = el(tag, index % 2 ? { tabindex: 0 } : {});
      block ? block.replaceWith(fresh) : element.append(fresh);
      block = fresh;
    }
    say(block, shown);
  });
  while (element.children.length > parts.length) element.lastChild.remove();
}
