"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const nTokens = data.texts.length, nLayers = data.kept.length;
const style = getComputedStyle(document.documentElement);
const colour = (name) => style.getPropertyValue(name).trim();
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const bits = data.kept.map((layer) => layer.map(bytesOf));
const keeps = (layer, head, token) => (bits[layer][head][token >> 3] >> (7 - (token & 7))) & 1;
const percent = (x) => `${+(100 * x).toPrecision(3)} %`;
const binary = (n) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; n >= 1024 && i < 4; i++) n /= 1024;
  return `${+n.toPrecision(4)} ${units[i]}`;
};
const element = (parent, tag, text = "", className = "") => {
  const made = parent.appendChild(document.createElement(tag));
  if (text !== "") made.textContent = text;
  if (className) made.className = className;
  return made;
};

// How many heads of each layer keep each token.
const counts = bits.map((layer, l) => {
  const sum = new Uint16Array(nTokens);
  layer.forEach((_, h) => { for (let t = 0; t < nTokens; t++) sum[t] += keeps(l, h, t); });
  return sum;
});
const marked = new Uint8Array(nTokens);
const MARK = 1, FIRST = 2, LAST = 4;
for (const [start, stop] of data.marks) {
  for (let t = start; t < stop; t++) marked[t] |= MARK;
  marked[start] |= FIRST;
  marked[stop - 1] |= LAST;
}
const markClass = (flags) => (flags & MARK ? " mark" : "") + (flags & FIRST ? " first" : "") + (flags & LAST ? " last" : "");

// --- the prompt's text

const spans = data.texts.map((text, t) => {
  const span = document.createElement("span");
  span.textContent = text;
  span.dataset.t = t;
  return span;
});
$("tokens").append(...spans);

const addOptions = (select, values) => values.forEach((v) => (element(select, "option", v).value = v));
addOptions($("layer"), counts.map((_, i) => i));
addOptions($("head"), Array.from({length: Math.max(...bits.map((l) => l.length))}, (_, i) => i));

/** The (layer, head) pairs that the two boxes choose. */
function chosenHeads() {
  const [layer, head] = [$("layer").value, $("head").value];
  const pairs = [];
  bits.forEach((heads, l) => {
    if (layer !== "" && +layer !== l) return;
    heads.forEach((_, h) => { if (head === "" || +head === h) pairs.push([l, h]); });
  });
  return pairs;
}

let shown = new Uint16Array(nTokens), shownHeads = 0;

function colourText() {
  const pairs = chosenHeads();
  shown = new Uint16Array(nTokens);
  shownHeads = pairs.length;
  for (const [l, h] of pairs) for (let t = 0; t < nTokens; t++) shown[t] += keeps(l, h, t);
  let none = 0;
  for (let t = 0; t < nTokens; t++) {
    const level = shown[t] && Math.max(1, Math.floor((8 * shown[t]) / shownHeads));
    none += shown[t] === 0;
    spans[t].className = `k${level}${markClass(marked[t])}`;
  }
  const heads = shownHeads === 1 ? "this head" : `these ${shownHeads} heads`;
  $("chosen").textContent = shownHeads ? `${(nTokens - none).toLocaleString("en")} of ${nTokens.toLocaleString("en")} tokens kept by any of ${heads}` : "no such head";
}
$("layer").onchange = $("head").onchange = colourText;

function goTo(token) {
  const box = $("tokens"), span = spans[Math.min(nTokens - 1, Math.max(0, token))];
  box.scrollTop += span.getBoundingClientRect().top - box.getBoundingClientRect().top - box.clientHeight / 3;
}

const windows = data.windows.flatMap((w, i) => (w === null ? [] : [i]));
if (windows.length) $("under-text").textContent = `Layers ${windows.join(", ")} have a sliding window: the model itself never sees further back there.`;

// --- hovering

function tip(event, text) {
  const box = $("tip");
  box.hidden = !text;
  if (!text) return;
  box.textContent = text;
  const left = Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8);
  const below = event.clientY + 18 + box.offsetHeight < innerHeight;
  box.style.left = `${Math.max(8, left)}px`;
  box.style.top = `${below ? event.clientY + 18 : event.clientY - box.offsetHeight - 10}px`;
}

function tokenTip(t) {
  const layers = counts.flatMap((of, l) => of[t] ? [`${l} (${of[t]} of ${bits[l].length})`] : []);
  const whole = counts.every((of, l) => of[t] === bits[l].length);
  const where = whole ? "in every layer" : layers.length ? `layers ${layers.join(", ")}` : "in no layer";
  return `token ${t} ${JSON.stringify(data.texts[t])}\nkept by ${shown[t]} of the ${shownHeads} chosen heads\n${where}`;
}
$("tokens").onmousemove = (event) => tip(event, event.target.dataset.t && tokenTip(+event.target.dataset.t));
$("tokens").onmouseleave = (event) => tip(event, "");

// --- maps: canvases of cells

