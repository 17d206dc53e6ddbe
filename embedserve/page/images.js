// Where images come from: a file chooser, a drop, the clipboard, an address.

import { el } from "./dom.js";

export const isAddress = (text) => /^https?:\/\/\S+$/i.test(text.trim());

/** base64 of a file's bytes, without the data: prefix. */
export function base64(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result.slice(reader.result.indexOf(",") + 1));
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

/** Shows a local file in `img`. Formats that the browser cannot read (TIFF) keep their place, without a picture. */
export function preview(img, file) {
  const url = URL.createObjectURL(file);
  const done = () => URL.revokeObjectURL(url);
  img.classList.remove("broken");
  img.addEventListener("load", done, { once: true });
  img.addEventListener("error", () => (done(), img.classList.add("broken")), { once: true });
  img.src = url;
}

export const previewOf = (file, alt) => {
  const img = el("img", { alt });
  preview(img, file);
  return img;
};

/** The image of a clipboard or drop: a file, or the address of an image of another page. */
export function imageOf(transfer) {
  const file = [...transfer.files].find((each) => each.type.startsWith("image/")) ?? transfer.files[0];
  if (file) return { file, image: "" };
  const address = transfer.getData("text/uri-list").split("\n").find((line) => isAddress(line));
  return address ? { file: null, image: address.trim() } : null;
}

/** All files of a drop, those in folders too, as {file, id}; the id is the path inside what was dropped. */
export async function filesOf(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return [...transfer.files].map((file) => ({ file, id: file.name }));
  const found = [];
  for (const entry of entries) await walk(entry, found);
  return found;
}

async function walk(entry, found) {
  if (entry.isFile) {
    const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
    if (file.type.startsWith("image/")) found.push({ file, id: entry.fullPath.replace(/^\//, "") });
    return;
  }
  const reader = entry.createReader();
  for (;;) {
    const some = await new Promise((resolve, reject) => reader.readEntries(resolve, reject));
    if (!some.length) return; // readEntries gives at most 100 at a time
    for (const each of some) await walk(each, found);
  }
}
