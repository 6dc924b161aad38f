"use strict";
// The page of play.py. It sends commands as JSON, {"do": name, "value": ...}; what it gets is binary: kind (1 byte), the
// length of a header (4 bytes, little endian), the header (JSON), bytes. The game itself runs in play.py.

const KINDS = ["hello", "view", "preview", "film", "error"];
const BELOW = [0, 83, 138], ABOVE = [200, 80, 0]; // colours of a latent's values, white between them
const CODES = {
  ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right", Space: "fire",
  KeyW: "up", KeyS: "down", KeyA: "left", KeyD: "right",
};
const CHART_STEPS = 150;
const $ = (id) => document.getElementById(id);

let socket = null, about = null, view = null, tries = 0, broken = false;
let history = []; // of the chart: {value, end, reward, gap}
let times = []; // when the last steps came, for the rate
let stale = false; // there is something to draw
let eventText = "", eventUntil = 0;
let previewBusy = false, previewWanted = null;

// --- the connection

function connect() {
  const address = new URL("socket", location.href);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => receive(event.data);
  socket.onclose = () => {
    held.clear();
    previewBusy = false;
    if (broken) return;
    tries += 1;
    if (tries > 20) return say("No connection. Is play.py still running? Then reload this page.");
    say("Connection lost, trying again …");
    setTimeout(connect, Math.min(500 * tries, 5000));
  };
}

function send(name, value = null) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify({ do: name, value }));
}

function receive(buffer) {
  const data = new DataView(buffer), length = data.getUint32(1, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 5, length)));
  handlers[KINDS[data.getUint8(0)]](header, new Uint8Array(buffer, 5 + length));
}

const handlers = {
  hello(header) {
    about = header;
    tries = 0;
    history = [];
    view = null;
    say("");
    introduce();
  },
  view(header, bytes) {
    header.pixels = bytes.subarray(0, 12288);
    header.latents = new Int8Array(bytes.slice(12288).buffer);
    remember(header);
    view = header;
    if (!stale) requestAnimationFrame(draw);
    stale = true;
  },
  preview(header, bytes) {
    previewBusy = false;
    paint($("preview"), (i) => [bytes[3 * i], bytes[3 * i + 1], bytes[3 * i + 2]]);
    if (previewWanted !== null) preview(previewWanted);
  },
  film(header, bytes) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: "image/gif" }));
    link.download = `${about.game}.gif`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say(`Recorded ${header.frames} steps: ${about.game}.gif`);
  },
  error(header) {
    broken = true;
    say(`Something went wrong: ${header.text}. Reload the page to start again.`);
  },
};

function say(text) {
  $("message").textContent = text;
  $("message").hidden = !text;
}

// --- what is shown

function introduce() {
  const minutes = about.trained_steps / about.fps / 60;
  const time = minutes < 1 ? "less than a minute"
    : minutes < 90 ? `${minutes.toFixed(0)} minutes` : `${(minutes / 60).toFixed(1)} hours`;
  $("game").textContent = about.game;
  $("about").textContent =
    `An agent learned ${about.game} from ${about.trained_steps.toLocaleString("en")} steps (${time}) of play, and with it ` +
    "a model that can dream the game. Play the real game, or play inside the dream; or watch the agent do it." +
    (about.chance ? " In this version of the game actions sometimes stick and last for a random time." : "");
  const list = $("actions");
  list.replaceChildren(...about.actions.map((name, i) => {
    const item = document.createElement("li"), button = document.createElement("button");
    const title = document.createElement("span"), share = document.createElement("span");
    button.type = "button";
    button.dataset.action = i;
    title.className = "name";
    title.textContent = `${i} ${name}`;
    button.append(title, share);
    item.append(button);
    holdWhilePressed(button, () => `action ${i}`);
    return item;
  }));
  list.classList.toggle("many", about.actions.length > 9);
  $("sampling").max = about.most_sampling;
  $("moment").max = about.replay - 1;
  $("replaysource").textContent = `of ${about.replay.toLocaleString("en")} recorded in training`;
  const vertical = about.actions.some((name) => /UP|DOWN/.test(name));
  $("turned").hidden = vertical || !about.actions.some((name) => /RIGHT/.test(name));
  preview(0);
}

