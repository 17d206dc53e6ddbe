// What the page says when there is nothing to show: what is wrong, and what to do about it.

import { command, el } from "./dom.js";

/** A notice with a title, a line or more (strings or elements), and buttons. */
export function notice(title, lines = [], buttons = []) {
  const body = lines.map((line) => (typeof line === "string" ? el("p", {}, line) : line));
  return el("div", { className: "notice" }, el("h2", {}, title), ...body,
    buttons.length ? el("div", { className: "row" }, ...buttons) : "");
}

export const button = (label, onclick, className = "") => el("button", { type: "button", className, onclick }, label);

export function noCollections(openAdd) {
  return notice("No collections yet", ["Index a folder of images on this machine:",
    command("embedserve index photos/ --collection photos"), "or add some from here."],
  [button("Add images", openAdd, "primary")]);
}

export function emptyCollection(name, openAdd) {
  return notice(`“${name}” is empty`, ["Index a folder of images into it:",
    command(`embedserve index photos/ --collection ${name}`), "or drop images here."],
  [button("Add images", openAdd, "primary")]);
}

/** An error as the server worded it, and a way on where there is one. */
export function failure(error, { retry, collections = [] } = {}) {
  const titles = {
    0: "No answer",
    401: "An API key is needed",
    403: "Not allowed with this key",
    404: "Not found",
    409: "Made with another encoder",
    413: "Too large",
    415: "Not an image",
    422: "Not a valid request",
    429: "Busy",
    503: "Not ready yet",
  };
  const lines = [error.message];
  if (waits(error)) lines.push("Trying again by itself.");
  const buttons = retry ? [button("Try again", retry)] : [];
  for (const [label, onclick] of collections) buttons.push(button(label, onclick));
  return notice(titles[error.status] ?? "Something went wrong", lines, buttons);
}

/** Whether an error goes away by itself, so that asking again makes sense. */
export const waits = (error) => [0, 429, 502, 503, 504].includes(error.status);

/** Shows the call as a line that can be copied. */
export function showCall(place, line) {
  if (!line) return place.replaceChildren();
  const open = place.querySelector("details")?.open ?? false;
  const details = el("details", { open }, el("summary", {}, "API call"), command(line));
  place.replaceChildren(details);
}
