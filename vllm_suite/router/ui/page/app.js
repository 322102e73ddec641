// Asks the router once a second and draws what it says.
import { $, clock, number, say } from "./dom.js";
import { drawEvents, drawLatency, drawPairs, drawPlan, drawTiles } from "./panels.js";
import { drawPath } from "./path.js";

const EVERY_MS = 1000;
const PATIENCE_MS = 5000;
const STORED = "vllm-suite-key";
const WORDS = { ok: "OK", degraded: "Degraded", down: "Down" };

let key = null;
try {
  key = sessionStorage.getItem(STORED);
} catch {
  // Storage is off: the key lives as long as the page.
}
let paused = false;
let timer = 0;
let asking = false;
let lostSince = null;
let last = null;

class Refused extends Error {}

async function ask() {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  const response = await fetch("ui/state", { headers, cache: "no-store", credentials: "omit", redirect: "error", signal: AbortSignal.timeout(PATIENCE_MS) });
  if (response.status === 401) throw new Refused();
  if (!response.ok) throw new Error(`it answers HTTP ${response.status}`);
  return response.json();
}

async function look() {
  clearTimeout(timer);
  if (asking || document.hidden || (paused && last)) return;
  asking = true;
  try {
    const state = await ask();
    if (state.version !== 1) throw new Error(`it speaks version ${state.version} of this page, reload it`);
    found();
    draw(state);
  } catch (error) {
    if (error instanceof Refused) {
      login(key ? "The router does not take that key." : "This router asks for a key.");
      return;
    }
    lost(error);
  } finally {
    asking = false;
  }
  timer = setTimeout(look, EVERY_MS);
}

function draw(state) {
  last = state;
  $("login").hidden = true;
  $("live").hidden = false;
  $("pause").hidden = false;
  $("forget").hidden = !key;
  $("health").dataset.health = state.health;
  say($("health-word"), WORDS[state.health] ?? state.health);
  say($("headline"), state.headline);
  document.title = `${WORDS[state.health] ?? state.health} · vllm-suite router`;
  say($("updated"), `${paused ? "paused at" : "updated"} ${clock(state.time)}`);
  const minutes = state.window_s / 60;
  const window = `over the last ${minutes >= 1.5 ? `${number(minutes, 0)} min` : `${number(state.window_s, 0)} s`}`;
  for (const node of document.querySelectorAll(".window")) say(node, window);
  drawTiles($("tiles"), state);
  drawPath($("path"), state);
  drawLatency($("latency"), state);
  drawEvents($("events"), state);
  drawPlan($("plan"), state);
  drawPairs($("pairs"), state);
  say($("footer"), `vllm-suite ${state.suite} · router up since ${new Date(state.started * 1000).toLocaleString("en-GB")} · figures ${window}`);
  document.body.dataset.drawn = String(state.time);
}

function lost(error) {
  lostSince ??= Date.now() / 1000;
  const alarm = $("alarm");
  const why = error.name === "TimeoutError" ? `no answer in ${PATIENCE_MS / 1000} s` : error.name === "TypeError" ? "no connection" : error.message;
  const text = `The router cannot be reached since ${clock(lostSince)}: ${why}.`;
  const below = last ? `What is shown below is from ${clock(last.time)} and may be wrong by now. Trying again every second.` : "Trying again every second.";
  // Set once: an alert that changes is read out again.
  if (alarm.hidden || alarm.firstChild?.textContent !== text) {
    alarm.replaceChildren(...[text, below].map((line) => Object.assign(document.createElement("p"), { textContent: line })));
    alarm.hidden = false;
  }
  document.body.classList.add("stale");
  $("health").dataset.health = "unknown";
  say($("health-word"), "Unknown");
  say($("headline"), "The router cannot be reached");
  document.title = "Unreachable · vllm-suite router";
}

function found() {
  lostSince = null;
  $("alarm").hidden = true;
  document.body.classList.remove("stale");
}

function login(why) {
  found();
  forget();
  last = null;
  $("live").hidden = true;
  $("pause").hidden = true;
  $("forget").hidden = true;
  $("health").dataset.health = "unknown";
  say($("health-word"), "Locked");
  say($("headline"), "");
  say($("updated"), "");
  say($("footer"), "");
  say($("login-why"), why);
  $("login").hidden = false;
  $("key").focus();
}

function forget() {
  key = null;
  try {
    sessionStorage.removeItem(STORED);
  } catch {
    // nothing was stored
  }
}

$("login").addEventListener("submit", (event) => {
  event.preventDefault();
  const given = $("key").value.trim();
  $("key").value = "";
  if (!/^[\x20-\xff]+$/.test(given)) {
    login("A browser cannot send a key with these characters.");
    return;
  }
  key = given;
  try {
    sessionStorage.setItem(STORED, key);
  } catch {
    // kept in memory
  }
  look();
});
$("forget").addEventListener("click", () => {
  clearTimeout(timer);
  login("The key is forgotten.");
});
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
  if (last) say($("updated"), `${paused ? "paused at" : "updated"} ${clock(last.time)}`);
  look();
});
document.addEventListener("visibilitychange", look);

if (document.body.dataset.key === "required" && !key) login("This router asks for a key.");
else look();
