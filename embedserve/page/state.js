// What is on screen, kept in the address: #/search?in=photos&text=red+fruit. Back, forward and links just work.
// An image file cannot be in an address: it stays in memory and the history entry holds its number.

const DEFAULTS = {
  view: "search",
  in: "", // the collection
  text: "",
  like: "", // the id of an item to search by
  image: "", // an http(s) address
  less: "",
  filter: "",
  k: 24,
  diversity: 0,
  mix: 0.5, // the text's share where text meets an image
  labels: "",
  templates: "",
  set: "", // a saved label set, in place of labels
};

export let state = { ...DEFAULTS, file: null };

const files = []; // File objects of this visit, by number

/** Reads the state from the address and the history entry. */
export function readState() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?", 2);
  const found = new URLSearchParams(query);
  const next = { ...DEFAULTS, view: path === "classify" ? "classify" : "search" };
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    const text = found.get(name);
    if (name === "view" || text === null) continue;
    if (typeof standard === "string") next[name] = text;
    else if (Number.isFinite(Number(text))) next[name] = Number(text);
  }
  next.k = clamp(Math.round(next.k), 1, 1000);
  next.diversity = clamp(next.diversity, 0, 1);
  next.mix = clamp(next.mix, 0.1, 0.9);
  const number = history.state?.file ?? null;
  next.file = number === null ? null : (files[number] ?? null);
  next.lostFile = number !== null && !next.file; // after a reload the file is gone
  state = next;
  return state;
}

const clamp = (number, least, most) => Math.min(most, Math.max(least, number));

export function address(wanted) {
  const query = new URLSearchParams();
  for (const [name, standard] of Object.entries(DEFAULTS)) {
    if (name !== "view" && wanted[name] !== standard) query.set(name, wanted[name]);
  }
  const text = query.toString();
  return `#/${wanted.view}${text && `?${text}`}`;
}

/**
 * Goes to the state with `changes`. While someone is `typing`, each state replaces the `draft` before it, so that
 * Back goes to the last finished search and not to its prefixes.
 */
export function go(changes, { typing = false, draft = false, replace = false } = {}) {
  const next = { ...state, ...changes };
  if (next.file && !files.includes(next.file)) files.push(next.file);
  const entry = { file: next.file ? files.indexOf(next.file) : null, draft };
  const target = address(next);
  const same = target === (location.hash || "#/search") && entry.file === (history.state?.file ?? null);
  if (same || replace || (typing && history.state?.draft)) {
    history.replaceState({ ...history.state, ...entry }, "", target);
  } else {
    history.replaceState({ ...history.state, scroll: scrollY }, "");
    history.pushState(entry, "", target);
  }
  state = { ...next, lostFile: false };
}
