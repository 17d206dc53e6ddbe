// The search view: a query of text, an image or an item, or a mix of them; and the collection itself without one.

import { IMAGE, call, curl, showImage } from "./api.js";
import { appendCards, arrowKeys, nameOfId } from "./cards.js";
import { openDetail } from "./detail.js";
import { $, count, debounce, el, icon } from "./dom.js";
import { base64, isAddress, previewOf } from "./images.js";
import { button, emptyCollection, failure, noCollections, notice, showCall, waits } from "./notices.js";
import { state } from "./state.js";

const BROWSE = 48;
const RETRY_MS = 3000;

let page; // {navigate, collections, canReadText, openAdd}
let request = new AbortController();
let retryTimer = 0;

export function setUpSearch(given) {
  page = given;
  const type = debounce(() => submit({ draft: true }), 300);
  $("text").addEventListener("input", type);
  $("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    type.cancel();
    submit({ again: true });
  });
  $("choose").addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", ({ target }) => {
    if (target.files.length) page.navigate({ file: target.files[0], image: "", like: "" });
    target.value = "";
  });
  for (const name of ["k", "diversity", "mix", "less", "filter"]) {
    $(name).addEventListener("change", () => submit({ again: true }));
  }
  for (const name of ["diversity", "mix"]) $(name).addEventListener("input", showOptionValues);
}

function submit({ draft = false, again = false }) {
  const text = $("text").value.trim();
  if (!$("k").reportValidity()) return;
  const changes = { text, less: $("less").value.trim(), filter: $("filter").value.trim() };
  for (const name of ["k", "diversity", "mix"]) changes[name] = $(name).valueAsNumber;
  if (isAddress(text)) Object.assign(changes, { text: "", image: text, file: null, like: "" });
  const changed = Object.keys(changes).some((name) => changes[name] !== state[name]);
  if (changed || again) page.navigate(changes, { typing: true, draft });
}

// The query --------------------------------------------------------------------------------------------------

/** Fills the form from the state. */
function fill() {
  // Someone who is typing keeps what they type, the space at its end included.
  if ($("text").value.trim() !== state.text) $("text").value = state.text;
  for (const name of ["k", "diversity", "mix", "less", "filter"]) $(name).value = state[name];
  showOptionValues();
  const hasImage = Boolean(state.file || state.image || state.like);
  $("mix-field").hidden = !(hasImage && state.text);
  $("text").disabled = !page.canReadText();
  $("less").disabled = !page.canReadText();
  $("text").placeholder = !page.canReadText() ? "This encoder reads no text: search by image"
    : hasImage ? "Add words to move the search" : "Describe an image, or drop one here";
  const parts = [];
  const remove = { file: null, image: "", like: "" };
  if (state.file) parts.push(part(previewOf(state.file, ""), state.file.name || "pasted image", remove));
  if (state.image) parts.push(part(icon("image"), state.image, remove));
  if (state.like) {
    const img = el("img", { alt: "" });
    showImage(img, thumbnailUrl(state.like));
    parts.push(part(img, `like ${nameOfId(state.like)}`, remove));
  }
  $("parts").replaceChildren(...parts);
}

const thumbnailUrl = (id) => `/v1/collections/${encodeURIComponent(state.in)}/thumbnails/${pathOf(id)}`;
const pathOf = (id) => id.split("/").map(encodeURIComponent).join("/");

function part(shown, label, changes) {
  const drop = el("button", { type: "button", className: "quiet", onclick: () => (page.navigate(changes), $("text").focus()) },
    icon("close"), el("span", { className: "sr-only" }, `Remove ${label}`));
  return el("li", { className: "part" }, shown, el("span", { className: "part-name", title: label }, label), drop);
}

function showOptionValues() {
  const mix = Math.round($("mix").valueAsNumber * 100);
  $("diversity-out").textContent = $("diversity").value;
  $("mix-out").textContent = `${mix} : ${100 - mix}`;
  $("filter-error").textContent = "";
}

/** The request for the state: what to send, and what to show as curl. Null when the filter is not JSON. */
async function searchRequest() {
  const options = { k: state.k };
  if (state.diversity) options.diversity = state.diversity;
  if (state.filter) {
    try {
      options.filter = JSON.parse(state.filter);
    } catch (error) {
      $("options").open = true;
      $("filter-error").textContent = `The filter is not JSON: ${error.message}.`;
      return null;
    }
  }
  const images = [];
  if (state.file) images.push({ image: IMAGE });
  if (state.image) images.push({ image: state.image });
  if (state.like) images.push({ id: state.like });
  const texts = state.text ? [{ text: state.text }] : [];

  // An image file alone goes as a form, the way curl sends it most easily.
  if (state.file && !texts.length && !state.less) {
    const form = new FormData();
    const fields = Object.entries(options).map(([name, value]) =>
      [name, typeof value === "object" ? JSON.stringify(value) : String(value)]);
    form.append("image", state.file, state.file.name || "image.png");
    for (const [name, value] of fields) form.append(name, value);
    return { send: { form }, show: { files: [["image", state.file.name || "image.png"]], fields } };
  }
  const parts = [...texts, ...images];
  let query = parts[0];
  if (parts.length > 1 || state.less) {
    const share = parts.length > 1 ? { text: state.mix, other: Math.round((1 - state.mix) * 10) / 10 } : { text: 1, other: 1 };
    const weighted = parts.map((each) => ({ ...each, weight: "text" in each ? share.text : share.other }));
    if (state.less) weighted.push({ text: state.less, weight: -0.5 });
    query = { query: weighted };
  }
  const shown = { ...query, ...options };
  if (!state.file) return { send: { json: shown }, show: { json: shown } };
  const bytes = await base64(state.file);
  const json = JSON.parse(JSON.stringify(shown), (_, value) => (value === IMAGE ? bytes : value));
  return { send: { json }, show: { json: shown, image: state.file.name || "image.png" } };
}

