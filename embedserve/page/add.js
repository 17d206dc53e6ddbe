// Adding images to a collection: in parts, with progress, and with the reason for each file that fails.

import { call, curl } from "./api.js";
import { $, count, el } from "./dom.js";
import { showCall } from "./notices.js";

const PART_FILES = 32;
const PART_BYTES = 16 * 1024 * 1024;
const TRIES = 6;

let page; // {collections, current, done}
let chosen = []; // [{file, id}]
let running = null; // the AbortController of an upload under way

export function setUpAdd(given) {
  page = given;
  for (const [button, input] of [["add-files", "add-files-input"], ["add-folder", "add-folder-input"]]) {
    $(button).addEventListener("click", () => $(input).click());
    $(input).addEventListener("change", ({ target }) => {
      const images = [...target.files].filter((file) => input === "add-files-input" || file.type.startsWith("image/"));
      choose(images.map((file) => ({ file, id: file.webkitRelativePath || file.name })));
      target.value = "";
    });
  }
  $("add-name").addEventListener("input", describe);
  $("add-cancel").addEventListener("click", () => (running ? running.abort() : $("add").close()));
  $("add").addEventListener("close", () => running?.abort());
  $("add-form").addEventListener("submit", (event) => {
    event.preventDefault();
    if (chosen.length && !running) upload();
    else if (!chosen.length) $("add-files-input").click();
  });
}

export function openAdd(files = []) {
  $("add-name").value = page.current() || "photos";
  $("add-names").replaceChildren(...page.collections().map(({ name }) => el("option", { value: name })));
  $("add-status").textContent = "";
  $("add-errors").replaceChildren();
  $("add-progress").hidden = true;
  choose(files);
  if (!$("add").open) $("add").showModal();
  (files.length ? $("add-go") : $("add-files")).focus();
}

function choose(files) {
  chosen = files;
  $("add-errors").replaceChildren();
  $("add-status").textContent = "";
  describe();
}

function describe() {
  const bytes = chosen.reduce((sum, { file }) => sum + file.size, 0);
  $("add-chosen").textContent = chosen.length
    ? `${count(chosen.length, "image")}, ${size(bytes)}. A name that is there already is replaced.`
    : "Or drop images or a folder on the page.";
  $("add-go").textContent = chosen.length ? `Add ${count(chosen.length, "image")}` : "Add";
  const path = `/v1/collections/${$("add-name").value || "photos"}/items`;
  showCall($("add-call"), chosen.length ? curl("POST", path, { files: chosen.slice(0, 3).map(({ id }) => ["file", id]) }) : "");
}

const size = (bytes) => (bytes < 1e6 ? `${Math.ceil(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);

function* parts(files) {
  let part = [];
  let bytes = 0;
  for (const each of files) {
    if (part.length && (part.length === PART_FILES || bytes + each.file.size > PART_BYTES)) {
      yield part;
      part = [];
      bytes = 0;
    }
    part.push(each);
    bytes += each.file.size;
  }
  if (part.length) yield part;
}

async function upload() {
  const name = $("add-name").value;
  const files = chosen;
  const failures = [];
  let added = 0;
  let sent = 0;
  running = new AbortController();
  const { signal } = running;
  busy(true);
  try {
    if (!page.collections().some((each) => each.name === name)) {
      await call("PUT", `/v1/collections/${encodeURIComponent(name)}`, { json: {}, signal });
    }
    for (const part of parts(files)) {
      const results = await send(name, part, signal);
      for (const result of results) {
        if (result.status === "ok") added += 1;
        else failures.push(`${result.id}: ${result.error.message}`);
      }
      sent += part.length;
      $("add-progress").value = sent / files.length;
      $("add-status").textContent = `${sent} of ${files.length}`;
    }
  } catch (error) {
    if (error.name !== "AbortError") {
      if (!("status" in error)) throw error;
      failures.push(error.message);
    }
  } finally {
    running = null;
    busy(false);
  }
  const left = files.length - sent;
  $("add-status").textContent = `${count(added, "image")} added`
    + (failures.length ? `, ${failures.length} failed` : "") + (left ? `, ${left} not sent` : "") + ".";
  $("add-errors").replaceChildren(...failures.map((text) => el("li", {}, text)));
  chosen = files.slice(sent);
  await page.done(name, added > 0);
  if (!failures.length && !left) $("add").close();
}

/** The results of one part. An answer in which everything failed still has them. */
async function send(name, part, signal) {
  const path = `/v1/collections/${encodeURIComponent(name)}/items`;
  for (let tried = 1; ; tried += 1) {
    const form = new FormData();
    for (const { file } of part) form.append("file", file);
    form.append("items", JSON.stringify(part.map(({ id }) => ({ id }))));
    try {
      return (await call("POST", path, { form, signal })).results;
    } catch (error) {
      if (error.status !== 429 || tried === TRIES) {
        if (error.body?.results) return error.body.results;
        throw error;
      }
      await new Promise((resolve) => setTimeout(resolve, (error.retryAfter || 1) * 1000));
      signal.throwIfAborted();
    }
  }
}

function busy(on) {
  $("add-progress").hidden = !on;
  $("add-progress").value = 0;
  for (const id of ["add-go", "add-files", "add-folder", "add-name"]) $(id).disabled = on;
  $("add-cancel").textContent = on ? "Stop" : "Close";
}
