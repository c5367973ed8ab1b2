// The page of an item: buttons, keys and dialogs, each tied to what it does.
import { call } from "./wire.js";
import * as flow from "./flow.js";
import * as ranks from "./ranks.js";
import * as rates from "./rates.js";
import { groupOf, move } from "./ranking.js";
import { find, showPlain, showScale } from "./view.js";
import { enableDragging } from "./drag.js";
import { enableKeys } from "./keys.js";

const { acts, now, ready, redraw, say, submit, undo, reopen, noteNow, wire } = flow;
const { choose, drop, switchPairs, takeOut, tie, verdict } = ranks;
const NOTE_PAUSE = 900; // milliseconds without typing before a note is saved
let noteTimer = null;
let cameFrom = document.body; // had the focus before the instructions

Object.assign(acts, ranks, rates);

function skip() {
  if (!ready()) return;
  noteNow();
  find("skipping").showModal();
}

find("skipping").addEventListener("close", () => {
  const form = find("skipping").querySelector("form");
  const words = [form.elements.reason.value, form.elements.why.value.trim()].filter(Boolean).join(": ");
  const agreed = find("skipping").returnValue === "skip";
  find("skipping").returnValue = "";
  if (!agreed || !ready()) return;
  flow.finish({ kind: "skip", reason: words || "Another reason" });
  form.reset();
});

// Keys, buttons, the clock.

setInterval(() => {
  if (!now.item || document.hidden) return;
  const seconds = Math.floor(flow.spent());
  find("clock").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
}, 1000);

function toggleInstructions(open = find("instructions").hidden) {
  if (find("show-instructions").hidden) return;
  find("instructions").hidden = !open;
  document.querySelector(".frame").classList.toggle("split", open);
  find("show-instructions").setAttribute("aria-expanded", String(open));
  if (!open) return void (cameFrom === document.body ? document.activeElement.blur() : cameFrom.focus({ preventScroll: true }));
  cameFrom = document.activeElement;
  find("instructions-title").focus();
}

function plain() {
  const wanted = find("plain").getAttribute("aria-pressed") !== "true";
  localStorage.setItem("rlhf-label:plain", wanted ? "yes" : "no");
  showPlain(wanted);
}

async function leave() {
  noteNow();
  await wire.flush();
  await call("/api/leave", {}, wire.csrf).catch(() => null);
  location.reload();
}

function follow() {
  if (now.ui.mode === "rate") showScale(now.ui.current);
}

enableDragging(drop);
enableKeys({
  undo, tie, takeOut, submit, skip, plain, redraw, switchPairs,
  openFlags: rates.openFlags,
  answer: rates.answer,
  instructions: () => toggleInstructions(),
  keys: () => find("keys").showModal(),
  escape: () => (find("instructions").hidden ? document.activeElement.blur() : toggleInstructions(false)),
  switchMode: () => {
    if (!ready() || now.item.kind === "arena" || now.ui.mode === "pair") return;
    now.ui.mode = now.ui.mode === "rate" ? "rank" : "rate";
    now.ui.current ??= Math.max(now.state.ratings.indexOf(null), 0);
    redraw();
    say(find("hint").textContent);
  },
  digit: (number) => {
    if (!ready()) return false;
    if (now.item.kind === "arena" || now.ui.mode === "pair") {
      const which = { 1: -1, 2: 1, 0: 0 }[number];
      if (which !== undefined) verdict(which);
    } else if (now.ui.mode === "rate") {
      const value = number === 0 ? 10 : number;
      if (value >= now.config.scale.low && value <= now.config.scale.high) rates.rateByKey(value);
    } else if (number > 0) choose(number - 1);
    follow();
    return true;
  },
  arrow: (step, place) => {
    if (!ready()) return false;
    if (now.item.kind === "arena" || now.ui.mode === "pair") verdict(step);
    else if (place === null && now.ui.mode === "rate") {
      now.ui.current = (now.ui.current + step + flow.count()) % flow.count();
      redraw();
      follow();
    } else {
      const moved = place ?? now.ui.current;
      if (moved === null || groupOf(now.state.groups, moved) < 0) return false;
      now.ui.mode = "rank";
      ranks.setGroups(move(now.state.groups, moved, step), moved);
    }
    return true;
  },
});
for (const [id, act] of Object.entries({
  undo, submit, skip, plain, reopen, leave,
  pairwise: switchPairs,
  "show-keys": () => find("keys").showModal(),
  "show-instructions": () => toggleInstructions(),
  "hide-instructions": () => toggleInstructions(false),
  first: () => verdict(-1), same: () => verdict(0), second: () => verdict(1),
})) find(id).addEventListener("click", act);
for (const button of document.querySelectorAll("dialog .close"))
  button.addEventListener("click", () => button.closest("dialog").close());
find("note").addEventListener("input", () => {
  clearTimeout(noteTimer);
  noteTimer = setTimeout(noteNow, NOTE_PAUSE);
});
find("note").addEventListener("blur", noteNow);
window.addEventListener("pagehide", noteNow);
window.addEventListener("beforeunload", (event) => {
  noteNow();
  if (wire.pending && wire.away) event.preventDefault();
});

now.config = await wire.asked("/api/project");
await wire.flush();
await flow.load();
