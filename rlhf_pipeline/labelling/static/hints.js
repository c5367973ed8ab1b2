// One line that says what to do next: with keys where there are keys, with taps where there are none.
import { mark, nameOf } from "./view.js";
import { unranked } from "./ranking.js";
import { singleKeys } from "./keys.js";

const touch = matchMedia("(hover: none) and (pointer: coarse)");

export function hintFor(item, state, ui, config) {
  const keys = !touch.matches && singleKeys();
  const open = unranked(state.groups, item.responses.length);
  const ending = keys ? "Enter submits." : "Then submit.";
  if (item.kind === "arena") {
    if (open.length) return "Which response is better?";
    const verdict = state.groups.length === 1 ? "Both are the same." : `${nameOf(item)(state.groups[0][0])} is better.`;
    return `${verdict} ${ending}`;
  }
  if (ui.mode === "pair") return `Which of these two is better? ${left(open.length, "response")} to place.`;
  if (open.length) {
    const last = state.groups.length ? [...state.groups.at(-1)].sort().map((place) => mark(item, place)).join(" and ") : "";
    if (!last)
      return keys ? "Which is best? Press its number, or drag it here." : "Which is best? Choose its number.";
    if (ui.armed) return `The next one is tied with ${last}.`;
    return keys ? `Which is next best? For a tie with ${last}, press = first.` : "Next best? Drop it on another to tie.";
  }
  if (ui.mode === "rate") {
    const rest = state.ratings.filter((rating) => rating === null).length;
    if (!rest) return `Ranked and rated. ${ending}`;
    const range = `${config.scale.low} to ${config.scale.high}`;
    return keys ? `How good is ${mark(item, ui.current)}? Press ${range}. ${ending}` : `Now rate each response, ${range}.`;
  }
  if (!keys || ui.current === null) return `All ranked. ${ending}`;
  return `All ranked. ← → move ${mark(item, ui.current)}, = ties it. ${ending}`;
}

const left = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"} left`;
