// What the page knows, and how it follows the server: items come, actions leave, answers are taken over.
import { Wire } from "./wire.js";
import * as ranking from "./ranking.js";
import * as view from "./view.js";
import { hintFor } from "./hints.js";

const { find } = view;
export const { project, name, csrf } = document.body.dataset;
const LONG_PAUSE = 5 * 60; // seconds; the server leaves out longer pauses too

// config: {scale, flags, mode}; item: {task, kind, prompt, responses}; state: {groups, ratings, flags, note, actions};
// busy: between two items; ui: {mode: rank | rate | pair, current, armed, pair, next, bounds}, all of it for the eye.
export const now = { config: null, item: null, state: null, busy: true, ui: null };
export const acts = {}; // what a labeler can do, by name; label.js fills it

let clock = { seconds: 0, since: 0 };
let undoing = false;

export const wire = new Wire({ project, name, csrf }, {
  saving: () => mark("saving", "Saving"),
  saved: () => mark("saved", "Saved"),
  retrying: () => mark("retrying", "Not saved, trying again"),
  stranger: () => location.reload(),
  refused: async (error) => {
    undoing = false;
    await load();
    alarm(error.message);
  },
  recorded: (answer) => {
    view.drawProgress(answer.progress);
    if (!now.item || answer.state.task !== now.item.task || wire.pending) return;
    const undone = undoing;
    undoing = false;
    if (answer.state.status !== "open") return void load();
    adopt(answer.state);
    if (!undone) return;
    now.busy = false;
    startMode();
    redraw();
    say(`Undone. ${find("hint").textContent}`);
  },
});

function mark(kind, words) {
  const box = find("saved");
  if (box.dataset.state === kind) return;
  box.dataset.state = kind;
  box.textContent = words;
}

export const say = (words) => (find("spoken").textContent = words);
export const ready = () => now.item !== null && !now.busy;
// Where a response that is being compared can still go outlives a reload.
export const boundsKey = () => `rlhf-label:bounds:${now.item.task}`;
export const count = () => now.item.responses.length;
export const complete = () => !ranking.unranked(now.state.groups, count()).length;

export function alarm(words) {
  const hint = find("hint");
  hint.textContent = words;
  hint.classList.add("alarm");
}

// The state as the server has it; what is being typed stays.
function adopt(found) {
  const typing = now.state && now.item && found.task === now.item.task && find("note").value !== now.state.note;
  now.state = { ...found, groups: ranking.fromRanks(found.ranks) };
  if (!typing) find("note").value = found.note;
}

export async function load() {
  now.busy = true;
  find("item").classList.add("settling");
  show(await wire.asked("/api/task"));
}

function show(answer) {
  if (!answer) return;
  const first = now.item === null;
  view.drawProgress(answer.progress);
  find("item").classList.remove("settling");
  const over = answer.item === null;
  find("item").hidden = find("dock").hidden = over;
  find("done").hidden = !over;
  document.body.classList.toggle("over", over);
  if (over) {
    now.item = now.state = null;
    now.busy = false;
    view.drawDone(answer.progress);
    find("reopen").hidden = !(answer.progress.done + answer.progress.skipped);
    find("done-title").focus();
    return;
  }
  now.item = answer.item;
  now.state = null;
  adopt(answer.state);
  clock = { seconds: answer.state.seconds, since: Date.now() };
  view.drawItem(now.item, now.config, acts);
  for (const box of document.querySelectorAll(".flags")) box.open = localStorage.getItem("rlhf-label:flags") === "open";
  view.showPlain(localStorage.getItem("rlhf-label:plain") === "yes");
  startMode();
  now.busy = false;
  redraw();
  window.scrollTo(0, 0);
  if (!first) find("prompt-title").focus({ preventScroll: true });
  say(`${find("count").textContent}. ${find("hint").textContent}`);
}

