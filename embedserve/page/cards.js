// Results: a list of cards, each a button that searches by its item and a button for its metadata.

import { showImage } from "./api.js";
import { el, icon } from "./dom.js";

/** What to call an item: its caption or name, else the last part of its id. */
export function nameOf({ id, metadata = {} }) {
  for (const field of ["caption", "name", "title", "text"]) {
    const value = metadata?.[field];
    if (typeof value === "string" && value.trim()) return value.trim();
  }
  return id.split("/").pop() || id;
}

export const scoreText = (score) => score.toFixed(3);

const names = new Map(); // of every item shown so far, for the query's chip

/** The name of an item by its id: as it was shown, else the last part of the id. */
export const nameOfId = (id) => names.get(id) ?? nameOf({ id });

/** The picture of an item, or its words where it has none. */
export function picture(item) {
  if (!item.thumbnail) return el("span", { className: "no-picture" }, nameOf(item));
  const img = el("img", { alt: nameOf(item), draggable: false, decoding: "async" });
  showImage(img, item.thumbnail);
  return img;
}

function card(item, { onlike, ondetail }) {
  const name = nameOf(item);
  names.set(item.id, name);
  const like = el("button", { type: "button", className: "like", title: "More like this", onclick: () => onlike(item) },
    el("span", { className: "sr-only" }, "More like "), picture(item));
  const info = el("button", { type: "button", className: "info", title: "Details", onclick: () => ondetail(item) },
    icon("info"), el("span", { className: "sr-only" }, `Details of ${name}`));
  const node = el("li", { className: "card" }, like, info);
  const caption = el("p", { className: "caption" }, el("span", { className: "name", title: item.id }, name));
  node.append(caption);
  if (item.score !== undefined) {
    caption.append(el("span", { className: "score" }, el("span", { className: "sr-only" }, "score "), scoreText(item.score)));
    const bar = el("span", { className: "score-bar" });
    bar.style.width = `${Math.max(0, Math.min(1, item.score)) * 100}%`;
    like.append(bar);
  }
  return node;
}

/** Appends cards for `items` to `list`. */
export function appendCards(list, items, actions) {
  list.append(...items.map((item) => card(item, actions)));
}

/** Arrow keys, Home and End move between the cards of `list`; up and down keep the column. */
export function arrowKeys(list) {
  list.addEventListener("keydown", (event) => {
    const cards = [...list.children];
    const at = cards.indexOf(event.target.closest(".card"));
    if (at < 0) return;
    const columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns, Home: -at, End: cards.length - 1 - at };
    const target = cards[at + (step[event.key] ?? NaN)];
    if (!target) return;
    event.preventDefault();
    target.querySelector(".like").focus();
  });
}
