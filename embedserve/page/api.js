// Talking to the server: the key, errors as the server words them, thumbnails, and the same call as curl.

const STORED_KEY = "embedserve.key";

/** An answer that is an error. `status` 0: no answer came. `body` is the whole answer, as JSON, or null. */
export class ApiError extends Error {
  constructor(message, status, { body = null, retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.body = body;
    this.retryAfter = retryAfter;
  }
}

export const key = () => sessionStorage.getItem(STORED_KEY);
export const forgetKey = () => sessionStorage.removeItem(STORED_KEY);

let askForKey = async () => null;
let asking = null;

/** `ask(message)` is called on a 401 and resolves to a key, or to null when the person gives none. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

/** Calls the API and gives its JSON. Asks for a key on 401, once for all calls in flight, and tries again. */
export async function call(method, path, { json, form, signal } = {}) {
  for (;;) {
    const used = key();
    const response = await send(method, path, { json, form, signal, used });
    if (response.ok) return readJson(response);
    const error = await readError(response);
    if (response.status !== 401) throw error;
    if (key() === used) {
      asking ??= askForKey(error.message).finally(() => (asking = null));
      const given = await asking;
      signal?.throwIfAborted();
      if (!given) throw error;
      sessionStorage.setItem(STORED_KEY, given);
    }
  }
}

async function send(method, path, { json, form, signal, used }) {
  const headers = used ? { Authorization: `Bearer ${used}` } : {};
  if (json !== undefined) headers["Content-Type"] = "application/json";
  try {
    return await fetch(path, { method, headers, signal, body: json === undefined ? form : JSON.stringify(json) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server does not answer. Is “embedserve serve” still running?", 0);
  }
}

async function readJson(response) {
  try {
    return await response.json();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The answer is not EmbedServe's. Is another program, or a proxy, listening here?", response.status);
  }
}

async function readError(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The server answered ${response.status} ${response.statusText}.`;
  return new ApiError(message, response.status, { body, retryAfter: Number(response.headers.get("Retry-After")) || 0 });
}

const seen = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (!isIntersecting) continue;
    seen.unobserve(target);
    fetchInto(target, target.dataset.url);
  }
}, { rootMargin: "400px" });

/** Shows `url` in `img`. An <img> cannot send a key, so with one the bytes are fetched and shown as a blob. */
export function showImage(img, url) {
  img.addEventListener("error", () => img.classList.add("broken"), { once: true });
  if (!key()) {
    img.loading = "lazy";
    img.src = url;
    return;
  }
  img.dataset.url = url;
  seen.observe(img);
}

async function fetchInto(img, url) {
  const blob = await fetchBlob(url).catch(() => null);
  if (!blob) return img.classList.add("broken");
  img.addEventListener("load", () => URL.revokeObjectURL(img.src), { once: true });
  img.src = URL.createObjectURL(blob);
}

export async function fetchBlob(url, form) {
  const response = await send(form ? "POST" : "GET", url, { form, used: key() });
  if (!response.ok) throw await readError(response);
  return response.blob();
}

// The same call for a shell ---------------------------------------------------------------------------------

/** Stands for the image's base64 in a call's JSON; a word that nobody types. */
export const IMAGE = `image-${Array.from(crypto.getRandomValues(new Uint32Array(4))).join("-")}`;

const quote = (word) => (/^[\w/:.,@%+=-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\\''")}'`);

// curl reads ; and , in a file name as its own syntax unless the name is in double quotes.
const formFile = (name) => (/[;,"\\]/.test(name) ? `"${name.replace(/["\\]/g, "\\$&")}"` : name);

/**
 * The call as a line for sh. The key is never shown: it comes from $EMBEDSERVE_API_KEY.
 * @param {{json?: object, fields?: [string, string][], files?: [string, string][], image?: string}} body
 *   `fields` and `files` (name, file name) become a form; in `json` the string IMAGE stands for `image`'s bytes.
 */
export function curl(method, path, { json, fields = [], files = [], image } = {}) {
  const words = ["curl"];
  if (!["GET", "POST"].includes(method)) words.push("-X", method);
  words.push(quote(location.origin + path));
  if (key()) words.push("-H", '"Authorization: Bearer $EMBEDSERVE_API_KEY"');
  for (const [name, file] of files) words.push("-F", quote(`${name}=@${formFile(file)}`));
  // --form-string: a value that begins with @ or < stays a value.
  for (const [name, value] of fields) words.push("--form-string", quote(`${name}=${value}`));
  if (json === undefined) return words.join(" ");
  words.push("-H", "'Content-Type: application/json'");
  const text = JSON.stringify(json);
  if (!image) return [...words, "-d", quote(text)].join(" ");
  const format = text.replaceAll("\\", "\\\\").replaceAll("%", "%%").replace(`"${IMAGE}"`, '"%s"');
  return `printf ${quote(format)} "$(base64 < ${quote(image)} | tr -d '\\n')" | ${words.join(" ")} -d @-`;
}

