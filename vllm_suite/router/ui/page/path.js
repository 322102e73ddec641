// The request path: pools in the order of a request, with what flows between them.
import { bytes, el, keyed, number, plural, rate, say, share } from "./dom.js";

const NAMES = { encode: "Encode", prefill: "Prefill", decode: "Decode", any: "Any role" };
const DENSE = 12;
const SWITCHING = ["closing", "drained", "switching", "verified", "restoring"];

function links(state) {
  const roles = state.pools.map((pool) => pool.role);
  const flows = [];
  const transfers = state.transfers;
  if (roles.includes("encode")) {
    flows.push({ after: "encode", what: "Embeddings", rate: transfers.ec_bytes_per_s, pulls: null });
  }
  if (roles.includes("prefill") && roles.includes("decode")) {
    flows.push({ after: "prefill", what: "KV blocks", rate: transfers.kv_bytes_per_s, pulls: transfers.kv_pulls_per_s });
  }
  return flows;
}

export function drawPath(parent, state) {
  const flows = links(state);
  const items = [];
  state.pools.forEach((pool) => {
    items.push({ key: `pool ${pool.role}`, pool });
    const flow = flows.find((one) => one.after === pool.role);
    if (flow) items.push({ key: `link ${pool.role}`, flow });
  });
  keyed(parent, items, (item) => item.key, (item) => (item.pool ? makePool(item.pool) : makeLink()), (node, item) =>
    item.pool ? updatePool(node, item.pool) : updateLink(node, item.flow));
}

function makeLink() {
  return el("li", { class: "link" },
    el("span", { class: "what" }), el("span", { class: "wire", "aria-hidden": "true" }), el("span", { class: "figures" }));
}

function updateLink(node, flow) {
  node.dataset.flow = flow.rate ? "on" : "off";
  say(node.querySelector(".what"), flow.what);
  const pulls = flow.pulls === null ? "" : ` · ${number(flow.pulls)} pulls/s`;
  say(node.querySelector(".figures"), flow.rate === null ? "not measured yet" : rate(flow.rate) + pulls);
}

function makePool(pool) {
  return el("li", { class: `panel pool ${pool.role}` },
    el("div", { class: "pool-head" }, el("h3", {}, NAMES[pool.role] ?? pool.role), el("p", { class: "sum" })),
    el("ul", { class: "members", "aria-label": `${NAMES[pool.role] ?? pool.role} instances` }), el("p", { class: "muted rest" }));
}

function updatePool(node, pool) {
  node.style.setProperty("--stage", `var(--${pool.role === "any" ? "other" : pool.role})`);
  const dense = pool.members.length > DENSE;
  node.classList.toggle("dense", dense);
  node.style.flexGrow = String(1 + Math.min(2, Math.floor(pool.members.length / 16)));
  const list = node.querySelector(".members");
  // It scrolls then, so the keyboard has to reach it.
  if (dense) list.tabIndex = 0;
  else list.removeAttribute("tabindex");
  const known = pool.instances + pool.missing;
  const sum = node.querySelector(".sum");
  say(sum, `${pool.ready} of ${known} ready · ${pool.running} running · ${pool.waiting} waiting`);
  sum.className = pool.ready < known ? "sum warn" : "sum";
  const most = Math.max(8, ...pool.members.map((member) => (member.running ?? 0) + (member.waiting ?? 0)));
  // What needs a look comes first.
  const members = [...pool.members].sort((a, b) => rank(a) - rank(b) || order.compare(a.instance, b.instance));
  keyed(list, members, (member) => `${member.instance} ${member.epoch}`, makeMember,
    (row, member) => updateMember(row, member, most));
  const rest = [];
  if (pool.missing) rest.push(`${pool.missing} listed ${pool.missing === 1 ? "address gives" : "addresses give"} no answer.`);
  if (pool.left_out) rest.push(`${plural(pool.left_out, "more instance")} not shown.`);
  say(node.querySelector(".rest"), rest.join(" "));
}

const order = new Intl.Collator("en", { numeric: true });
const stateOf = (member) => (SWITCHING.includes(member.phase) ? "switching" : member.ready ? "ready" : "away");
const rank = (member) => ["away", "switching", "ready"].indexOf(stateOf(member));

function makeMember() {
  const bar = (kind, ...parts) => el("div", { class: `bar ${kind}`, "aria-hidden": "true" }, ...parts);
  return el("li", { class: "member" },
    el("p", { class: "name" }, el("b", {}), el("span", { class: "word" })),
    el("div", { class: "meter" }, bar("load", el("i", { class: "running" }), el("i", { class: "waiting" })), el("span", { class: "load-text" })),
    el("div", { class: "meter" }, bar("kv", el("i", {})), el("span", { class: "kv-text" })),
    el("p", { class: "extra mono" }));
}

function updateMember(row, member, most) {
  row.dataset.state = stateOf(member);
  const name = row.querySelector("b");
  say(name, member.instance);
  const switches = member.role_epoch ? ` · switched ${member.role_epoch} ×` : "";
  const extra = `epoch ${member.epoch} · ${member.in_router} in router${switches}`;
  name.title = `${member.instance}, ${extra}`;
  const target = member.target ? ` to ${member.target}` : "";
  const word = stateOf(member) === "switching" ? member.phase + target : member.ready ? "ready" : member.why_not || "not ready";
  say(row.querySelector(".word"), word);
  const width = (selector, part) => { row.querySelector(selector).style.width = `${(100 * part).toFixed(1)}%`; };
  width(".running", (member.running ?? 0) / most);
  width(".bar .waiting", (member.waiting ?? 0) / most);
  const load = member.running === null ? `${member.in_router} in router` : `${member.running} run · ${member.waiting ?? 0} wait`;
  say(row.querySelector(".load-text"), load);
  width(".kv i", member.kv_usage ?? 0);
  row.querySelector(".kv i").classList.toggle("full", (member.kv_usage ?? 0) > 0.9);
  say(row.querySelector(".kv-text"), member.kv_usage === null ? "KV not known" : `KV ${share(member.kv_usage)}`);
  say(row.querySelector(".extra"), extra);
}

export const pairCells = (pair) => [
  pair.source, pair.target, pair.kind === "kv" ? "KV" : "embeddings", rate(pair.bytes_per_s),
  pair.pulls_per_s === null ? "–" : number(pair.pulls_per_s), bytes(pair.bytes_total),
];
