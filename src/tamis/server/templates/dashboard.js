"use strict";
const $ = (id) => document.getElementById(id);
const EVERY_MS = 1000, KEPT = 120, COLOURS = 6;
const KEY = "tamis-api-key";

const binary = (n) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let i = 0;
  for (; n >= 1024 && i < 4; i++) n /= 1024;
  return `${+n.toPrecision(3)} ${units[i]}`;
};
const seconds = (s) => s === null ? "–" : s < 1 ? `${+(1000 * s).toPrecision(3)} ms` : `${+s.toPrecision(3)} s`;
const percent = (x) => `${+(100 * x).toPrecision(3)} %`;
const count = (n) => n.toLocaleString("en");
const text = (id, value) => { if ($(id).textContent !== value) $(id).textContent = value; };
const element = (parent, tag, value = "", className = "") => {
  const made = parent.appendChild(document.createElement(tag));
  if (value !== "") made.textContent = value;
  if (className) made.className = className;
  return made;
};

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? {Authorization: `Bearer ${key}`} : {};
}

function say(status, className = "") {
  text("status", status);
  $("status").className = className;
}

// --- page formats have colours, in the order in which they are first seen

const colours = new Map();

/** "64(k:float32x16,v:float32x16,position:int32x1)" in short: exact pages by their type, and what a token takes. */
function inShort({format, bytes, pages}) {
  const size = `${+(bytes / pages / parseInt(format)).toPrecision(3)} B per token`;
  const fields = format.replace(/^\d+\(|\)$/g, "").split(",").map((field) => field.split(":"));
  const exact = fields.find(([name]) => name === "k");
  return exact ? `exact, ${exact[1].replace(/x\d+$/, "")}, ${size}` : `encoded, ${size}`;
}

function colour(page) {
  const name = page.tier === "host" ? "host memory" : page.format;
  if (!colours.has(name)) {
    colours.set(name, `c${colours.size % COLOURS}`);
    const item = element($("formats"), "span");
    element(item, "i", "", colours.get(name));
    item.append(page.tier === "host" ? name : inShort(page));
    item.title = page.format;
  }
  return colours.get(name);
}

/** A bar of pages; `whole` are the bytes of its full width. */
function bar(parent, pages, whole, label) {
  const made = element(parent, "div", "", "bar");
  made.setAttribute("role", "img");
  made.setAttribute("aria-label", label);
  for (const page of pages) {
    const piece = element(made, "i", "", colour(page));
    piece.style.width = `${Math.min(100, 100 * page.bytes / Math.max(1, whole))}%`;
    piece.title = `${page.tier}, ${page.format}: ${count(page.pages)} pages, ${binary(page.bytes)}`;
  }
}

// --- the state

const past = [];

function show(state) {
  const {about, engine} = state;
  text("model", about.model);
  document.title = `${about.model} – tamis`;
  text("about", `plan ${about.plan}, context ${count(about.max_model_len)} tokens, tamis ${about.version}`);
  say(state.draining ? "draining" : "live", "live");
  $("chat-label").hidden = !about.chat;
  offer(about);
  const device = engine.tiers[0];
  past.push({at: engine.at, bytes: device.in_use, decoded: engine.totals.decode_tokens, prefilled: engine.totals.prefill_tokens});
  if (past.length > KEPT) past.shift();
  showTiles(state, device);
  showTiers(engine);
  showHistory();
  showRequests(engine.requests, engine.queue);
  showContexts(state.contexts, engine.context_bytes);
  showEnded(state.ended);
}

function offer(about) {
  if ($("plans").childElementCount) return;
  for (const plan of about.plans) element($("plans"), "option").value = plan;
  const inputs = document.querySelectorAll("article .plan");
  inputs[0].value = about.plan;
  inputs[1].value = about.plans[about.plans.length - 1];
  if (about.any_plan) inputs.forEach((input) => { input.placeholder = "any plan"; });
}

function rates(i) {
  const [before, now] = [past[i - 1], past[i]];
  if (!before || now.at <= before.at) return {decode: 0, prefill: 0};
  const s = now.at - before.at;
  return {decode: (now.decoded - before.decoded) / s, prefill: (now.prefilled - before.prefilled) / s};
}

