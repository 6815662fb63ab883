// Decisions
function decide(changes, undoable = true) {
  if (undoable) done.push(changes.map(([index]) => [index, decisions.get(index)]));
  for (const [index, decision] of changes) {
    if (decision === undefined) decisions.delete(index); else decisions.set(index, decision);
  }
  store();
  if (byId("decision").value) filter(); else draw();
  count();
}

function decideCurrent(decision) {
  const entry = shown[current];
  if (!entry) return;
  decide([[entry.index, decision]]);
  goTo(shown[current] === entry ? current + 1 : current);  // a filter may have taken it away
}

function undo() {
  const changes = done.pop();
  if (!changes) return;
  decide(changes, false);
  const position = shown.findIndex((entry) => entry.index === changes[0][0]);
  if (position >= 0) goTo(position);
}

function count() {
  const number = { wrong: 0, fine: 0, other: 0, skip: 0, "": 0 };
  for (const { index } of entries) number[kindOf(decisions.get(index))] += 1;
  byId("count").replaceChildren(
    element("b", "", `${shown.length} of ${entries.length}`),
    `, ${number.wrong} wrong, ${number.fine} fine, ${number.other} other class, `
    + `${number.skip} skipped, ${number[""]} undecided`,
  );
  byId("export").disabled = number[""] === entries.length;
  byId("undo").disabled = !done.length;
}

// Another class
function openChooser() {
  if (!shown[current]) return;
  byId("wanted").value = "";
  listClasses();
  byId("chooser").showModal();
}

function listClasses() {
  const text = byId("wanted").value.trim().toLowerCase();
  const known = Object.keys(names).filter((k) => names[k].toLowerCase().includes(text));
  known.sort((a, b) => names[a].length - names[b].length || names[a].localeCompare(names[b]));
  const options = known.map((k) => new Option(names[k], k));
  byId("classes").replaceChildren(...options, new Option("none of the classes", NONE));
  byId("classes").selectedIndex = text ? 0 : -1;  // Enter alone chooses nothing
  if (!known.length) byId("classes").selectedIndex = -1;
}

function choose() {
  if (!byId("classes").value) return;
  const { label, proposed } = shown[current];
  const chosen = Number(byId("classes").value);
  byId("chooser").close();
  decideCurrent({ [label]: "fine", [proposed]: "wrong" }[chosen] || chosen);
}

function pressInChooser(event) {
  const classes = byId("classes");
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Enter") choose();
  if (step && event.target !== classes) {
    const position = classes.selectedIndex + step;
    classes.selectedIndex = Math.max(0, Math.min(position, classes.length - 1));
  }
  if (event.key === "Enter" || (step && event.target !== classes)) event.preventDefault();
}

// Keyboard
const actions = {
  w: () => decideCurrent("wrong"), f: () => decideCurrent("fine"), o: openChooser,
  s: () => decideCurrent("skip"), u: undo,
  arrowright: () => goTo(current + 1), arrowleft: () => goTo(current - 1),
  arrowdown: () => goTo(current + columns), arrowup: () => goTo(current - columns),
  home: () => goTo(0), end: () => goTo(shown.length - 1),
};

function press(event) {
  if (event.altKey || byId("chooser").open) return;
  if (event.target.matches("select, input")) return;
  const command = event.ctrlKey || event.metaKey;
  const name = event.key.toLowerCase();
  const action = command ? (name === "z" && undo) : actions[name];
  if (!action) return;
  event.preventDefault();
  action();
}

// Filters and order
function filter() {
  const [given, proposed] = [byId("given").value, byId("proposed").value];
  const [least, text] = [Number(byId("score").value), byId("text").value.trim().toLowerCase()];
  const wanted = byId("decision").value.replace("open", "");
  const any = !byId("decision").value;
  byId("least").value = least.toFixed(3);
  byId("pair").value = given && proposed ? `${given},${proposed}` : "";
  shown = sorted.filter((entry) => (!given || String(entry.label) === given)
    && (!proposed || String(entry.proposed) === proposed)
    && entry.score >= least && entry.searched.includes(text)
    && (any || kindOf(decisions.get(entry.index)) === wanted));
  current = Math.min(current, Math.max(0, shown.length - 1));
  draw();
}

function filterAnew(event) {
  if (event.target.id === "pair") {
    [byId("given").value, byId("proposed").value] = event.target.value.split(",").concat("");
  }
  current = 0;
  filter();
  goTo(0, false);
  count();
}

