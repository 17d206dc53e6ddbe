// The dialog with all that is known about one item.

import { fetchBlob } from "./api.js";
import { nameOf, picture, scoreText } from "./cards.js";
import { $, copyButton, el, icon } from "./dom.js";
import { preview } from "./images.js";

let shown = []; // the results that ← and → step through
let at = 0;
let actions = {};

/**
 * @param {{onlike: Function, onclassify: Function, heat: Function}} given what the dialog's buttons do; `heat()` is what
 *   a heat map is asked for, {} or {text}, or null where the encoder has none
 */
export function setUpDetail(given) {
  actions = given;
  $("detail").addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
  });
}

export function openDetail(items, item) {
  shown = items;
  at = items.indexOf(item);
  render();
  $("detail").showModal();
}

function step(by) {
  if (!shown[at + by]) return;
  at += by;
  render();
}

function render() {
  const item = shown[at];
  const close = () => $("detail").close();
  $("detail-title").textContent = nameOf(item);
  const facts = el("dl", { className: "facts" }, ...row("id", item.id, true));
  if (item.score !== undefined) facts.append(...row("score", scoreText(item.score)));
  for (const [name, value] of Object.entries(item.metadata ?? {})) facts.append(...row(name, value));
  const back = stepButton("left", "Previous result", -1);
  const forward = stepButton("right", "Next result", 1);
  const like = el("button", { type: "button", className: "primary", onclick: () => (close(), actions.onlike(item)) },
    icon("search"), "More like this");
  const buttons = el("div", { className: "row" }, like);
  if (item.thumbnail) {
    buttons.append(el("button", { type: "button", onclick: () => classify(item, close) }, icon("bars"), "Classify"));
  }
  const frame = el("div", { className: "frame" }, picture(item));
  const heat = item.thumbnail && actions.heat();
  const said = el("p", { className: "hint", role: "status" });
  if (heat) buttons.append(heatButton(item, heat, frame, said));
  const focused = document.activeElement?.dataset?.step;
  $("detail-body").replaceChildren(
    el("div", { className: "stage" }, back, frame, forward), buttons, said, facts);
  if (focused) (focused === "-1" ? back : forward).focus();
}

function stepButton(name, label, by) {
  const button = el("button", { type: "button", className: "quiet step", title: label, onclick: () => step(by) },
    icon(name), el("span", { className: "sr-only" }, label));
  button.dataset.step = by;
  // Not `disabled`: a disabled button would lose the focus at the end of the list.
  if (!shown[at + by]) button.setAttribute("aria-disabled", "true");
  return button;
}

function row(name, value, copy = false) {
  const text = typeof value === "string" ? value : JSON.stringify(value, null, 1);
  const description = el("dd", {}, el("span", {}, text));
  if (copy) description.append(copyButton(() => text));
  return [el("dt", {}, name), description];
}

/** Shows in the frame which parts of the picture its vector comes from or, with a text, are like the text. */
function heatButton(item, asked, frame, said) {
  const button = el("button", { type: "button", ariaPressed: "false" }, icon("heat"), "Heat map");
  button.addEventListener("click", async () => {
    if (button.ariaPressed === "true") {
      button.ariaPressed = "false";
      said.textContent = "";
      return frame.replaceChildren(picture(item));
    }
    try {
      const form = new FormData();
      form.append("file", await fetchBlob(item.thumbnail), "picture");
      for (const [name, value] of Object.entries({ ...asked, format: "png" })) form.append(name, value);
      const img = el("img", { alt: `Heat map of ${nameOf(item)}` });
      preview(img, await fetchBlob("/v1/heatmap", form));
      button.ariaPressed = "true";
      said.textContent = asked.text ? `Bright: like “${asked.text}”` : "Bright: what the vector is made from";
      frame.replaceChildren(img);
    } catch (error) {
      if (!("status" in error)) throw error;
      said.textContent = error.message;
    }
  });
  return button;
}

async function classify(item, close) {
  const blob = await fetchBlob(item.thumbnail);
  close();
  actions.onclassify(new File([blob], item.id.split("/").pop(), { type: blob.type }));
}