function startMode() {
  const bounds = JSON.parse(sessionStorage.getItem(boundsKey()) || "null");
  const pairs = now.item.kind === "rank" && (now.config.mode === "pairwise" || (now.ui && now.ui.mode === "pair"));
  now.ui = { mode: "rank", current: null, armed: false, pair: [], next: null, bounds };
  if (complete()) restMode();
  else if (pairs) acts.enterPairs();
}

// What comes after the ranking: ratings, where there are any to give.
export function restMode() {
  const unrated = now.state.ratings.indexOf(null);
  now.ui.mode = now.item.kind === "rank" ? "rate" : "rank";
  now.ui.current = now.ui.mode === "rate" ? Math.max(unrated, 0) : now.ui.current;
}

export function redraw() {
  if (!now.item) return;
  view.drawState(now.item, now.state, now.ui, now.config, acts);
  const verdict = now.item.kind === "arena" || now.ui.mode === "pair";
  find("rail").hidden = verdict;
  find("verdicts").hidden = !verdict;
  find("pairwise").hidden = now.item.kind === "arena" || count() < 3;
  find("pairwise").setAttribute("aria-pressed", String(now.ui.mode === "pair"));
  find("submit").setAttribute("aria-disabled", String(!complete()));
  find("undo").setAttribute("aria-disabled", String(!now.state.actions && !now.item.earlier));
  if (verdict) {
    const [left, right] = now.item.kind === "arena" ? [0, 1] : now.ui.pair;
    find("first").firstElementChild.textContent = `${view.mark(now.item, left)} is better`;
    find("second").firstElementChild.textContent = `${view.mark(now.item, right)} is better`;
    const chosen = now.item.kind === "arena" && complete() ? ranking.toRanks(now.state.groups, 2) : null;
    const pressed = chosen && Math.sign(chosen[0] - chosen[1]);
    find("first").setAttribute("aria-pressed", String(pressed === -1));
    find("same").setAttribute("aria-pressed", String(pressed === 0));
    find("second").setAttribute("aria-pressed", String(pressed === 1));
  }
  const hint = find("hint");
  hint.classList.remove("alarm");
  hint.textContent = hintFor(now.item, now.state, now.ui, now.config);
}

// Seconds on this item.
export function spent() {
  return clock.seconds + Math.min((Date.now() - clock.since) / 1000, LONG_PAUSE);
}

export function send(action) {
  clock = { seconds: spent(), since: Date.now() };
  now.state.actions += 1;
  wire.send(now.item.task, action);
}

export function noteNow() {
  const text = find("note").value;
  if (!ready() || text === now.state.note) return;
  now.state.note = text;
  send({ kind: "note", text });
  redraw();
}

// The item as a whole.

export function submit() {
  if (!ready()) return;
  if (!complete()) {
    const missing = ranking.unranked(now.state.groups, count()).map((place) => view.mark(now.item, place));
    return alarm(
      now.item.kind === "arena" ? "Say first which response is better, or that they are the same."
      : `Not ranked yet: ${missing.join(", ")}.`,
    );
  }
  noteNow();
  finish({ kind: "submit" });
}

// The last action on this item; the next one comes once it is written down.
export function finish(action) {
  now.busy = true;
  find("item").classList.add("settling");
  send(action);
}

export async function undo() {
  if (now.busy) return;
  if (now.item) {
    noteNow();
    if (now.ui.bounds) {
      now.ui.bounds = null;
      acts.enterPairs();
      return redraw();
    }
    now.busy = true; // what follows is to stand on what is left
    await wire.flush();
    if (now.state.actions > 0) {
      undoing = true;
      return void wire.send(now.item.task, { kind: "undo" });
    }
  }
  now.busy = false;
  if (now.item && !now.item.earlier) return say("Nothing to undo.");
  await reopen();
}

export async function reopen() {
  now.busy = true;
  show(await wire.asked("/api/back", { task: now.item && now.item.task }));
  say("The item before, open again.");
}