function order() {
  const compare = {
    score: (a, b) => a.rank - b.rank,
    row: (a, b) => a.index - b.index,
    given: (a, b) => collator.compare(a.given, b.given) || a.rank - b.rank,
    proposed: (a, b) => collator.compare(a.better, b.better) || a.rank - b.rank,
  }[byId("order").value];
  sorted = [...entries].sort(compare);
}

function counted(value) {
  const counts = new Map();
  for (const entry of entries) counts.set(value(entry), (counts.get(value(entry)) || 0) + 1);
  return counts;
}

function fillOptions(id, column) {
  const counts = counted((entry) => entry[column]);
  const labels = [...counts.keys()].sort((a, b) => collator.compare(names[a], names[b]));
  const options = labels.map((k) => new Option(`${names[k]} (${counts.get(k)})`, k));
  byId(id).append(new Option("all classes", ""), ...options);
}

function fillPairs() {
  const counts = counted((entry) => `${entry.label},${entry.proposed}`);
  const pairs = [...counts].sort((a, b) => b[1] - a[1]).slice(0, PAIRS);
  const options = pairs.map(([pair, number]) => {
    const [given, proposed] = pair.split(",");
    return new Option(`${names[given]} \u2192 ${names[proposed]} (${number})`, pair);
  });
  byId("pair").append(new Option("all pairs, most frequent first", ""), ...options);
}

// Files
const HEAD = ["index", "label", "proposed", "decision", "new_label", "data", "file"];

function newLabel(entry) {
  const decision = decisions.get(entry.index);
  if (typeof decision === "number") return decision === NONE ? "" : decision;
  return { wrong: entry.proposed, fine: entry.label }[decision] ?? "";
}

function save() {
  const lines = sorted.filter((entry) => decisions.has(entry.index)).map((entry) => [
    entry.index, entry.label, entry.proposed, kindOf(decisions.get(entry.index)),
    newLabel(entry), data, `"${entry.file.replaceAll('"', '""').replace(/\s+/g, " ")}"`,
  ].join());
  const link = document.createElement("a");
  const text = [HEAD.join(), ...lines, ""].join("\n");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "decisions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function load(text) {
  const [head, ...lines] = text.trim().split(/\r?\n/).map((line) => line.split(/[,;]/));
  const table = lines.map((line) => Object.fromEntries(head.map((name, k) => [name, line[k]])));
  const changes = [];
  for (const row of table) {
    const entry = byIndex.get(Number(row.index));
    const fits = entry && String(entry.label) === row.label && (row.data || data) === data;
    const chosen = row.new_label === "" ? NONE : Number(row.new_label);
    const decision = row.decision === "other" ? chosen : row.decision;
    const known = ["wrong", "fine", "skip", "other"].includes(row.decision);
    if (fits && known && !Number.isNaN(chosen)) changes.push([entry.index, decision]);
  }
  if (changes.length) decide(changes);
  const left = table.length - changes.length;
  const why = left ? `; ${left} others are not of this page` : "";
  byId("count").append(`. Loaded ${changes.length} decisions${why}`);
}

byId("load").addEventListener("click", () => byId("file").click());
byId("file").addEventListener("change", async ({ target }) => {
  if (target.files.length) load(await target.files[0].text());
  target.value = "";
});
byId("export").addEventListener("click", save);
for (const kind of ["wrong", "fine", "skip"]) {
  byId(kind).addEventListener("click", () => decideCurrent(kind));
}
byId("other").addEventListener("click", openChooser);
byId("undo").addEventListener("click", undo);
byId("wanted").addEventListener("input", listClasses);
byId("chooser").addEventListener("keydown", pressInChooser);
byId("classes").addEventListener("dblclick", choose);
byId("choose").addEventListener("click", choose);
byId("cancel").addEventListener("click", () => byId("chooser").close());
document.addEventListener("keydown", press);
for (const event of ["input", "change"]) byId("filters").addEventListener(event, filterAnew);
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("order").addEventListener("change", order);
byId("box").addEventListener("toggle", draw);
addEventListener("scroll", () => requestAnimationFrame(draw), { passive: true });
new ResizeObserver(redraw).observe(document.querySelector("main"));

let [lowest, highest] = [1, 0];
let longest = 0;
for (const { score, given, better } of entries) {
  lowest = Math.min(lowest, score);
  highest = Math.max(highest, score);
  longest = Math.max(longest, given.length, better.length);
}
document.documentElement.classList.toggle("long", longest > 16);
Object.assign(byId("score"), { min: lowest, max: Math.max(lowest, highest), value: lowest });
byId("box").open = !matchMedia("(max-width: 30rem)").matches;
fillOptions("given", "label");
fillOptions("proposed", "proposed");
fillPairs();
order();
filter();
redraw();
count();
