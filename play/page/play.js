"use strict";
// The page of `python -m play`. It sends commands as JSON, {"do": name, "value": ...}; what it gets is binary: kind
// (1 byte), the length of a header (4 bytes, little endian), the header (JSON), bytes. The game runs on the server.

const KINDS = ["hello", "view", "preview", "film", "error"];
const BELOW = [0, 83, 138], ABOVE = [200, 80, 0]; // colours of a latent's values, white between them
const CODES = {
  ArrowUp: "up", ArrowDown: "down", ArrowLeft: "left", ArrowRight: "right", Space: "fire",
  KeyW: "up", KeyS: "down", KeyA: "left", KeyD: "right",
};
const SIGNS = { up: "↑", down: "↓", left: "←", right: "→", fire: "Space" };
const $ = (id) => document.getElementById(id);

let socket = null, about = null, view = null, tries = 0, broken = false, started = false, stale = false;
let times = []; // when the last steps came, for the rate
let previewBusy = false, previewWanted = null;

// --- the connection

function connect() {
  const address = new URL("socket", location.href);
  address.protocol = address.protocol === "https:" ? "wss:" : "ws:";
  socket = new WebSocket(address);
  socket.binaryType = "arraybuffer";
  socket.onmessage = (event) => receive(event.data);
  socket.onclose = async () => {
    held.clear();
    previewBusy = false;
    if (broken) return;
    tries += 1;
    const answer = about ? null : await fetch("socket", { method: "POST" }).catch(() => null);
    if (answer && answer.status >= 400) return say(await answer.text()); // why the socket is refused
    if (tries > 20) return say("No connection. Is python -m play still running? Then reload this page.");
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
    [about, view, tries, started] = [header, null, 0, false];
    say("");
    introduce();
  },
  view(header, bytes) {
    let from = 0;
    for (const [name, size] of Object.entries(header.parts)) {
      header.parts[name] = bytes.subarray(from, from + size);
      from += size;
    }
    remember(header);
    if (header.length !== view?.length) drawBar(header.length);
    view = header;
    started ||= !view.paused;
    if (!stale) requestAnimationFrame(draw);
    stale = true;
  },
  preview(header, bytes) {
    previewBusy = false;
    paint($("preview"), 64, 64, pixel(bytes));
    if (previewWanted !== null) preview(previewWanted);
  },
  film(header, bytes) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([bytes], { type: "image/gif" }));
    link.download = `${about.game}.gif`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    say(`Recorded ${header.frames} steps: ${about.game}.gif`, 6000);
  },
  error(header) {
    broken = true;
    say(`Something went wrong: ${header.text}. Reload the page to start again.`);
  },
};

function say(text, milliseconds = 0) {
  $("message").textContent = text;
  $("message").hidden = !text;
  if (milliseconds) setTimeout(() => $("message").textContent === text && say(""), milliseconds);
}

// --- what is shown

function element(name, text, where, className = "") {
  const made = document.createElement(name);
  [made.textContent, made.className] = [text, className];
  where.append(made);
  return made;
}

function says(key) { // what a key does in this game: "UP", but in Pong, where RIGHT moves up, "up (RIGHT)"
  const meaning = about.keys[key] ?? "";
  return meaning.toLowerCase() === key ? meaning : `${key} (${meaning})`;
}

function introduce() {
  $("name").textContent = about.game;
  $("about").textContent = about.about + (about.chance ? ". Actions sometimes stick, and last for a random time" : "");
  $("actions").replaceChildren();
  about.actions.forEach((name, i) => {
    const button = element("button", "", element("li", "", $("actions")));
    [button.type, button.dataset.action] = ["button", i];
    element("span", `${i} ${name}`, button, "name");
    element("span", "", button);
    holdWhilePressed(button, () => `action ${i}`);
  });
  $("actions").classList.toggle("many", about.actions.length > 9);
  const known = Object.entries(about.keys);
  $("insides").open = !known.length; // actions without keys are chosen there
  $("keys").replaceChildren();
  const digits = `0–${Math.min(9, about.actions.length - 1)}`;
  for (const [keys, text] of [...known.map(([key]) => [SIGNS[key], says(key)]), [digits, "action"],
    ["P", "pause"], ["N", "one step"], ["R", "new start"], ["M", "game or dream"], ["T", "who plays"], ["G", "record"]]) {
    const span = element("span", "", $("keys"));
    element("kbd", keys, span);
    span.append(` ${text}`);
  }
  document.querySelectorAll("[data-key]").forEach((button) => {
    button.hidden = !(button.dataset.key in about.keys);
    button.querySelector("small")?.remove();
    element("small", says(button.dataset.key), button);
  });
  $("cross").classList.toggle("narrow", !("left" in about.keys || "right" in about.keys));
  $("screen").hidden = !about.screen;
  [$("length").min, $("length").max] = about.lengths;
  $("sampling").max = about.max_sampling;
  $("moment").max = about.replay - 1;
  preview(0);
}

