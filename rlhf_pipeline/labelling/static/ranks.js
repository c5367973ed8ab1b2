// Ranking: one after the other, by dragging and moving, or two responses at a time.
import * as ranking from "./ranking.js";
import * as view from "./view.js";
import { alarm, boundsKey, complete, count, now, ready, redraw, restMode, say, send } from "./flow.js";

const { find } = view;

export function setGroups(groups, place) {
  if (JSON.stringify(groups) === JSON.stringify(now.state.groups)) return redraw();
  const before = complete();
  now.state.groups = groups;
  now.ui.armed = false;
  if (place !== null) now.ui.current = place;
  send({ kind: "rank", ranks: ranking.toRanks(groups, count()) });
  if (!before && complete()) restMode();
  redraw();
  if (place !== null) say(ranking.inWords(groups, place, count(), view.nameOf(now.item)));
}

export function choose(place, onCard = false) {
  if (!ready() || place >= count() || now.ui.mode === "pair") return;
  if (now.item.kind === "arena") return verdict(place === 0 ? -1 : 1);
  if (ranking.groupOf(now.state.groups, place) < 0) {
    const last = now.state.groups.length - 1;
    const tied = now.ui.armed && last >= 0;
    return setGroups(tied ? ranking.joinGroup(now.state.groups, place, last) : [...now.state.groups, [place]], place);
  }
  if (!(onCard && now.ui.mode === "rate")) now.ui.mode = "rank";
  now.ui.current = place;
  now.ui.armed = false;
  redraw();
  say(ranking.inWords(now.state.groups, place, count(), view.nameOf(now.item)));
}

export function tie() {
  if (!ready()) return;
  if (now.item.kind === "arena" || now.ui.mode === "pair") return verdict(0);
  if (!complete()) {
    now.ui.armed = now.state.groups.length > 0 && !now.ui.armed;
    redraw();
    return say(find("hint").textContent);
  }
  if (now.ui.current === null) return;
  now.ui.mode = "rank";
  setGroups(ranking.tie(now.state.groups, now.ui.current), now.ui.current);
}

export function takeOut() {
  if (!ready() || now.ui.mode !== "rank" || now.item.kind === "arena") return;
  const last = now.state.groups.at(-1) || [];
  const chosen = now.ui.current !== null && ranking.groupOf(now.state.groups, now.ui.current) >= 0;
  const place = chosen ? now.ui.current : last.at(-1);
  if (place === undefined) return;
  setGroups(ranking.remove(now.state.groups, place), place);
}

export function drop(place, target) {
  if (!ready() || now.ui.mode === "pair" || now.item.kind === "arena") return;
  if (target.kind === "pool") return setGroups(ranking.remove(now.state.groups, place), place);
  const put = target.kind === "tie" ? ranking.joinGroup : ranking.insertAt;
  setGroups(put(now.state.groups, place, target.index), place);
}

// verdict: -1: the first of the two that are shown is better, 1: the second, 0: the same.
export function verdict(which) {
  if (!ready()) return;
  if (now.item.kind === "arena") {
    const name = view.nameOf(now.item);
    setGroups(which === 0 ? [[0, 1]] : which < 0 ? [[0], [1]] : [[1], [0]], null);
    return say(which === 0 ? "The same." : `${name(which < 0 ? 0 : 1)} is better.`);
  }
  const found = ranking.judged(now.state.groups, now.ui.next, now.ui.pair[0] === now.ui.next.place ? which : -which);
  const finished = now.ui.next;
  now.ui.bounds = found.bounds;
  if (JSON.stringify(found.groups) !== JSON.stringify(now.state.groups)) setGroups(found.groups, finished.place);
  if (!complete()) enterPairs();
  else sessionStorage.removeItem(boundsKey());
  redraw();
  say(find("hint").textContent);
}

export function enterPairs() {
  now.ui.next = ranking.nextPair(now.state.groups, count(), now.ui.bounds);
  now.ui.mode = now.ui.next ? "pair" : "rank";
  if (now.ui.next) now.ui.pair = [now.ui.next.place, now.ui.next.other].sort((a, b) => a - b);
  sessionStorage.setItem(boundsKey(), JSON.stringify(now.ui.bounds));
}

export function switchPairs() {
  if (!ready() || now.item.kind === "arena" || count() < 3) return;
  if (now.ui.mode === "pair") now.ui.mode = "rank";
  else if (complete()) return alarm("All responses are ranked. Undo, or take a rank away, to compare them two at a time.");
  else enterPairs();
  redraw();
  say(find("hint").textContent);
}