function remember(next) {
  const fresh = !view || next.mode !== view.mode || next.step < view.step || next.start !== view.start;
  if (!fresh && next.step === view.step) return; // a view of the same moment
  if (next.start !== null && (!view || next.start !== view.start)) {
    $("moment").value = next.start;
    preview(next.start);
  }
  history.push({ value: next.value, end: next.step ? next.end_prob : null, reward: next.reward, gap: fresh });
  history = history.slice(-CHART_STEPS);
  times.push(performance.now());
  times = times.slice(-31);
  const words = [];
  if (next.step && next.reward) words.push(`${next.reward > 0 ? "+" : "−"}${Math.abs(next.reward)}`);
  if (next.over) words.push(next.mode === "game" ? "game over" : "the dream ends here");
  else if (next.end) words.push("life lost");
  if (words.length) [eventText, eventUntil] = [words.join(" · "), performance.now() + 800];
  else if (fresh) eventUntil = 0;
}

function draw() {
  stale = false;
  const dream = view.mode === "dream";
  document.body.classList.toggle("dream", dream);
  $("badge").textContent = dream ? "DREAM" : "REAL GAME";
  $("origin").textContent = origin(dream);
  const latents = new Uint8ClampedArray(16 * 64 * 3);
  view.latents.forEach((value, i) => latents.set(shade(value), 3 * i));
  const tile = (x, y) => { // where in `latents` the pixel x, y of 4 x 4 tiles of 8 x 8 pixels lies
    const channel = 4 * (y >> 3) + (x >> 3);
    return 64 * channel + 8 * (y % 8) + (x % 8);
  };
  const at = (array, i) => [array[3 * i], array[3 * i + 1], array[3 * i + 2]];
  paint($("screen"), (i) => at(view.pixels, i));
  paint($("latents"), (i) => {
    const x = i % 35, y = Math.floor(i / 35);
    if (x % 9 === 8 || y % 9 === 8) return [120, 120, 120];
    return at(latents, tile(x - Math.floor(x / 9), y - Math.floor(y / 9)));
  });
  drawNumbers(dream);
  drawChart();
}

function origin(dream) {
  if (!dream) return view.player === "agent" ? "the agent plays" : "you play";
  const from = view.start === null ? "the real game" : `recorded frame ${view.start.toLocaleString("en")}`;
  return `${view.step} step${view.step === 1 ? "" : "s"} after ${from}`;
}

function drawNumbers(dream) {
  const percent = (x) => (x === null ? "–" : x < 0.1 ? `${(100 * x).toFixed(1)}%` : `${(100 * x).toFixed(0)}%`);
  $("score").textContent = signed(view.score.toLocaleString("en"));
  $("stepcount").textContent = view.step;
  $("value").textContent = view.value === null ? "–" : signed(view.value.toFixed(2));
  const [minus, , plus] = view.reward_probs;
  $("guess").textContent = view.step ? signed((plus - minus).toFixed(2)) : "–";
  $("ending").textContent = view.step ? percent(view.end_prob) : "–";
  const seconds = (times.at(-1) - times[0]) / 1000;
  $("rate").textContent = view.paused || times.length < 5 ? "–" : ((times.length - 1) / seconds).toFixed(1);
  if (performance.now() < eventUntil || view.over) showEvent(eventText);
  else showEvent("");
  document.querySelectorAll("[data-do]").forEach((b) => b.setAttribute("aria-pressed", view[b.dataset.do] === b.dataset.value));
  document.querySelectorAll("#actions button").forEach((button, i) => {
    const share = percent(view.probs[i]);
    button.lastChild.textContent = share;
    button.style.background = `linear-gradient(90deg, #bcd8ea ${share}, #fff ${share})`;
    button.classList.toggle("taken", view.action === i);
  });
  $("pause").textContent = view.paused ? "Go on" : "Pause";
  $("restart").textContent = dream ? "New dream" : "New game";
  $("record").classList.toggle("on", view.recording !== null);
  $("record").textContent = view.recording === null ? "Record GIF" : `Stop (${(view.recording / about.fps).toFixed(1)} s)`;
  setSlider("speed", Math.round(10 * Math.log10(view.speed)), `× ${view.speed.toFixed(view.speed < 1 ? 2 : 1)}`);
  setSlider("sampling", view.sampling, view.sampling);
}