function showTiles({engine, latencies, open_requests, about}, device) {
  const {queue, prefixes} = engine;
  text("kv", binary(device.in_use));
  text("kv-note", `${percent(device.in_use / device.capacity)} of ${binary(device.capacity)}`);
  text("running", `${count(queue.running)} running`);
  const swapped = queue.swapped ? ` · ${count(queue.swapped)} swapped` : "";
  text("queue-note", `${count(queue.waiting)} waiting${swapped} · ${count(open_requests)} of ${count(about.max_requests)} open · ${count(engine.totals.preemptions)} preempted`);
  const now = rates(past.length - 1);
  text("rate", count(Math.round(now.decode)));
  text("rate-note", `generated · ${count(Math.round(now.prefill))} of prompts`);
  for (const [id, of] of [["ttft", latencies.ttft], ["tpot", latencies.tpot]]) {
    text(id, seconds(of.p50));
    text(`${id}-note`, of.p50 === null ? "no request has ended yet" : `median of the last ${count(latencies.requests)} · 95 % within ${seconds(of.p95)}`);
  }
  if (!prefixes.enabled) {
    text("prefix", "off");
    text("prefix-note", "the prefix cache is switched off");
  } else {
    text("prefix", prefixes.looked_up_tokens ? percent(prefixes.hit_tokens / prefixes.looked_up_tokens) : "–");
    text("prefix-note", `${count(prefixes.hits)} of ${count(prefixes.lookups)} sequences found some · ${binary(prefixes.bytes)} kept`);
  }
}

function showTiers({tiers, pages}) {
  $("tiers").replaceChildren();
  for (const tier of tiers) {
    const row = element($("tiers"), "div", "", "tier");
    element(row, "span", tier.name);
    const of = pages.filter((page) => page.tier === tier.name);
    const n = of.reduce((sum, page) => sum + page.pages, 0);
    const used = `${binary(tier.in_use)} of ${binary(tier.capacity)} in ${count(n)} pages`;
    bar(row, of, tier.capacity, `${tier.name}: ${used}`);
    element(row, "span", used, "value");
  }
}

function line(id, values, most) {
  const left = 120 - values.length;
  const points = values.map((v, i) => `${left + i},${(39 - 37 * v / Math.max(most, 1e-9)).toFixed(2)}`);
  const path = values.length < 2 ? "" : `M${left},41 L${points.join(" ")} L${left + values.length - 1},41`;
  document.querySelector(`#${id} path`).setAttribute("d", path);
}

function showHistory() {
  const bytes = past.map((h) => h.bytes), decoded = past.map((_, i) => rates(i).decode);
  line("kv-line", bytes, Math.max(...bytes));
  line("rate-line", decoded, Math.max(...decoded));
  text("kv-now", `most ${binary(Math.max(...bytes))}`);
  text("rate-now", `most ${count(Math.round(Math.max(...decoded)))}`);
}

function saved(cell, held, dense, pages) {
  if (!dense) return cell.append("–");
  cell.append(percent(held / dense));
  if (pages) bar(cell, pages, Math.max(dense, held), `${binary(held)} of ${binary(dense)}`);
  const less = dense - held;
  element(cell, "small", less > 0 ? `${binary(less)} saved` : "nothing saved");
}

function showRequests(requests, queue) {
  const body = $("requests");
  body.replaceChildren();
  body.closest(".scroll").hidden = !requests.length;
  const more = queue.running + queue.waiting + queue.swapped - requests.length;
  text("requests-note", requests.length ? (more > 0 ? `The first ${requests.length}.` : "") : "None.");
  for (const r of requests) {
    const row = element(body, "tr");
    element(element(row, "td", r.id), "small", `${seconds(r.age_s)} old`);
    element(row, "td", r.plan, "plan");
    const state = element(row, "td", r.state);
    if (r.priority) element(state, "small", `priority ${r.priority}`);
    if (r.preemptions) element(state, "small", `${r.preemptions} preemptions`);
    const prompt = element(row, "td", `${count(r.prompt_done)} of ${count(r.prompt_tokens)}`, "n");
    if (r.cached_tokens) element(prompt, "small", `${count(r.cached_tokens)} found`);
    element(row, "td", count(r.output_tokens), "n");
    const pages = element(row, "td", count(r.pages.reduce((sum, page) => sum + page.pages, 0)), "n");
    element(pages, "small", binary(r.kv_bytes));
    saved(element(row, "td"), r.kv_bytes, r.kv_bytes_dense, r.pages);
  }
}

function showContexts({number, most_bytes, own}, bytes) {
  const body = $("contexts");
  body.replaceChildren();
  body.closest(".scroll").hidden = !own.length;
  const others = number > own.length ? ` (${count(number - own.length)} of other keys)` : "";
  text("contexts-note", number ? `${count(number)} kept${others} in ${binary(bytes)}, of ${binary(most_bytes)} at the most.` : "None. POST /v1/contexts keeps a document's KV for many requests.");
  for (const c of own) {
    const row = element(body, "tr");
    element(element(row, "td", c.id), "small", new Date(1000 * c.created).toLocaleTimeString("en", {hour12: false}));
    element(row, "td", c.kv_plan, "plan");
    element(row, "td", count(c.tokens), "n");
    element(row, "td", binary(c.kv_bytes), "n");
    saved(element(row, "td"), c.kv_bytes, c.kv_bytes_dense);
  }
}

