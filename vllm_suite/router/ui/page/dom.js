// Elements and figures. Text only ever goes in as text: names of instances and models come from outside.

export const $ = (id) => document.getElementById(id);

/** An element with attributes and children; strings become text nodes. */
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

/** Set text only where it changed: a screen reader is told of changes, and nothing is laid out again for none. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** Children of `parent` in the order of `items`, each kept under its key from one look to the next. */
export function keyed(parent, items, keyOf, make, update) {
  const old = new Map([...parent.children].map((child) => [child.dataset.k, child]));
  items.forEach((item, index) => {
    const key = keyOf(item);
    let node = old.get(key);
    if (node) old.delete(key);
    else {
      node = make(item);
      node.dataset.k = key;
    }
    update(node, item);
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
  for (const node of old.values()) node.remove();
}

/** A table from rows of cells; a cell is text, a node, or {text, class}. Columns: {name} and what they hold: n: numbers,
 *  t: what must not be broken, id: names from outside, wide: what a narrow window leaves out. */
export function table(caption, columns, rows) {
  const kind = (column, cell) => [column.n ? "n" : "", column.id ? "id" : "", column.t ? "t" : "", column.wide ? "wide" : "", cell?.class ?? ""].join(" ").trim() || null;
  const head = el("tr", {}, ...columns.map((column) => el("th", { scope: "col", class: kind(column) }, column.name)));
  const body = rows.map((row) =>
    el("tr", {}, ...row.map((cell, index) => {
      const inside = cell?.text ?? cell;
      const name = index === 0 ? "th" : "td";
      return el(name, { class: kind(columns[index], cell), scope: index === 0 ? "row" : null }, inside);
    })));
  return el("table", {}, caption ? el("caption", {}, caption) : null, el("thead", {}, head), el("tbody", {}, ...body));
}

/** Replace what a node holds only where it looks different: focus and scrolling stay as they are. */
export function put(node, ...children) {
  const made = el(node.tagName, {}, ...children);
  if (made.innerHTML !== node.innerHTML) node.replaceChildren(...made.childNodes);
}

export const NONE = "–";

export function number(value, digits = 1) {
  if (value === null || value === undefined) return NONE;
  return value.toLocaleString("en", { minimumFractionDigits: 0, maximumFractionDigits: value >= 100 ? 0 : digits });
}

export function ms(value) {
  if (value === null || value === undefined) return NONE;
  if (value >= 10000) return `${number(value / 1000, 1)} s`;
  if (value >= 1000) return `${number(value / 1000, 2)} s`;
  return `${number(value, value < 10 ? 1 : 0)} ms`;
}

export function bytes(value) {
  if (value === null || value === undefined) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let index = 0;
  while (value >= 1000 && index < units.length - 1) {
    value /= 1000;
    index += 1;
  }
  return `${number(value, index ? 1 : 0)} ${units[index]}`;
}

export const rate = (value) => (value === null ? NONE : `${bytes(value)}/s`);
export const share = (value) => (value === null || value === undefined ? NONE : `${number(100 * value, value > 0.99 && value < 1 ? 2 : 1)} %`);
export const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString("en-GB");
export const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
