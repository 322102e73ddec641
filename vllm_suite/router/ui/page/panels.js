// Everything beside the request path: figures, latency, events, the plan, pairs.
import { NONE, clock, el, keyed, ms, number, plural, put, say, share, table } from "./dom.js";
import { pairCells } from "./path.js";

const SVG = "http://www.w3.org/2000/svg";

function spark(values) {
  const known = values.map((value) => value ?? null);
  const top = Math.max(...known.filter((value) => value !== null), 0);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 60 20");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  if (known.length < 2 || !top) return svg;
  const points = known.map((value, index) => (value === null ? null : [60 - (known.length - 1 - index), 19 - (18 * value) / top]))
    .filter((point) => point !== null);
  if (points.length < 2) return svg;
  const line = points.map((point) => point.map((part) => part.toFixed(1)).join(",")).join(" ");
  const area = document.createElementNS(SVG, "polygon");
  area.setAttribute("class", "area");
  area.setAttribute("points", `${points[0][0]},20 ${line} ${points.at(-1)[0]},20`);
  const stroke = document.createElementNS(SVG, "polyline");
  stroke.setAttribute("points", line);
  svg.append(area, stroke);
  return svg;
}

function tiles(state) {
  const seen = Object.fromEntries(state.latency.seen.map((one) => [one.name, one]));
  const target = Object.fromEntries(state.targets.map((one) => [one.name, one]));
  const met = (name) => {
    const one = target[name];
    if (!one) return `p50 ${ms(seen[name]?.p50)}`;
    return one.attained === null ? `target ${ms(one.limit)}` : `${share(one.attained)} within ${ms(one.limit)}`;
  };
  const level = (name) => (target[name]?.attained !== undefined && target[name].attained !== null && target[name].attained < 0.9 ? "bad" : null);
  const traffic = state.traffic;
  return [
    { name: "Requests per second", value: number(traffic.requests_per_s, 2), note: `${share(traffic.disaggregated)} disaggregated`, series: traffic.rate_series },
    { name: "In flight", value: number(traffic.in_flight, 0), note: "in this router now" },
    { name: "TTFT p99", value: ms(seen.ttft?.p99), note: met("ttft"), series: traffic.ttft_p99_series, level: level("ttft") },
    { name: "TPOT p99", value: ms(seen.tpot?.p99), note: met("tpot"), level: level("tpot") },
    ...(state.targets.length ? [{ name: "Goodput", value: share(traffic.goodput), note: "within every target", level: traffic.goodput !== null && traffic.goodput < 0.9 ? "bad" : null }] : []),
    { name: "Failed requests", value: number(traffic.failed, 0), note: `${traffic.refused.toLocaleString("en")} refused`, level: traffic.failed ? "bad" : null },
    { name: "Recoveries", value: number(traffic.recoveries, 0), note: "in the window", level: traffic.recoveries ? "warn" : null },
  ];
}

export function drawTiles(parent, state) {
  keyed(parent, tiles(state), (tile) => tile.name,
    (tile) => el("div", { class: "tile" }, el("dt", {}, tile.name), el("dd", { class: "value" }), document.createElementNS(SVG, "svg"), el("dd", { class: "note" })),
    (node, tile) => {
      if (tile.level) node.dataset.level = tile.level;
      else delete node.dataset.level;
      say(node.querySelector(".value"), tile.value);
      say(node.querySelector(".note"), tile.note);
      node.querySelector("svg").replaceWith(spark(tile.series ?? []));
    });
}

// Name of a stage on the page, and its colour. The first four make the time to the first token.
const STAGES = {
  encode: ["encode", "encode"], queue: ["queue", "queue"], prefill: ["prefill", "prefill"],
  first_token: ["transfer and first token", "transfer"], decode: ["decode after it", "decode"],
  answer: ["whole answer, not streamed", "other"],
};

function stack(name, stages, quantile, longest) {
  const bar = el("div", { class: "bar", "aria-hidden": "true" });
  let total = 0;
  for (const stage of stages) {
    const value = stage[quantile] ?? 0;
    total += value;
    const part = el("i", {});
    part.style.setProperty("--stage", colour(stage.name));
    part.style.width = `${((100 * value) / longest).toFixed(2)}%`;
    bar.append(part);
  }
  return el("div", { class: "stack" }, el("span", {}, name), bar, el("span", {}, ms(total)));
}

const AFTER = ["decode", "answer"];
const colour = (stage) => `var(--${STAGES[stage]?.[1] ?? "other"})`;

