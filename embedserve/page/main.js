// Starts the page: what the server has, which view is on, and what is the same in every view.

import { openAdd, setUpAdd } from "./add.js";
import { call, forgetKey, key, onKeyNeeded } from "./api.js";
import { setUpClassify, showClassify } from "./classify.js";
import { setUpDetail } from "./detail.js";
import { $, count, el } from "./dom.js";
import { filesOf, imageOf } from "./images.js";
import { failure, waits } from "./notices.js";
import { setUpSearch, showSearch } from "./search.js";
import { address, go, readState, state } from "./state.js";

let collections = [];
let labelSets = [];
let encoder = null;
let retryTimer = 0;

const page = {
  collections: () => collections,
  current: () => state.in,
  labelSets: () => labelSets,
  canReadText: () => encoder === null || encoder.modalities.includes("text"),
  openAdd: () => openAdd(),
  navigate(changes, { keepPlace, ...how } = {}) {
    go(changes, how);
    if (keepPlace === undefined && !how.draft) scrollTo({ top: 0 });
    return show({ keepPlace });
  },
  reload: () => start(),
  async done(name, changed) {
    await readServer();
    if (changed) await page.navigate({ view: "search", in: name, text: "", like: "", file: null, image: "" });
  },
};

// What the server has ----------------------------------------------------------------------------------------

async function readServer() {
  const paths = ["/v1/models", "/v1/collections", "/v1/labelsets"];
  const [models, known, saved] = await Promise.all(paths.map((path) => call("GET", path)));
  [encoder] = models.data;
  collections = known.collections;
  labelSets = saved.label_sets;
}

async function start() {
  clearTimeout(retryTimer);
  try {
    await readServer();
  } catch (error) {
    if (!("status" in error)) throw error;
    readState();
    showView();
    $(state.view === "classify" ? "bars" : "results").replaceChildren(failure(error, { retry: start }));
    if (waits(error)) retryTimer = setTimeout(start, (error.retryAfter * 1000) || 3000);
    return;
  }
  readState();
  await show();
}

/** Shows the view of the state, with the collection chosen if the address names none. */
async function show({ keepPlace } = {}) {
  if (!state.in) state.in = (collections.find(({ items }) => items > 0) ?? collections[0])?.name ?? "";
  showView();
  const options = collections.map(({ name, items }) =>
    el("option", { value: name }, `${name} (${items?.toLocaleString("en") ?? "cannot be used"})`));
  if (state.in && !collections.some(({ name }) => name === state.in)) {
    options.push(el("option", { value: state.in }, `${state.in} (not found)`));
  }
  $("collection").replaceChildren(...options);
  $("collection").value = state.in;
  $("picker").hidden = !options.length || state.view !== "search";
  $("add-open").hidden = state.view !== "search";
  $("key-forget").hidden = !key();
  $("encoder").textContent = encoder ? `Encoder ${encoder.id}, ${count(encoder.dim, "dimension")}` : "";
  if (state.view === "classify") await showClassify();
  else await showSearch({ keepPlace });
}

function showView() {
  for (const view of ["search", "classify"]) {
    const on = state.view === view;
    $(`${view}-view`).hidden = !on;
    $(`to-${view}`).href = address({ ...state, view });
    if (on) $(`to-${view}`).setAttribute("aria-current", "page");
    else $(`to-${view}`).removeAttribute("aria-current");
  }
  $("drop-use-title").textContent = state.view === "classify" ? "Classify this image" : "Search by this image";
  $("drop-add-title").textContent = state.in ? `Add to ${state.in}` : "Add to a collection";
}

// The key ----------------------------------------------------------------------------------------------------

function askForKey(message) {
  $("key-message").textContent = message;
  $("key-message").classList.toggle("wrong", key() !== null);
  $("key-input").value = "";
  $("key").showModal();
  return new Promise((resolve) => {
    const done = new AbortController();
    const finish = (given) => {
      done.abort();
      $("key").close();
      resolve(given);
    };
    const { signal } = done;
    $("key-form").addEventListener("submit", (event) => (event.preventDefault(), finish($("key-input").value.trim())), { signal });
    $("key-cancel").addEventListener("click", () => finish(null), { signal });
    $("key").addEventListener("close", () => finish(null), { signal });
  });
}