function remember(next) {
  const lead = next.game ?? next.dream, before = view && (view.game ?? view.dream);
  if (next.start !== null && next.start !== view?.start) {
    $("moment").value = next.start;
    preview(next.start);
  }
  for (const name of ["game", "dream"]) {
    const now = next[name], then = view?.[name], words = [];
    if (!now || (then && then.step === now.step && then.done === now.done)) continue;
    if (now.step && now.reward) words.push(`${now.reward > 0 ? "+" : "−"}${Math.abs(now.reward)}`);
    if (now.over) words.push(name === "game" ? "game over" : "the dream says: over");
    else if (now.end) words.push("life lost");
    else if (now.done) words.push("begins anew");
    showEvent(name, words.join(" · "), now.done ? 3000 : 800, then && now.step < then.step);
  }
  if (lead.step !== before?.step) times = [...times, performance.now()].slice(-31);
}

const timers = {};
function showEvent(name, text, milliseconds, anew) {
  const box = $(`${name}event`);
  if (!text && timers[name] && !anew) return; // what was said stays for its time
  clearTimeout(timers[name]);
  box.replaceChildren();
  timers[name] = text ? setTimeout(() => { timers[name] = 0; box.replaceChildren(); }, milliseconds) : 0;
  if (text) element("span", text, box);
}

function draw() {
  stale = false;
  const { parts } = view, [channels, high, wide] = about.latent_shape;
  document.body.className = view.mode;
  if (parts.screen) paint($("game"), about.screen[1], about.screen[0], pixel(parts.screen));
  else if (parts.game) paint($("game"), 64, 64, pixel(parts.game));
  if (parts.dream) paint($("dream"), 64, 64, pixel(parts.dream));
  const columns = Math.ceil(Math.sqrt(channels)), rows = Math.ceil(channels / columns);
  const values = new Int8Array(parts.latents.buffer, parts.latents.byteOffset, parts.latents.length);
  const width = columns * (wide + 1) - 1;
  paint($("latents"), width, rows * (high + 1) - 1, (i) => { // tiles with a line between them
    const x = i % width, y = Math.floor(i / width), channel = columns * Math.floor(y / (high + 1)) + Math.floor(x / (wide + 1));
    if (x % (wide + 1) === wide || y % (high + 1) === high || channel >= channels) return [120, 120, 120];
    return shade(values[(channel * high + (y % (high + 1))) * wide + (x % (wide + 1))]);
  });
  drawWords();
}

function drawWords() {
  const percent = (x) => (x === null ? "–" : x < 0.1 ? `${(100 * x).toFixed(1)}%` : `${(100 * x).toFixed(0)}%`);
  const points = (scene) => signed(scene.score.toLocaleString("en"));
  const who = view.player === "agent" ? "the agent plays · " : "";
  if (view.game) $("gamestate").textContent = `${who}score ${points(view.game)}`;
  if (view.dream) {
    $("dreamstep").textContent = `${view.dream.step} of ${view.length}`;
    $("dreamstate").textContent = `${view.game ? "" : who}points ${points(view.dream)}`;
    $("trust").firstChild.style.left = `${Math.min(100, (100 * view.dream.step) / view.length)}%`;
    $("trusttext").textContent = view.dream.step ? trust(view.dream.step)[1] : "sees a real frame";
  }
  const finger = matchMedia("(pointer: coarse)").matches;
  const key = Object.keys(about.keys).length === 0 ? "a number key" : finger ? "an arrow button" : "an arrow key";
  $("overlay").hidden = !view.paused;
  $("overlay").firstChild.textContent = started ? "PAUSED" : `Press ${key}`;
  $("overlay").lastChild.textContent = started ? (finger ? "" : "P goes on")
    : view.mode === "both" ? "the same keys steer the game and its dream" : "";
  const [minus, , plus] = view.reward_probs, lead = view.game ?? view.dream;
  $("value").textContent = view.value === null ? "–" : signed(view.value.toFixed(2));
  $("guess").textContent = lead.step ? signed((plus - minus).toFixed(2)) : "–";
  $("ending").textContent = lead.step ? percent(view.end_prob) : "–";
  const seconds = (times.at(-1) - times[0]) / 1000;
  $("rate").textContent = view.paused || times.length < 5 ? "–" : ((times.length - 1) / seconds).toFixed(1);
  document.querySelectorAll("[data-mode]").forEach((b) =>
    b.setAttribute("aria-pressed", b.dataset.mode === `${view.mode} ${view.player}`));
  document.querySelectorAll("#actions button").forEach((button, i) => {
    const share = percent(view.probs[i]);
    button.lastChild.textContent = share;
    button.style.background = `linear-gradient(90deg, var(--bar) ${share}, transparent ${share})`;
    button.classList.toggle("taken", view.action === i);
  });
  $("pause").textContent = !view.paused ? "Pause" : started ? "Go on" : "Start";
  $("screen").textContent = view.screen ? "the agent's picture" : "Atari's own picture";
  $("record").classList.toggle("on", view.recording !== null);
  $("record").textContent = view.recording === null ? "Record GIF" : `Stop (${(view.recording / about.fps).toFixed(1)} s)`;
  setSlider("speed", Math.round(10 * Math.log10(view.speed)), `× ${view.speed.toFixed(view.speed < 1 ? 2 : 1)}`);
  setSlider("sampling", view.sampling, view.sampling);
  setSlider("length", view.length, `${view.length} steps`);
}