function signed(text) { // with a minus sign that is as wide as a digit; -0.00 is 0.00
  return /^-[0.]*$/.test(text) ? text.slice(1) : text.replace("-", "−");
}

function setSlider(id, value, text) {
  if (!$(id).matches(":active")) $(id).value = value;
  $(`${id}out`).textContent = text;
}

function showEvent(text) {
  if ($("event").textContent === text) return;
  const box = document.createElement("span");
  box.textContent = text;
  $("event").replaceChildren(...(text ? [box] : []));
}

function shade(value) { // int8 -> colour
  const strength = Math.abs(value) / 127, colour = value < 0 ? BELOW : ABOVE;
  return colour.map((c) => 255 + strength * (c - 255));
}

function paint(canvas, colour) { // colour(i) of the i-th pixel, row by row
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < canvas.width * canvas.height; i++) {
    image.data.set(colour(i), 4 * i);
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
}

function drawChart() {
  const canvas = $("chart"), ratio = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  if (canvas.width !== Math.round(width * ratio)) [canvas.width, canvas.height] = [width * ratio, height * ratio].map(Math.round);
  const pen = canvas.getContext("2d"), left = 40, right = width - 44, top = 18, bottom = height - 8;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  pen.font = "11px system-ui, sans-serif";
  const values = history.map((h) => h.value).filter((v) => v !== null);
  const low = Math.min(0, ...values), high = Math.max(0, low + 0.1, ...values);
  const x = (i) => right - (history.length - 1 - i) * ((right - left) / (CHART_STEPS - 1));
  const yValue = (v) => bottom - ((v - low) / (high - low)) * (bottom - top), yEnd = (p) => bottom - p * (bottom - top);
  pen.strokeStyle = "#ddd";
  for (const y of [top, bottom]) { pen.beginPath(); pen.moveTo(left, y); pen.lineTo(right, y); pen.stroke(); }
  pen.textBaseline = "middle";
  pen.fillStyle = "#0072b2";
  pen.textAlign = "right";
  pen.fillText(high.toFixed(2), left - 4, top);
  pen.fillText(low.toFixed(2), left - 4, bottom - 2);
  pen.fillText("value", left - 4, (top + bottom) / 2);
  pen.fillStyle = "#b04e00";
  pen.textAlign = "left";
  pen.fillText("100%", right + 4, top);
  pen.fillText("0%", right + 4, bottom - 2);
  pen.fillText("end", right + 4, (top + bottom) / 2);
  const curve = (key, y, style, dash) => {
    pen.beginPath();
    let on = false;
    history.forEach((h, i) => {
      if (h[key] === null) { on = false; return; }
      if (on && !h.gap) pen.lineTo(x(i), y(h[key])); else pen.moveTo(x(i), y(h[key]));
      on = true;
    });
    [pen.strokeStyle, pen.lineWidth] = [style, 2];
    pen.setLineDash(dash);
    pen.stroke();
    pen.setLineDash([]);
    pen.lineWidth = 1;
  };
  curve("end", yEnd, "#d55e00", [5, 3]);
  curve("value", yValue, "#0072b2", []);
  pen.fillStyle = "#000";
  pen.textAlign = "center";
  history.forEach((h, i) => { if (h.reward && !h.gap) pen.fillText(h.reward > 0 ? "▲" : "▽", x(i), 8); });
}

