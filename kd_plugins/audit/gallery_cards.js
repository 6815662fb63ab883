"use strict";
const byId = (id) => document.getElementById(id);
const { key, data, names, rows, files, pictures, small } = JSON.parse(byId("data").textContent);
const NONE = -1;  // chosen as the other class: the picture belongs to no class
const PAIRS = 300;  // listed in the filter
const SPARE = 3;  // rows of cards drawn above and below the window
const list = byId("cards");
const collator = new Intl.Collator();

// A decision is "wrong", "fine", "skip", or the number of another class.
const decisions = new Map();  // row in the data set -> decision
const done = [];  // for undo: lists of [row, decision before]
const entries = rows.map(([index, label, proposed, score, pLabel, pProposed, near], rank) => {
  const [given, better, file] = [names[label], names[proposed], files[rank] || ""];
  const searched = `${given}\n${better}\n${index}\n${file}`.toLowerCase();
  return {
    rank, index, label, proposed, score, pLabel, pProposed, near, given, better, file, searched,
  };
});
const byIndex = new Map(entries.map((entry) => [entry.index, entry]));
let sorted = entries;
let shown = entries;  // those that the filters leave
let current = 0;  // position in `shown`
const drawn = new Map();  // row -> its card, while it is in the document

// A browser may forbid storage for local files. Decisions then last until the page is closed.
try {
  const stored = JSON.parse(localStorage.getItem(key) || "{}");
  for (const [index, decision] of Object.entries(stored)) decisions.set(Number(index), decision);
} catch { /* no storage */ }

function store() {
  try {
    localStorage.setItem(key, JSON.stringify(Object.fromEntries(decisions)));
  } catch { /* no storage */ }
}

const kindOf = (decision) => (typeof decision === "number" ? "other" : decision || "");
const classOf = (k) => (k === NONE ? "no class" : names[k]);

// Cards. The page writes everything that comes from the data as text, never as HTML.
function element(tag, className, text = "") {
  const created = document.createElement(tag);
  created.className = className;
  created.textContent = text;
  return created;
}

// A long class name may break after _ - and /
function nameOf(kind, text) {
  const created = element("span", kind);
  text.split(/(?<=[_/-])/).forEach((part, i) => {
    if (i) created.append(document.createElement("wbr"));
    created.append(part);
  });
  return created;
}

function pictureOf(encoded, className, note) {
  const picture = element("span", className, encoded ? "" : note);
  if (encoded) {
    const image = element("img", "");
    const src = `data:image/webp;base64,${encoded}`;
    Object.assign(image, { alt: "", decoding: "async", loading: "lazy", src });
    picture.append(image);
  }
  return picture;
}

function neighboursOf(entry) {
  const strip = element("span", "neighbours");
  for (const row of entry.near || []) {
    const suspect = byIndex.get(row);  // its picture is on the page already
    const [label, encoded] = suspect ? [suspect.label, pictures[suspect.rank]] : small[row];
    const picture = pictureOf(encoded, "small", "?");
    picture.title = `neighbour: row ${row}, ${names[label]}`;
    strip.append(picture);
  }
  return strip;
}

// Of a path that is too long, the end is shown.
function fileOf(file) {
  const created = element("span", "file");
  created.append(element("bdi", "", file));
  return created;
}

function cardOf(entry) {
  const [item, button] = [element("li", ""), element("button", "card")];
  const [meta, text] = [element("span", "meta"), element("span", "names")];
  meta.append(element("span", "score", entry.score.toFixed(3)));
  meta.append(element("span", "row", `row ${entry.index}`));
  const { given, better, file, pLabel, pProposed } = entry;
  button.type = "button";
  button.title = `${given}: ${pLabel?.toFixed(3)}\n${better}: ${pProposed?.toFixed(3) ?? "?"}`
    + (file && `\n${file}`);
  text.append(nameOf("given", given), nameOf("proposed", better));
  button.append(pictureOf(pictures[entry.rank], "picture", "no picture"), text);
  if (small) button.append(neighboursOf(entry));
  button.append(meta);
  if (files.some(Boolean)) button.append(fileOf(file));
  button.append(element("span", "mark"));
  item.append(button);
  item.setAttribute("aria-setsize", shown.length);
  button.addEventListener("focus", () => { current = shown.indexOf(entry); });
  button.addEventListener("click", () => {
    const next = { "": "wrong", wrong: "fine" }[decisions.get(entry.index) || ""];
    current = shown.indexOf(entry);
    decide([[entry.index, next]]);
  });
  return item;
}

function showDecision(entry, item) {
  const decision = decisions.get(entry.index);
  const [kind, button] = [kindOf(decision), item.firstChild];
  const mark = kind === "other" ? classOf(decision) : kind;
  button.className = `card ${kind}`;
  Object.assign(button.lastChild, { textContent: mark, hidden: !kind });
  button.setAttribute("aria-label", `row ${entry.index} ${entry.file}: given ${entry.given}, proposed `
    + `${entry.better}, score ${entry.score.toFixed(3)}, ${mark || "undecided"}`);
}

// Only the cards in the window are in the document. All rows of cards have one height.
let columns = 1;
let height = 1;

function measure() {
  if (!list.firstChild) return;
  columns = getComputedStyle(list).gridTemplateColumns.split(" ").length;
  const gap = parseFloat(getComputedStyle(list).rowGap);
  height = list.firstChild.getBoundingClientRect().height + gap;
}

function draw() {
  const above = window.scrollY - list.offsetTop;
  const from = Math.max(0, Math.floor(above / height) - SPARE);
  const to = Math.ceil((above + window.innerHeight) / height) + SPARE;
  const part = shown.slice(from * columns, Math.max(to, 1) * columns);
  const kept = new Set(part.map((entry) => entry.index));
  for (const [index, item] of drawn) {
    if (!kept.has(index)) {
      item.remove();
      drawn.delete(index);
    }
  }
  list.style.height = `${Math.ceil(shown.length / columns) * height}px`;
  list.style.paddingTop = `${from * height}px`;
  part.forEach((entry, k) => {
    const item = drawn.get(entry.index) || cardOf(entry);
    drawn.set(entry.index, item);
    if (list.children[k] !== item) list.insertBefore(item, list.children[k] || null);
    const position = from * columns + k;
    item.setAttribute("aria-posinset", position + 1);
    item.firstChild.tabIndex = position === current ? 0 : -1;
    showDecision(entry, item);
  });
}

function redraw() {
  draw();
  measure();
  draw();
}

function goTo(position, focus = true) {
  current = Math.max(0, Math.min(position, shown.length - 1));
  if (!shown.length) return;
  const top = list.offsetTop + Math.floor(current / columns) * height;
  const [header, footer] = ["header", "footer"].map((tag) => document.querySelector(tag));
  const sticky = getComputedStyle(header).position === "sticky" ? header.offsetHeight : 0;
  const [low, high] = [window.scrollY + sticky, window.scrollY + window.innerHeight];
  if (top < low) window.scrollTo(0, top - sticky - 8);
  if (top + height > high - footer.offsetHeight) {
    window.scrollTo(0, top + height + footer.offsetHeight - window.innerHeight + 8);
  }
  draw();
  if (focus) drawn.get(shown[current].index)?.firstChild.focus({ preventScroll: true });
}