// The answer -------------------------------------------------------------------------------------------------

const actions = {
  onlike: (item) => {
    page.navigate({ like: item.id, text: "", file: null, image: "" });
    $("results").focus({ preventScroll: true });
  },
  ondetail: (item) => openDetail(shownItems, item),
};
let shownItems = [];

/** Shows the state: runs the search, or lists the collection. */
export async function showSearch({ keepPlace = false } = {}) {
  request.abort();
  request = new AbortController();
  clearTimeout(retryTimer);
  const { signal } = request;
  fill();
  const asked = state.text || state.file || state.image || state.like;
  const known = page.collections();
  document.title = asked ? `${state.text || "Search by image"} · ${state.in} · EmbedServe` : "EmbedServe";
  if (!state.in) {
    say("");
    showCall($("search-call"), "");
    return show(noCollections(page.openAdd));
  }
  const slow = setTimeout(() => ($("results").ariaBusy = "true"), 200);
  try {
    if (asked) await runSearch(signal, keepPlace);
    else if (known.find(({ name }) => name === state.in)?.items === 0) {
      say(state.lostFile ? lost : "");
      show(emptyCollection(state.in, page.openAdd));
    } else await browse(signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!("status" in error)) throw error;
    fail(error);
  } finally {
    clearTimeout(slow);
    if (!signal.aborted) $("results").ariaBusy = "false";
  }
}

const lost = "The image of that search is gone after a reload; drop it again.";

async function runSearch(signal, keepPlace) {
  const path = `/v1/collections/${encodeURIComponent(state.in)}/search`;
  const made = await searchRequest();
  signal.throwIfAborted();
  if (!made) return;
  showCall($("search-call"), curl("POST", path, made.show));
  const { hits, took_ms: took } = await call("POST", path, { ...made.send, signal });
  say(`${count(hits.length, "result")} in ${Math.max(1, Math.round(took))} ms`);
  if (!hits.length) {
    const clear = state.filter ? [button("Remove the filter", () => page.navigate({ filter: "" }))] : [];
    return show(notice("Nothing found", [state.filter ? "No item matches the filter." : `“${state.in}” holds no other item.`], clear));
  }
  const list = newList(hits);
  const more = hits.length === state.k && state.k < 1000 ? [moreButton(() => showMore(hits.length))] : [];
  show(list, ...more);
  if (keepPlace !== false && list.children[keepPlace]) list.children[keepPlace].querySelector(".like").focus();
}

async function showMore(from) {
  await page.navigate({ k: Math.min(1000, state.k * 2) }, { replace: true, keepPlace: from });
}

async function browse(signal) {
  const base = `/v1/collections/${encodeURIComponent(state.in)}/items`;
  const query = state.filter ? `&filter=${encodeURIComponent(state.filter)}` : "";
  const first = `${base}?limit=${BROWSE}${query}`;
  showCall($("search-call"), curl("GET", first));
  let { items, next } = await call("GET", first, { signal });
  const info = page.collections().find(({ name }) => name === state.in);
  const about = info && !state.filter ? [count(info.items, "item"), info.description].filter(Boolean).join(" · ") : "";
  say(state.lostFile ? lost : about);
  if (!items.length) {
    return show(state.filter
      ? notice("Nothing found", ["No item matches the filter."], [button("Remove the filter", () => page.navigate({ filter: "" }))])
      : emptyCollection(state.in, page.openAdd));
  }
  const list = newList(items);
  const more = moreButton(async () => {
    const answer = await call("GET", `${first}&after=${encodeURIComponent(next)}`, { signal });
    const from = list.children.length;
    next = answer.next;
    shownItems.push(...answer.items);
    appendCards(list, answer.items, actions);
    list.children[from]?.querySelector(".like").focus();
    if (next === null) more.remove();
  });
  show(list, ...(next === null ? [] : [more]));
}

const moreButton = (work) => el("button", { type: "button", className: "more", onclick: work }, "Show more");

function newList(items) {
  shownItems = [...items];
  const list = el("ol", { className: "grid" });
  arrowKeys(list);
  appendCards(list, items, actions);
  return list;
}

function fail(error) {
  say("");
  const others = error.status === 404 || error.status === 409
    ? page.collections().filter(({ name }) => name !== state.in).slice(0, 5)
      .map(({ name }) => [name, () => page.navigate({ in: name, like: "" })]) : [];
  show(failure(error, { retry: page.reload, collections: others }));
  if (waits(error)) retryTimer = setTimeout(page.reload, (error.retryAfter * 1000) || RETRY_MS);
}

const say = (text) => ($("search-status").textContent = text);
const show = (...nodes) => $("results").replaceChildren(...nodes);

