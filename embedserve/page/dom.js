// Building the page. Text only ever becomes text: strings are appended as text nodes, never parsed as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties (or attributes, or `onclick`-like listeners) and children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

/** A button that copies `text()` and says so. */
export function copyButton(text, label = "Copy") {
  const words = el("span", {}, label);
  const button = el("button", { type: "button", className: "copy" }, icon("copy"), words);
  button.addEventListener("click", async () => {
    const copied = await copy(text(), button);
    words.textContent = copied ? "Copied" : "Press Ctrl+C";
    button.firstChild.replaceWith(icon(copied ? "check" : "copy"));
    setTimeout(() => {
      words.textContent = label;
      button.firstChild.replaceWith(icon("copy"));
    }, 1600);
  });
  return button;
}

async function copy(text, near) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Plain http on another address than localhost has no clipboard API: select the text instead.
    const shown = near.parentElement?.querySelector("code");
    if (shown) getSelection().selectAllChildren(shown);
    return false;
  }
}

export function command(line) {
  return el("div", { className: "command" }, el("code", { tabIndex: 0 }, line), copyButton(() => line));
}

/** Runs `work` once, `ms` after the last call; `.cancel()` forgets it. */
export function debounce(work, ms) {
  let timer = 0;
  const later = () => {
    clearTimeout(timer);
    timer = setTimeout(work, ms);
  };
  later.cancel = () => clearTimeout(timer);
  return later;
}

export const count = (n, one, many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;