function trust(step) { // by the error measured so many steps ahead, as a share of a still picture's: [colour, words]
  const error = about.open_loop[step - 1] ?? null, share = () => `${error.toFixed(2)} of a still picture's error`;
  if (error === null) return ["transparent", "error not measured"];
  if (error > 1) return ["#999", "worse than a still picture"];
  return error < 0.5 ? ["#009e73", `good: ${share()}`] : ["#f0e442", `fair: ${share()}`];
}

function drawBar(length) { // the trust in each step of a dream
  const stops = Array.from({ length }, (_, i) => `${trust(i + 1)[0]} ${(100 * i) / length}% ${(100 * (i + 1)) / length}%`);
  $("trust").style.background = `linear-gradient(90deg, ${stops.join(", ")})`;
  $("trusttext").title = "prediction error / error of predicting no change, measured on other play";
}

function signed(text) { // with a minus sign that is as wide as a digit; -0.00 is 0.00
  return /^-[0.]*$/.test(text) ? text.slice(1) : text.replace("-", "−");
}

function setSlider(id, value, text) {
  if (!$(id).matches(":active")) $(id).value = value;
  $(`${id}out`).textContent = text;
}

function shade(value) { // int8 -> colour
  const strength = Math.abs(value) / 127, colour = value < 0 ? BELOW : ABOVE;
  return colour.map((c) => 255 + strength * (c - 255));
}

const pixel = (bytes) => (i) => [bytes[3 * i], bytes[3 * i + 1], bytes[3 * i + 2]];

function paint(canvas, width, height, colour) { // colour(i) of the i-th pixel, row by row
  if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
  const context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let i = 0; i < width * height; i++) image.data.set([...colour(i), 255], 4 * i);
  context.putImageData(image, 0, 0);
}

// --- keys, touches, buttons

const held = new Map(); // what holds a key down (a keyboard code, a pointer) -> the key, or "action 3"

function hold(source, key) {
  if (key === null ? !held.delete(source) : held.get(source) === key) return;
  if (key !== null) held.set(source, key);
  const keys = [...new Set(held.values())], chosen = keys.filter((k) => k.startsWith("action ")).at(-1);
  send("hold", { keys: keys.filter((k) => !k.startsWith("action ")), action: chosen ? Number(chosen.slice(7)) : null });
  if (key === null || !view) return;
  if (view.player === "agent") mode(`${view.mode} human`); // whoever presses a key takes over
  if (!started) send("pause", false); // the still picture begins to move
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
  $("momentout").textContent = `${Number(index).toLocaleString("en")} (0 to ${(about.replay - 1).toLocaleString("en")})`;
  [previewWanted, previewBusy] = previewBusy ? [index, true] : [null, true];
  if (previewWanted === null) send("preview", Number(index));
}

function mode(value) {
  send("mode", value.split(" "));
  if (value.endsWith("agent") && !started) send("pause", false); // nobody will press a key
}

const next = { both: "game", game: "dream", dream: "both" };
const shortcuts = {
  KeyP: () => send("pause", !view.paused),
  KeyN: () => send("step"),
  KeyM: () => mode(`${next[view.mode]} ${view.player}`),
  KeyT: () => mode(`${view.mode} ${view.player === "human" ? "agent" : "human"}`),
  KeyR: () => send("restart"),
  KeyG: () => send("record", view.recording === null),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !view) return;
  const target = event.target, code = event.code;
  if (target.matches("input") && code.startsWith("Arrow")) return; // a slider that has been tabbed to
  if (target.matches("button, summary, a") && (code === "Space" || code === "Enter")) return;
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

document.querySelectorAll("[data-mode]").forEach((b) => b.addEventListener("click", () => mode(b.dataset.mode)));
document.querySelectorAll("[data-key]").forEach((b) => holdWhilePressed(b, () => b.dataset.key));
for (const [id, code] of [["pause", "KeyP"], ["step", "KeyN"], ["restart", "KeyR"], ["record", "KeyG"]]) {
  $(id).addEventListener("click", () => view && shortcuts[code]());
}
$("screen").addEventListener("click", () => send("screen", !view.screen));
$("speed").addEventListener("input", () => send("speed", Math.min(10 ** ($("speed").value / 10), about.speeds[1])));
for (const id of ["sampling", "length"]) $(id).addEventListener("input", () => send(id, Number($(id).value)));
$("moment").addEventListener("input", () => preview($("moment").value));
$("dreamfrom").addEventListener("click", () => {
  send("dream_from", Number($("moment").value));
  scrollTo(0, 0);
});
document.querySelector("main").addEventListener("click", (event) =>
  view && !started && !event.target.closest("button") && send("pause", false));
// After a click the keys belong to the game again; who tabs to a button or slider keeps it.
document.addEventListener("click", (event) => event.detail && event.target.closest("button, summary")?.blur());
document.addEventListener("pointerup", (event) => event.target.matches("input") && event.target.blur());
connect();
