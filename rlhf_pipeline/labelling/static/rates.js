// Ratings and yes/no questions.
import * as view from "./view.js";
import { now, ready, redraw, say, send } from "./flow.js";

const { find } = view;

export function rate(place, value) {
  if (!ready()) return;
  now.state.ratings[place] = now.state.ratings[place] === value ? null : value;
  now.ui.current = place;
  send({ kind: "rate", response: place, value: now.state.ratings[place] });
  redraw();
}

export function rateByKey(value) {
  const place = now.ui.current;
  if (now.state.ratings[place] !== value) rate(place, value);
  const rest = [...now.state.ratings.keys()].filter((other) => now.state.ratings[other] === null);
  if (rest.length) now.ui.current = rest.find((other) => other > place) ?? rest[0];
  redraw();
  say(`${view.nameOf(now.item)(place)} rated ${value}. ${find("hint").textContent}`);
}

export function flag(place, key, value) {
  if (!ready()) return;
  const given = { ...now.state.flags[place] };
  if (given[key] === value) delete given[key];
  else given[key] = value;
  now.state.flags = now.state.flags.map((old, at) => (at === place ? given : old));
  send({ kind: "flag", response: place, flag: key, value: given[key] ?? null });
  redraw();
}

export function noToRest(place) {
  for (const { key } of now.config.flags) if (!(key in now.state.flags[place])) flag(place, key, false);
  say("The rest answered with no.");
}

export function answer(row, value) {
  const place = Number(row.closest(".card").dataset.place);
  if (now.state.flags[place][row.dataset.flag] !== value) flag(place, row.dataset.flag, value);
  const next = row.nextElementSibling || row;
  (next.querySelector("input:checked") || next.querySelector("input")).focus();
}

export function openFlags() {
  if (!ready() || !now.config.flags.length || now.item.kind === "arena") return;
  const card = find("cards").children[now.ui.current ?? 0];
  const box = card.querySelector(".flags");
  box.open = true;
  (box.querySelector(".flag:not(:has(:checked)) input") || box.querySelector("input")).focus();
}

export const unfolded = (open) => localStorage.setItem("rlhf-label:flags", open ? "open" : "closed");
