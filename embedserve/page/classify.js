// The classify view: one image, one's own labels or a saved set of them, and how likely each is.

import { call, curl } from "./api.js";
import { $, command, count, debounce, el } from "./dom.js";
import { preview } from "./images.js";
import { failure, notice, showCall, waits } from "./notices.js";
import { state } from "./state.js";

const SUGGESTED = "person, animal, plant, food, vehicle, building";

const SHOWN = 20; // labels of a saved set, which may have thousands

let page; // {navigate, canReadText, labelSets, reload}
let request = new AbortController();
let retryTimer = 0;
let pictured = null; // the file that the preview shows

export function setUpClassify(given) {
  page = given;
  const type = debounce(() => submit({ draft: true }), 500);
  for (const name of ["labels", "templates"]) $(name).addEventListener("input", type);
  $("label-set").addEventListener("change", ({ target }) => page.navigate({ set: target.value }));
  $("classify-form").addEventListener("submit", (event) => {
    event.preventDefault();
    type.cancel();
    if (state.file || state.image) submit({});
    else $("classify-file").click();
  });
  $("classify-drop").addEventListener("click", () => $("classify-file").click());
  $("classify-file").addEventListener("change", ({ target }) => {
    if (target.files.length) page.navigate({ file: target.files[0], image: "" });
    target.value = "";
  });
}

const lines = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);
const labelsOf = (text) => [...new Set(text.split(/[,\n]/).map((label) => label.trim()).filter(Boolean))];

function submit({ draft = false }) {
  page.navigate({ labels: $("labels").value.trim(), templates: $("templates").value.trim() }, { typing: true, draft });
}

function fill() {
  const labels = state.labels || (document.activeElement === $("labels") ? "" : SUGGESTED);
  if ($("labels").value.trim() !== labels) $("labels").value = labels;
  if ($("templates").value.trim() !== state.templates) $("templates").value = state.templates;
  fillSets();
  const img = $("classify-image");
  img.hidden = !state.file;
  if (state.file && state.file !== pictured) preview(img, state.file);
  pictured = state.file;
  img.alt = state.file ? `The image to classify: ${state.file.name || "pasted image"}` : "";
  $("classify-drop-text").textContent = state.file ? "Choose another image" : state.image || "Drop, paste or choose an image";
  $("classify-drop").classList.toggle("filled", Boolean(state.file));
}

/** Without text there are only saved sets, and the first is taken where the address names none. */
function fillSets() {
  const names = [...page.labelSets()];
  if (!state.set && !page.canReadText()) state.set = names[0] ?? "";
  const options = names.map((name) => el("option", { value: name }, name));
  if (page.canReadText()) options.unshift(el("option", { value: "" }, "My own words"));
  if (state.set && !names.includes(state.set)) options.push(el("option", { value: state.set }, `${state.set} (not found)`));
  $("label-set").replaceChildren(...options);
  $("label-set").value = state.set;
  $("label-set-field").hidden = !names.length && !state.set;
  for (const field of ["labels-field", "templates-field"]) $(field).hidden = Boolean(state.set);
}

export async function showClassify() {
  request.abort();
  request = new AbortController();
  clearTimeout(retryTimer);
  const { signal } = request;
  document.title = "Classify · EmbedServe";
  fill();
  const labels = labelsOf($("labels").value);
  $("classify-status").textContent = "";
  if (!state.set && !page.canReadText()) {
    showCall($("classify-call"), "");
    return show(notice("This encoder reads no text", ["Labels are words, so zero-shot classification needs an encoder with a text tower. "
      + "Teach it labels with a collection whose items have them:",
      command("embedserve train probe --collection NAME --label FIELD --save NAME")]));
  }
  if (!(state.file || state.image) || !(state.set || labels.length)) {
    showCall($("classify-call"), "");
    const title = state.file || state.image ? "Give some labels" : "Give an image";
    const text = state.lostFile ? "The image is gone after a reload; drop it again."
      : state.set ? "The label set was saved on this server, with its words or fitted to labelled images."
        : "The encoder compares the image with each label. No training needed.";
    return show(notice(title, [text]));
  }
  try {
    await run(labels, signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    if (!("status" in error)) throw error;
    $("classify-status").textContent = "";
    show(failure(error, { retry: page.reload }));
    if (waits(error)) retryTimer = setTimeout(page.reload, (error.retryAfter * 1000) || 3000);
  }
}

async function run(labels, signal) {
  const { send, show: shown } = classifyRequest(labels, lines($("templates").value));
  showCall($("classify-call"), curl("POST", "/v1/classify", shown));
  const { results } = await call("POST", "/v1/classify", { ...send, signal });
  const [answer] = results;
  const [best] = answer.labels;
  const among = state.set ? `by the label set “${state.set}”` : `among ${count(labels.length, "label")}`;
  $("classify-status").textContent = `${best.label}, ${percent(best.probability)} ${among}`;
  const bars = el("ol", { className: "bars" }, ...answer.labels.map(bar));
  const note = answer.labels.length === 1 ? "One label has nothing to compare with. Give two or more." : "";
  return show(bars, el("p", { className: "hint" }, note));
}

function classifyRequest(labels, templates) {
  const asked = state.set ? { label_set: state.set, top: SHOWN } : { labels, top: labels.length };
  if (templates.length && !state.set) asked.templates = templates;
  if (!state.file) {
    const json = { images: [state.image], ...asked };
    return { send: { json }, show: { json } };
  }
  const form = new FormData();
  const name = state.file.name || "image.png";
  // A first label that looks like JSON would be read as JSON.
  const plain = !/^[[{]/.test(labels[0]);
  const words = { labels: plain ? labels.join(",") : JSON.stringify(labels), templates: JSON.stringify(templates) };
  const fields = Object.entries(asked).map(([field, value]) => [field, words[field] ?? String(value)]);
  form.append("image", state.file, name);
  for (const [field, value] of fields) form.append(field, value);
  return { send: { form }, show: { files: [["image", name]], fields } };
}

const percent = (p) => `${(p * 100).toFixed(p < 0.0995 ? 1 : 0)}%`;

function bar({ label, probability, cosine }) {
  const fill = el("span", { className: "bar-fill" });
  fill.style.width = `${probability * 100}%`;
  return el("li", {}, el("span", { className: "bar-label" }, label),
    el("span", { className: "bar-percent" }, percent(probability)),
    el("span", { className: "bar-track" }, fill),
    el("span", { className: "bar-cosine" }, `cosine ${cosine.toFixed(3)}`));
}

const show = (...nodes) => $("bars").replaceChildren(...nodes);