/** Draw a map of columns by rows; value(row, column) in 0..1. The cells fill the canvas's width. */
function map(canvas, columns, rows, rowHeight, value, labels, over) {
  const width = canvas.clientWidth, gutter = labels ? 44 : 0, ratio = devicePixelRatio || 1;
  const cell = (width - gutter) / columns, height = rows * rowHeight;
  canvas.style.height = `${height + 2}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const pen = canvas.getContext("2d"), snap = (x) => Math.round(x * ratio) / ratio; // no seams
  pen.scale(ratio, ratio);
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  const every = Math.ceil(13 / rowHeight);
  for (let r = 0; r < rows; r++) {
    pen.fillStyle = colour("--keep");
    for (let c = 0; c < columns; c++) {
      const share = value(r, c);
      if (!share) continue;
      pen.globalAlpha = Math.max(0.09, 0.68 * share); // as the colours of the legend
      const [left, right] = [snap(gutter + c * cell), snap(gutter + (c + 1) * cell)];
      pen.fillRect(left, r * rowHeight, right - left - (cell > 4 ? 0.5 : 0), rowHeight - (rowHeight > 4 ? 1 : 0));
    }
    pen.globalAlpha = 1;
    if (labels && r % every === 0) {
      pen.fillStyle = colour("--muted");
      pen.fillText(labels(r), 3, r * rowHeight + rowHeight / 2);
    }
  }
  if (over) over(pen, gutter, cell, height);
  return (event) => {
    const box = canvas.getBoundingClientRect();
    const c = Math.floor((event.clientX - box.left - gutter) / cell), r = Math.floor((event.clientY - box.top) / rowHeight);
    return c >= 0 && c < columns && r >= 0 && r < rows ? [r, c] : null;
  };
}

/** Have a map say in a tooltip what lies under the pointer. */
function hover(canvas, at, text) {
  canvas.onmousemove = (event) => { const cell = at(event); tip(event, cell ? text(...cell) : ""); };
  canvas.onmouseleave = (event) => tip(event, "");
}

function markLines(pen, gutter, perUnit, height, ranges) {
  pen.fillStyle = colour("--mark");
  for (const [start, stop] of ranges) {
    const left = gutter + start * perUnit, width = Math.max(3, (stop - start) * perUnit);
    pen.globalAlpha = width > 6 ? 0.35 : 0.8;
    pen.fillRect(left, 0, width, height);
    pen.globalAlpha = 1;
    pen.fillRect(left, 0, width, 3);
    pen.fillRect(left, height - 3, width, 3);
  }
}

const rowHeightFor = (rows) => (rows <= 12 ? 16 : rows <= 40 ? 9 : 5);

function drawOverview() {
  const columns = Math.min(nTokens, 800), per = nTokens / columns;
  const range = (c) => [Math.floor(c * per), Math.max(Math.floor(c * per) + 1, Math.floor((c + 1) * per))];
  const value = (l, c) => {
    const [from, to] = range(c);
    let sum = 0;
    for (let t = from; t < to; t++) sum += counts[l][t];
    return sum / ((to - from) * bits[l].length);
  };
  const at = map($("overview"), columns, nLayers, rowHeightFor(nLayers), value, (l) => `L ${l}`,
    (pen, gutter, cell, height) => markLines(pen, gutter, cell / per, height, data.marks));
  hover($("overview"), at, (l, c) => `layer ${l}, tokens ${range(c)[0]}–${range(c)[1] - 1}\n${percent(value(l, c))} kept`);
  $("overview").onclick = (event) => { const cell = at(event); if (cell) goTo(range(cell[1])[0]); };
}

// --- which heads keep what is highlighted

document.querySelectorAll("[data-place]").forEach((box) => {
  const [start, stop] = data.marks[+box.dataset.place];
  box.style.gridTemplateRows = `repeat(${Math.max(...bits.map((l) => l.length))}, auto)`;
  bits.forEach((heads, l) => heads.forEach((_, h) => {
    let kept = 0;
    for (let t = start; t < stop; t++) kept += keeps(l, h, t);
    const cell = element(box, "i");
    cell.style.setProperty("--share", kept / (stop - start));
    cell.style.gridArea = `${h + 1} / ${l + 1}`;
    cell.title = `layer ${l}, KV head ${h}: ${kept} of ${stop - start} tokens kept`;
  }));
});

// --- layer by head

function drawHeads() {
  const table = $("heads"), head = element(element(table, "thead"), "tr"), body = element(table, "tbody");
  const longest = Math.max(...data.held.flat(), 1);
  element(head, "th", "layer \\ KV head");
  for (let h = 0; h < Math.max(...bits.map((l) => l.length)); h++) element(head, "th", h);
  data.held.forEach((heads, l) => {
    const row = element(body, "tr");
    element(row, "th", data.windows[l] === null ? l : `${l} (window ${data.windows[l]})`);
    heads.forEach((held, h) => {
      const button = element(element(row, "td"), "button", held.toLocaleString("en"));
      button.style.setProperty("--share", held / longest);
      if (data.budgets) element(button, "small", data.budgets[l][h].toLocaleString("en"));
      button.title = `layer ${l}, KV head ${h}: ${held} tokens held`;
      button.onclick = () => {
        [$("layer").value, $("head").value] = [l, h];
        colourText();
        $("text").scrollIntoView({behavior: "smooth"});
      };
    });
  });
}

// --- bars

function bars(box, rows) {
  rows.forEach(({parts, line, value}, l) => {
    element(box, "span", `layer ${l}`);
    const bar = element(box, "div", "", "bar");
    for (const [width, background, title] of parts) {
      const piece = element(bar, "i");
      piece.style.width = `${100 * width}%`;
      piece.style.background = background;
      piece.title = title;
    }
    if (line !== undefined) element(bar, "u").style.left = `calc(${100 * line}% - 2px)`;
    element(box, "span", value, "value");
  });
}

const FORMATS = {
  live: ["var(--keep)", "exact, on the device"],
  codec: ["#8a6fc0", "encoded"],
  share: ["#c98f2b", "shared by two layers"],
  host: ["#7d8fa3", "exact, in host memory"],
  rest: ["#b3566b", "one token for what was dropped"],
};

function drawBytes() {
  const names = [...new Set(data.bytes.flatMap(Object.keys))];
  const [fill, label] = [(name) => (FORMATS[name] || ["var(--muted)"])[0], (name) => (FORMATS[name] || ["", name])[1]];
  for (const name of names) {
    element($("formats"), "i", "", "swatch").style.background = fill(name);
    $("formats").append(label(name));
  }
  const totals = data.bytes.map((of) => Object.values(of).reduce((a, b) => a + b, 0));
  const most = Math.max(...totals, ...data.denseBytes, 1);
  bars($("bytes"), data.bytes.map((of, l) => ({
    parts: Object.entries(of).map(([name, n]) => [n / most, fill(name), `${label(name)}: ${binary(n)}`]),
    line: data.denseBytes[l] / most,
    value: `${binary(totals[l])}, ${percent(totals[l] / data.denseBytes[l])} of dense`,
  })));
}

function drawDensity() {
  bars($("density"), data.density.map((d) => ({parts: [[Math.min(d, 1), "var(--keep)", percent(d)]], value: percent(d)})));
}

// --- reads

function drawReads() {
  if (!data.steps.length) return;
  const shareOf = (l, s) => Math.min(1, data.tokensRead[s][l] / data.tokensDense[s][l]);
  const at = map($("reads"), data.steps.length, nLayers, rowHeightFor(nLayers), shareOf, (l) => `L ${l}`);
  hover($("reads"), at, (l, s) => `layer ${l}, step ${data.steps[s]}\n${data.tokensRead[s][l].toLocaleString("en")} tokens per head read, ${percent(shareOf(l, s))} of ${data.tokensDense[s][l].toLocaleString("en")}`);
}

/** Pages of a layer that hold highlighted tokens in any head: the n-th kept token lies in page n / size. */
function markedPages(layer) {
  const pages = new Set();
  bits[layer].forEach((_, h) => {
    for (let t = 0, n = 0; t < nTokens; t++) {
      if (!keeps(layer, h, t)) continue;
      if (marked[t]) pages.add(Math.floor(n / data.pageSize));
      n++;
    }
  });
  return [...pages].map((p) => [p, p + 1]);
}

function drawPages() {
  const layers = Object.keys(data.pages);
  if (!layers.length) return;
  $("pages-read").hidden = false;
  if (!$("page-layer").options.length) addOptions($("page-layer"), layers);
  const layer = +$("page-layer").value, {width, counts: text} = data.pages[layer];
  const read = bytesOf(text), heads = bits[layer].length, nSteps = data.steps.length;
  const value = (s, p) => read[s * width + p] / heads;
  const height = Math.max(2, Math.min(14, 360 / nSteps));
  const at = map($("pages"), width, nSteps, height, value, (s) => data.steps[s],
    (pen, gutter, cell, tall) => markLines(pen, gutter, cell, tall, markedPages(layer)));
  hover($("pages"), at, (s, p) => `step ${data.steps[s]}, page ${p}\nread by ${read[s * width + p]} of ${heads} heads`);
  const mean = read.reduce((a, b) => a + b, 0) / (heads * nSteps);
  $("page-chosen").textContent = `${+mean.toPrecision(3)} of ${width} pages per head and step`;
}
if ($("page-layer")) $("page-layer").onchange = drawPages;

function drawMaps() {
  drawOverview();
  drawReads();
  drawPages();
}

colourText();
drawHeads();
drawBytes();
drawDensity();
drawMaps();
if (data.marks.length) goTo(data.marks[0][0]);
document.querySelectorAll("[data-token]").forEach((link) => {
  link.onclick = () => setTimeout(() => goTo(+link.dataset.token));
});
addEventListener("resize", drawMaps);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMaps);
