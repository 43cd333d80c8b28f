// The live view of the engine. It asks once a second, and only while somebody can see it.

import { ApiError, request } from "./api.js";
import { BlockMapView, column, familyNumber, readPalette } from "./blockmap.js";
import { byId, count, duration, element, plural, short } from "./dom.js";
import { ownRequests } from "./playground.js";

const PERIOD_MS = 1000;
const HISTORY_SECONDS = 120;
const SVG = "http://www.w3.org/2000/svg";

let report = () => {};
let latest = null;
let history = []; // {since, time, output, prompt}: tokens a second between two looks
let isSeen = false;
let asking = false;
let maps = null;

/** Begin. `onAnswer` is told null after an answer, and the error after a failure. */
export function startEngineView(onAnswer) {
  report = onAnswer;
  maps = { device: new BlockMapView(byId("map")), host: new BlockMapView(byId("host-map")) };
  new IntersectionObserver((entries) => {
    isSeen = entries.at(-1).isIntersecting;
    ask();
  }).observe(byId("engine"));
  document.addEventListener("visibilitychange", ask);
  addEventListener("themechange", draw);
  addEventListener("resize", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  byId("map").addEventListener("pointermove", (event) => {
    byId("map-hint").textContent = maps.device.describe(event.offsetX, event.offsetY) ?? "";
  });
  setInterval(ask, PERIOD_MS);
}

async function ask() {
  if (asking || !isSeen || document.hidden) return;
  asking = true;
  try {
    const state = await (await request("engine/state", { ask: false })).json();
    observe(decoded(state));
    showNote(null);
    report(null);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    showNote(error.status === 401 ? "The server's key is wanted to see its engine." : error.message);
    report(error);
  } finally {
    asking = false;
  }
}

function decoded(state) {
  for (const blocks of [state.device_blocks, state.host_blocks]) {
    for (const name of ["cached", "held", "shared"]) blocks[name] = column(blocks[name]);
  }
  state.prefix_cells = column(state.prefix_cells);
  return state;
}

function showNote(text) {
  byId("engine-note").hidden = text === null;
  byId("engine-note").textContent = text ?? "";
  byId("engine").classList.toggle("stale", text !== null);
}

/** Take in a state; rates are differences between two of the same scheduler. */
function observe(state) {
  const before = latest;
  latest = state;
  if (before && before.incarnation === state.incarnation && state.time > before.time) {
    const seconds = state.time - before.time;
    const grown = (name) => Math.max(0, state[name] - before[name]);
    const computed = grown("num_query_tokens") - grown("num_hit_tokens");
    history.push({
      since: before.time,
      time: state.time,
      output: grown("num_generated_tokens") / seconds,
      prompt: Math.max(0, computed) / seconds,
    });
  } else if (before && before.incarnation !== state.incarnation) {
    history = [];
  }
  history = history.filter(({ time }) => time > state.time - HISTORY_SECONDS);
  draw();
}

// -- drawing ----------------------------------------------------------------------------------------------------

function draw() {
  if (!latest) return;
  const palette = readPalette(byId("legend"), byId("palette"));
  byId("engine-facts").textContent =
    `tp ${latest.tensor_parallel_size} · context ${short(latest.max_model_len)} · ${latest.block_size} tokens a block · v${latest.version}`;
  drawTiles();
  drawRates();
  drawBlocks(palette);
  drawPrefixes(palette);
  drawSequences();
}

function drawTiles() {
  const { device_blocks: blocks, latencies } = latest;
  const rates = history.at(-1);
  const rate = (value) => (value === undefined ? "–" : count(Math.round(value)));
  const used = blocks.num_held + blocks.num_shared;
  const tiles = {
    running: [count(latest.num_running), `of ${count(latest.max_num_seqs)}`],
    waiting: [count(latest.num_waiting), latest.num_swapped ? `${count(latest.num_swapped)} swapped` : ""],
    output: [rate(rates?.output)],
    prompt: [rate(rates?.prompt)],
    ttft: [duration(latencies.ttft.p50), latencies.ttft.count ? `p90 ${duration(latencies.ttft.p90)}` : ""],
    tpot: [duration(latencies.tpot.p50), latencies.tpot.count ? `p90 ${duration(latencies.tpot.p90)}` : ""],
    kv: [percent(used, blocks.num_blocks), `${short(used)} of ${short(blocks.num_blocks)}`],
    hits: [percent(latest.num_hit_tokens, latest.num_query_tokens), latest.num_query_tokens ? `of ${short(latest.num_query_tokens)} tok` : ""],
  };
  for (const [name, [value, under]] of Object.entries(tiles)) {
    byId(`t-${name}`).textContent = value;
    if (under !== undefined) byId(`t-${name}-sub`).textContent = under;
  }
}

function percent(part, whole) {
  if (!whole) return "–";
  const value = (100 * part) / whole;
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${value.toFixed(value > 0 && value < 10 ? 1 : 0)} %`;
}

function drawRates() {
  const width = 240;
  const height = 56;
  const peak = Math.max(10, ...history.flatMap(({ output, prompt }) => [output, prompt]));
  const end = latest.time;
  const x = (time) => width * (1 - (end - time) / HISTORY_SECONDS);
  const y = (value) => height - 1 - (height - 4) * (value / peak);
  // A rate holds for the time between two looks; where nobody looked, the line is straight.
  const point = (time, value) => `${x(time).toFixed(1)},${y(value).toFixed(1)}`;
  const points = (name) => history.flatMap((each) => [point(each.since, each[name]), point(each.time, each[name])]);
  const shape = (tag, kind, corners) => {
    const made = document.createElementNS(SVG, tag);
    made.setAttribute("class", kind);
    made.setAttribute("points", corners.join(" "));
    return made;
  };
  const output = points("output");
  const area = history.length ? [`${x(history[0].since).toFixed(1)},${height}`, ...output, `${width},${height}`] : [];
  byId("rates").replaceChildren(
    shape("polyline", "middle", [`0,${y(peak / 2)}`, `${width},${y(peak / 2)}`]),
    shape("polygon", "area-output", area),
    shape("polyline", "line-prompt", points("prompt")),
    shape("polyline", "line-output", output),
  );
  byId("rates-peak").textContent = history.length ? `peak ${count(Math.round(peak))}` : "";
}

function drawBlocks(palette) {
  const { device_blocks: device, host_blocks: host } = latest;
  const free = device.num_blocks - device.num_cached - device.num_held - device.num_shared;
  const counts = { free, cached: device.num_cached, held: device.num_held, shared: device.num_shared };
  for (const [state, number] of Object.entries(counts)) byId(`n-${state}`).textContent = count(number);
  const told = Object.entries(counts).map(([state, number]) => `${number} ${state}`);
  byId("map").setAttribute("aria-label", `Map of ${device.num_blocks} K/V blocks: ${told.join(", ")}`);
  byId("map-scale").textContent = scale(device);
  maps.device.draw(device, palette, latest.prefixes, latest.prefix_cells);
  byId("host").hidden = host.num_blocks === 0;
  if (host.num_blocks) {
    byId("host-scale").textContent = `${count(host.num_held + host.num_shared)} held, ${count(host.num_cached)} cached · ${scale(host)}`;
    maps.host.draw(host, palette);
  }
}

function scale(blocks) {
  const mapped = Math.min(blocks.num_blocks, blocks.num_mapped);
  const range = mapped < blocks.num_blocks ? `${short(mapped)} of ${short(blocks.num_blocks)}, the rest is free` : plural(mapped, "block");
  return blocks.blocks_per_cell > 1 ? `${range} · ${blocks.blocks_per_cell} a cell` : range;
}

function drawPrefixes(palette) {
  byId("no-prefixes").hidden = latest.prefixes.length > 0;
  byId("prefixes").replaceChildren(
    ...latest.prefixes.map((each) => {
      const tokens = each.num_blocks * latest.block_size;
      const text = `${plural(each.num_seqs, "sequence")} share ${plural(each.num_blocks, "block")} (${count(tokens)} tokens), which saves ${count(each.num_saved)}`;
      return element("li", {}, element("i", { className: `family f${familyNumber(each.root, palette)}` }), text);
    }),
  );
}

function drawSequences() {
  const { sequences, num_running, num_waiting, num_swapped } = latest;
  const total = num_running + num_waiting + num_swapped;
  byId("sequences-note").textContent = total > sequences.length ? `the first ${sequences.length} of ${count(total)}` : "";
  byId("no-sequences").hidden = total > 0;
  byId("sequences").replaceChildren(...sequences.map(sequenceRow));
}

function sequenceRow(seq) {
  const isOwn = [...ownRequests].some((id) => seq.request_id.startsWith(id));
  const name = seq.request_id.replace(/^(chatcmpl|cmpl)-/, "").slice(0, 8) + (seq.output_index ? `[${seq.output_index}]` : "");
  const isPrefill = seq.status === "running" && seq.num_computed_tokens < seq.num_prompt_tokens;
  const blocks = seq.num_shared_blocks ? `${count(seq.num_blocks)} (${count(seq.num_shared_blocks)})` : count(seq.num_blocks);
  return element(
    "tr",
    { className: isOwn ? "own" : "" },
    element("td", { title: seq.request_id }, element("code", {}, name), isOwn ? element("span", { className: "tag" }, "yours") : null),
    element("td", {}, isPrefill ? `prefill ${Math.floor((100 * seq.num_computed_tokens) / seq.num_prompt_tokens)} %` : seq.status + (seq.num_preemptions ? ` (${seq.num_preemptions}× preempted)` : "")),
    element("td", {}, count(seq.num_prompt_tokens)),
    element("td", {}, count(seq.num_completion_tokens)),
    element("td", {}, blocks),
    element("td", {}, duration(seq.age)),
  );
}