function showEnded(ended) {
  const body = $("ended");
  body.replaceChildren();
  body.closest(".scroll").hidden = !ended.length;
  text("ended-note", ended.length ? "The newest first." : "None yet.");
  for (const e of ended) {
    const row = element(body, "tr");
    element(element(row, "td", e.id), "small", e.finish_reason);
    element(row, "td", e.plan, "plan");
    for (const value of [count(e.prompt_tokens), count(e.cached_tokens), count(e.output_tokens), seconds(e.ttft_s), seconds(e.tpot_s)]) element(row, "td", value, "n");
    element(element(row, "td", binary(e.kv_bytes), "n"), "small", `${binary(e.kv_bytes_peak)} peak`);
    saved(element(row, "td"), e.kv_bytes, e.kv_bytes_dense);
  }
}

async function refresh() {
  let wait = EVERY_MS;
  try {
    const answer = await fetch("dashboard/state", {headers: headers()});
    if (answer.status === 401) {
      askForKey();
      return;
    }
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    show(await answer.json());
    $("key-form").hidden = true;
    $("main").hidden = false;
  } catch (error) {
    say(`no answer from the server (${error.message})`, "lost");
    wait *= 3;
  }
  setTimeout(document.hidden ? whenSeen : refresh, wait);
}

function whenSeen() {
  if (!document.hidden) refresh();
  else document.addEventListener("visibilitychange", refresh, {once: true});
}

function askForKey() {
  const wrong = sessionStorage.getItem(KEY) !== null;
  sessionStorage.removeItem(KEY);
  $("main").hidden = true;
  $("key-form").hidden = false;
  say(wrong ? "that key is not valid" : "locked", wrong ? "lost" : "");
  $("key").focus();
}

$("key-form").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("key").value.trim());
  $("key").value = "";
  refresh();
};

// --- one prompt, two plans

let running = null;

$("compare").onsubmit = async (event) => {
  event.preventDefault();
  running = new AbortController();
  $("run").disabled = true;
  $("stop").disabled = false;
  const sides = [$("side-0"), $("side-1")];
  await Promise.all(sides.map((side) => answer(side, running.signal)));
  $("run").disabled = false;
  $("stop").disabled = true;
};
$("stop").onclick = () => running.abort();

function body(plan) {
  const chat = $("chat").checked, prompt = $("prompt").value;
  const asked = chat ? {messages: [{role: "user", content: prompt}]} : {prompt};
  return {model: $("model").textContent, ...asked, kv_plan: plan, max_tokens: +$("max-tokens").value, temperature: 0, stream: true, stream_options: {include_usage: true}};
}

/** Stream the prompt's answer under a side's plan into it. */
async function answer(side, signal) {
  const [numbers, out] = [side.querySelector(".numbers"), side.querySelector("blockquote")];
  const began = performance.now();
  let first = null, usage = null;
  const elapsed = () => (performance.now() - began) / 1000;
  const tell = () => {
    const parts = [first === null ? seconds(elapsed()) : `first token ${seconds(first)}`];
    if (usage) {
      parts.push(usage.completion_tokens === 1 ? "1 token" : `${count(usage.completion_tokens)} tokens`);
      if (usage.completion_tokens > 1) parts.push(`${seconds((elapsed() - first) / (usage.completion_tokens - 1))} per token`);
      parts.push(`KV ${binary(usage.kv_bytes)}, ${percent(usage.kv_bytes / usage.kv_bytes_dense)} of dense`);
      if (usage.prompt_tokens_details.cached_tokens) parts.push(`${count(usage.prompt_tokens_details.cached_tokens)} of ${count(usage.prompt_tokens)} prompt tokens found`);
    }
    numbers.textContent = parts.join(" · ");
  };
  numbers.classList.remove("failed");
  out.textContent = "";
  tell();
  try {
    const path = $("chat").checked ? "v1/chat/completions" : "v1/completions";
    const response = await fetch(path, {
      method: "POST",
      signal,
      headers: {...headers(), "Content-Type": "application/json"},
      body: JSON.stringify(body(side.querySelector(".plan").value)),
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const object of events(response)) {
      if (object.error) throw new Error(object.error.message);
      for (const choice of object.choices) {
        const piece = choice.delta ? choice.delta.content : choice.text;
        if (piece) {
          first ??= elapsed();
          out.append(piece);
        }
      }
      usage = object.usage || usage;
      tell();
    }
    if (first === null) out.textContent = "(no text)";
  } catch (error) {
    numbers.classList.add("failed");
    numbers.textContent = error.name === "AbortError" ? "stopped" : error.message;
  }
}

/** The objects of a response of server-sent events. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

refresh();