// --- keys, touches, buttons

const held = new Map(); // what holds a key down (a keyboard code, a pointer) -> the key, or "action 3"

function hold(source, key) {
  if (key === null ? !held.delete(source) : held.get(source) === key) return;
  if (key !== null) held.set(source, key);
  const keys = [...new Set(held.values())], chosen = keys.filter((k) => k.startsWith("action ")).at(-1);
  send("hold", { keys: keys.filter((k) => !k.startsWith("action ")), action: chosen ? Number(chosen.slice(7)) : null });
}

function release() {
  for (const source of [...held.keys()]) hold(source, null);
  document.querySelectorAll(".down").forEach((button) => button.classList.remove("down"));
}

function holdWhilePressed(button, key) {
  button.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    button.setPointerCapture(event.pointerId);
    button.classList.add("down");
    hold(`pointer ${event.pointerId}`, key());
  });
  for (const type of ["pointerup", "pointercancel", "lostpointercapture"]) {
    button.addEventListener(type, (event) => {
      button.classList.remove("down");
      hold(`pointer ${event.pointerId}`, null);
    });
  }
  button.addEventListener("contextmenu", (event) => event.preventDefault()); // a long touch is no wish for a menu
  button.addEventListener("click", (event) => { // from the keyboard: a tap
    if (event.detail) return;
    hold("tap", key());
    hold("tap", null);
  });
}

function preview(index) {
  $("momentout").textContent = Number(index).toLocaleString("en");
  [previewWanted, previewBusy] = previewBusy ? [index, true] : [null, true];
  if (previewWanted === null) send("preview", Number(index));
}

const shortcuts = {
  KeyP: () => send("pause", !view.paused),
  KeyN: () => send("step"),
  KeyM: () => send("mode", view.mode === "game" ? "dream" : "game"),
  KeyT: () => send("player", view.player === "human" ? "agent" : "human"),
  KeyR: () => send("restart"),
  KeyG: () => send("record", view.recording === null),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !view) return;
  const target = event.target, code = event.code;
  if (target.matches("input") && code.startsWith("Arrow")) return; // a slider that has been tabbed to
  if (target.matches("button") && (code === "Space" || code === "Enter")) return;
  const digit = /^Digit(\d)$/.exec(code), key = CODES[code];
  if (key) hold(code, key);
  else if (digit && Number(digit[1]) < about.actions.length) hold(code, `action ${digit[1]}`);
  else if (!shortcuts[code]) return;
  else if (!event.repeat) shortcuts[code]();
  event.preventDefault();
});
document.addEventListener("keyup", (event) => hold(event.code, null));
window.addEventListener("blur", release);
document.addEventListener("visibilitychange", () => document.hidden && release());

document.querySelectorAll("[data-do]").forEach((b) => b.addEventListener("click", () => send(b.dataset.do, b.dataset.value)));
document.querySelectorAll("[data-key]").forEach((b) => holdWhilePressed(b, () => b.dataset.key));
for (const [id, code] of [["pause", "KeyP"], ["step", "KeyN"], ["restart", "KeyR"], ["record", "KeyG"]]) {
  $(id).addEventListener("click", () => view && shortcuts[code]());
}
$("speed").addEventListener("input", () => send("speed", Math.min(10 ** ($("speed").value / 10), about.speeds[1])));
$("sampling").addEventListener("input", () => send("sampling", Number($("sampling").value)));
$("moment").addEventListener("input", () => preview($("moment").value));
$("dreamfrom").addEventListener("click", () => send("dream_from", Number($("moment").value)));
// After a click the keys belong to the game again; who tabs to a button or slider keeps it.
document.addEventListener("click", (event) => event.detail && event.target.closest("button")?.blur());
document.addEventListener("pointerup", (event) => event.target.matches("input") && event.target.blur());

setInterval(() => { if (view && !stale && performance.now() > eventUntil && !view.over) showEvent(""); }, 200);
connect();