// Images from anywhere on the page ---------------------------------------------------------------------------

function use(found) {
  if (!found) return;
  page.navigate({ ...found, like: "" });
}

const carriesImage = (event) => ["Files", "text/uri-list"].some((kind) => event.dataTransfer?.types.includes(kind));

function setUpDrops() {
  const overlay = $("drop");
  const hide = () => {
    overlay.hidden = true;
    for (const zone of overlay.children) zone.classList.remove("over");
  };
  addEventListener("dragstart", (event) => {
    if (event.target.closest?.("a, img")) event.preventDefault(); // our own links and pictures are no input
  });
  addEventListener("dragenter", (event) => {
    if (!carriesImage(event)) return;
    event.preventDefault();
    overlay.hidden = $("key").open || $("add").open;
  });
  addEventListener("dragover", (event) => {
    if (!carriesImage(event)) return;
    event.preventDefault();
    event.dataTransfer.dropEffect = "copy";
    for (const zone of overlay.children) zone.classList.toggle("over", zone.contains(event.target));
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) hide(); // left the window
  });
  addEventListener("drop", async (event) => {
    if (!carriesImage(event)) return;
    event.preventDefault();
    hide();
    if ($("key").open) return;
    if ($("add").open || event.target.closest("#drop-add")) openAdd(await filesOf(event.dataTransfer));
    else {
      $("detail").close();
      use(imageOf(event.dataTransfer));
    }
  });
  addEventListener("paste", (event) => {
    if (document.querySelector("dialog[open]") || !event.clipboardData.files.length) return;
    event.preventDefault();
    use(imageOf(event.clipboardData));
  });
}

// The rest ---------------------------------------------------------------------------------------------------

function setUpKeys() {
  addEventListener("keydown", (event) => {
    const typing = event.target.closest("input, textarea, select, dialog");
    if (event.key !== "/" || typing || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    const field = state.view === "classify" ? $("labels") : $("text");
    field.focus();
    field.select();
  });
  $("skip").addEventListener("click", (event) => (event.preventDefault(), $("main").focus()));
}

function setUp() {
  readState(); // before the server has answered: an image may be chosen by then, and must not lose the address
  onKeyNeeded(askForKey);
  setUpSearch(page);
  setUpClassify(page);
  setUpAdd(page);
  setUpDetail({
    onlike: (item) => page.navigate({ like: item.id, text: "", file: null, image: "" }),
    onclassify: (file) => page.navigate({ view: "classify", file, image: "" }),
    heat: () => {
      const { attention, text_space: comparable } = encoder?.outputs ?? {};
      return comparable && state.text ? { text: state.text } : attention ? {} : null;
    },
  });
  setUpDrops();
  setUpKeys();
  for (const dialog of document.querySelectorAll("dialog")) {
    dialog.querySelector(".close")?.addEventListener("click", () => dialog.close());
  }
  $("detail").addEventListener("mousedown", ({ target }) => target === $("detail") && $("detail").close()); // beside it
  for (const view of ["search", "classify"]) {
    $(`to-${view}`).addEventListener("click", (event) => {
      if (event.ctrlKey || event.metaKey || event.shiftKey) return;
      event.preventDefault();
      page.navigate({ view });
    });
  }
  $("collection").addEventListener("change", ({ target }) => page.navigate({ in: target.value, like: "" }));
  $("add-open").addEventListener("click", () => openAdd());
  $("key-forget").addEventListener("click", () => (forgetKey(), start()));
  history.scrollRestoration = "manual";
  addEventListener("popstate", async (event) => {
    for (const dialog of document.querySelectorAll("dialog[open]")) dialog.close();
    readState();
    await show();
    scrollTo({ top: event.state?.scroll ?? 0 });
  });
  start();
}

setUp();