export function drawLatency(parent, state) {
  const measured = state.latency.stages.filter((stage) => stage.count);
  const before = measured.filter((stage) => !AFTER.includes(stage.name));
  const sum = (quantile) => before.reduce((all, stage) => all + (stage[quantile] ?? 0), 0);
  const longest = Math.max(sum("p50"), sum("p99"), 1e-9);
  const stageName = (stage) => {
    const chip = el("span", { class: "chip", "aria-hidden": "true" });
    chip.style.setProperty("--stage", colour(stage.name));
    return el("span", {}, chip, STAGES[stage.name]?.[0] ?? stage.name);
  };
  const columns = [{ name: "stage" }, { name: "p50", n: true }, { name: "p99", n: true }, { name: "count", n: true, wide: true }];
  const split = table("Bars: the stages up to the first token. Percentiles of each stage by itself; their sum need not be that of a request.", columns,
    measured.map((stage) => [stageName(stage), ms(stage.p50), ms(stage.p99), stage.count.toLocaleString("en")]));
  const names = { ttft: "first token", tpot: "per token after it", request: "whole request" };
  const targets = Object.fromEntries(state.targets.map((one) => [one.name, one]));
  const seen = table(null, [{ name: "seen by clients" }, { name: "p50", n: true }, { name: "p99", n: true }, { name: "target", n: true }, { name: "met", n: true }],
    state.latency.seen.filter((one) => one.count || targets[one.name]).map((one) => [
      names[one.name] ?? one.name, ms(one.p50), ms(one.p99), ms(targets[one.name]?.limit), share(targets[one.name]?.attained)]));
  if (!state.latency.seen.some((one) => one.count)) {
    put(parent, el("p", { class: "muted" }, "No request in the window."));
    return;
  }
  put(parent, ...(before.length ? [stack("p50", before, "p50", longest), stack("p99", before, "p99", longest)] : []), ...(measured.length ? [split] : []), seen);
}

const WORDS = {
  prefill_retry: "prefill tried elsewhere", prefill_rejected: "prefill refused, decode asked", decode_alone: "decode computed the prompt",
  decode_retry: "decode tried again", reference_dropped: "KV reference dropped", error: "given up: error to the client", broken_off: "answer broke off",
  media_sent: "media sent instead of embeddings", encode_split: "encode call split", encode_retry: "encode tried elsewhere",
  encode_local: "encoded by the consumer", admitted: "joined", suspect: "suspected", refused: "refused its role's work",
  forgotten: "forgotten", restarted: "restarted", switched: "switched its role", unreachable: "gave no answer",
  duplicate: "same id at two addresses", discovery_failed: "discovery failed",
};
const GOOD = ["admitted", "switched"];

export function drawEvents(parent, state) {
  if (!state.events.length) {
    put(parent, el("p", { class: "muted" }, "Nothing since the router started."));
    return;
  }
  const rows = state.events.map((event) => {
    const what = WORDS[event.what] ?? event.what.replaceAll("_", " ");
    const times = event.times > 1 ? ` × ${event.times.toLocaleString("en")} since ${clock(event.began)}` : "";
    const kind = ["error", "broken_off"].includes(event.what) ? "bad" : GOOD.includes(event.what) ? "good" : "warn";
    return [clock(event.last), el("span", {}, el("span", { class: kind }, what), times, event.why ? ` (${event.why.replaceAll("_", " ")})` : ""),
      event.instance || NONE, event.request ? el("code", {}, event.request) : NONE];
  });
  put(parent, table("Request: first 12 hex digits of the SHA-256 of its X-Request-Id.",
    [{ name: "last", t: true }, { name: "what" }, { name: "instance", id: true }, { name: "request", wide: true, t: true }], rows));
}

const VERDICTS = { inside: ["inside", "good"], quicker: ["quicker", "good"], slower: ["slower", "bad"], unknown: ["not measured", ""] };

export function drawPlan(parent, state) {
  const plan = state.plan;
  if (!plan) {
    put(parent, el("p", { class: "muted" }, "The fleet file has no predicted section; vllm-suite plan writes one."));
    return;
  }
  const rows = plan.rows.map((row) => {
    const [word, kind] = VERDICTS[row.verdict];
    const top = 1.1 * Math.max(row.high, row.measured ?? 0);
    const band = el("i", {});
    band.style.left = `${(100 * row.low) / top}%`;
    band.style.width = `${(100 * (row.high - row.low)) / top}%`;
    const mark = el("b", {});
    if (row.measured === null) mark.hidden = true;
    else mark.style.left = `calc(${(100 * row.measured) / top}% - 1.5px)`;
    return [row.name.replace("ttft", "TTFT").replace("tpot", "TPOT"), el("span", {}, `${ms(row.planned)} (${ms(row.low)} to ${ms(row.high)})`,
      el("span", { class: "band", "aria-hidden": "true" }, band, mark)), ms(row.measured), { text: word, class: kind }];
  });
  const over = plan.measured_rate > plan.rate ? "; the load is above it" : "";
  put(parent, table(`Planned for up to ${number(plan.rate, 2)} requests per second; measured ${number(plan.measured_rate, 2)}${over}.`,
    [{ name: "figure", t: true }, { name: "plan and its band" }, { name: "measured", n: true }, { name: "verdict" }], rows));
}

export function drawPairs(parent, state) {
  const { pairs, left_out: leftOut } = state.transfers;
  if (!pairs.length) {
    put(parent, el("p", { class: "muted" }, "Nothing has been pulled yet."));
    return;
  }
  const caption = leftOut ? `The busiest; ${plural(leftOut, "more pair")} not shown.` : "Totals since the puller started.";
  put(parent, table(caption, [{ name: "from", id: true }, { name: "to", id: true }, { name: "what", wide: true, t: true }, { name: "rate", n: true }, { name: "pulls/s", n: true, wide: true }, { name: "total", n: true }],
    pairs.map(pairCells)));
}
