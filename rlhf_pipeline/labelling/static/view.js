// Draws an item and its state. Texts come from the server as safe HTML; everything else is set as text.
import { groupOf, inWords, ordinal, toRanks, unranked } from "./ranking.js";

export const find = (id) => document.getElementById(id);
const cardShape = find("card").content;
const flagShape = find("flag").content;

export const nameOf = (item) => (place) =>
  item.kind === "arena" ? `Response ${"AB"[place]}` : `Response ${place + 1}`;
export const mark = (item, place) => (item.kind === "arena" ? "AB"[place] : String(place + 1));

// The turns of a text: a role where there is one, and Markdown or the plain text.
export function drawTurns(into, turns) {
  into.replaceChildren(
    ...turns.map((turn) => {
      const box = document.createElement("div");
      box.className = "turn";
      box.dir = "auto";
      if (turn.role) {
        const role = document.createElement("p");
        role.className = "role";
        role.textContent = turn.role;
        box.append(role);
      }
      const words = document.createElement("div");
      words.className = "marked";
      words.innerHTML = turn.html;
      const raw = document.createElement("div");
      raw.className = "raw";
      raw.textContent = turn.text;
      raw.hidden = true;
      box.append(words, raw);
      return box;
    }),
  );
}

export function showPlain(plain) {
  for (const words of document.querySelectorAll("#item .marked")) words.hidden = plain;
  for (const raw of document.querySelectorAll("#item .raw")) raw.hidden = !plain;
  find("plain").setAttribute("aria-pressed", String(plain));
}

export function drawItem(item, config, acts) {
  const name = nameOf(item);
  drawTurns(find("prompt"), item.prompt);
  const cards = item.responses.map((response, place) => {
    const card = cardShape.cloneNode(true).firstElementChild;
    card.dataset.place = place;
    const badge = card.querySelector(".badge");
    badge.textContent = mark(item, place);
    badge.addEventListener("click", () => acts.choose(place, true));
    badge.dataset.place = place;
    card.querySelector("h3").textContent = name(place);
    card.querySelector("h3").id = `title-${place}`;
    card.setAttribute("aria-labelledby", `title-${place}`);
    drawTurns(card.querySelector(".text"), response.turns);
    card.querySelector(".cut").hidden = response.ended;
    if (item.kind === "rank") {
      drawScale(card, place, config.scale, acts);
      if (config.flags.length) drawFlags(card, place, config.flags, name(place), acts);
    }
    return card;
  });
  const cardsBox = find("cards");
  cardsBox.dataset.count = item.responses.length;
  cardsBox.replaceChildren(...cards);
  find("item").classList.toggle("many", item.responses.length > 3);
}

function drawScale(card, place, scale, acts) {
  const box = card.querySelector(".likert");
  box.hidden = false;
  const [low, high] = box.querySelectorAll(".ends span");
  low.textContent = scale.low_words;
  high.textContent = scale.high_words;
  for (let value = scale.low; value <= scale.high; value++) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    Object.assign(input, { type: "radio", name: `rating-${place}`, value });
    const words = { [scale.low]: scale.low_words, [scale.high]: scale.high_words }[value];
    input.setAttribute("aria-label", words ? `${value}, ${words}` : String(value));
    input.addEventListener("click", () => acts.rate(place, value));
    const shown = document.createElement("span");
    shown.textContent = value;
    label.append(input, shown);
    box.querySelector(".scale").append(label);
  }
}

function drawFlags(card, place, flags, name, acts) {
  const box = card.querySelector(".flags");
  box.hidden = false;
  for (const flag of flags) {
    const row = flagShape.cloneNode(true).firstElementChild;
    row.dataset.flag = flag.key;
    row.setAttribute("aria-label", `${flag.text} (${name})`);
    row.querySelector("span").textContent = flag.text;
    for (const input of row.querySelectorAll("input")) {
      input.name = `flag-${place}-${flag.key}`;
      input.addEventListener("click", () => acts.flag(place, flag.key, input.value === "yes"));
    }
    box.querySelector(".rows").append(row);
  }
  box.querySelector(".rest").addEventListener("click", () => acts.noToRest(place));
  box.addEventListener("toggle", () => acts.unfolded(box.open));
}

// Chips are kept and moved, so that the one in focus stays in focus.
const chips = new Map();

function chipOf(item, place, acts) {
  const key = `${item.kind}-${place}`;
  if (!chips.has(key)) {
    const chip = document.createElement("button");
    chip.type = "button";
    chip.className = "chip";
    chip.textContent = mark(item, place);
    chip.dataset.place = place;
    chip.addEventListener("click", () => acts.choose(place));
    chips.set(key, chip);
  }
  return chips.get(key);
}

export function drawState(item, state, ui, config, acts) {
  const count = item.responses.length;
  const name = nameOf(item);
  const ranks = toRanks(state.groups, count);
  const focused = document.activeElement;
  const chip = (place) => {
    const made = chipOf(item, place, acts);
    made.classList.toggle("current", place === ui.current && ui.mode === "rank");
    made.setAttribute("aria-label", inWords(state.groups, place, count, name));
    return made;
  };
  find("groups").replaceChildren(
    ...state.groups.map((group) => {
      const box = document.createElement("li");
      box.classList.toggle("tied", group.length > 1);
      box.append(...[...group].sort((a, b) => a - b).map(chip));
      return box;
    }),
  );
  find("pool").replaceChildren(...unranked(state.groups, count).map(chip));
  if (focused && focused.isConnected && focused !== document.activeElement) focused.focus({ preventScroll: true });

  for (const card of find("cards").children) {
    const place = Number(card.dataset.place);
    const group = state.groups[groupOf(state.groups, place)] || [];
    card.classList.toggle("ranked", ranks[place] !== null && item.kind === "rank");
    card.classList.toggle("current", place === ui.current && item.kind === "rank" && ui.mode !== "pair");
    card.hidden = ui.mode === "pair" && item.kind === "rank" && !ui.pair.includes(place);
    card.querySelector(".rank").textContent =
      item.kind === "arena" ? "" : group.length ? `${ordinal(ranks[place])}${group.length > 1 ? ", tied" : ""}` : "not ranked";
    card.querySelector(".badge").setAttribute("aria-label", inWords(state.groups, place, count, name));
    for (const input of card.querySelectorAll(".scale input")) input.checked = Number(input.value) === state.ratings[place];
    for (const row of card.querySelectorAll(".flag")) {
      const value = state.flags[place][row.dataset.flag];
      for (const input of row.querySelectorAll("input")) input.checked = value === (input.value === "yes");
    }
    const answered = Object.keys(state.flags[place]).length;
    card.querySelector(".answered").textContent = answered ? `(${answered} of ${config.flags.length})` : "";
    card.querySelector(".rest").hidden = answered === config.flags.length;
  }
}

// The scale that the next key grades, in view.
export function showScale(place) {
  const scale = find("cards").children[place].querySelector(".likert");
  scale.scrollIntoView({ block: "nearest" });
}

// progress: {done, skipped, left, seconds_per_item}
export function drawProgress(progress) {
  const past = progress.done + progress.skipped;
  const all = past + progress.left;
  find("bar").max = Math.max(all, 1);
  find("bar").value = past;
  find("count").textContent = progress.left ? `Item ${past + 1} of ${all}` : `${past} of ${all}`;
  const pace = progress.seconds_per_item;
  find("pace").textContent = pace && progress.left ? `${time(pace)} each, ${time(pace * progress.left)} left` : "";
}

export function time(seconds) {
  if (seconds < 60) return `${Math.round(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function drawDone(progress) {
  const sums = [["Done", progress.done], ["Skipped", progress.skipped]];
  if (progress.seconds_per_item) sums.push(["Per item", time(progress.seconds_per_item)]);
  find("sums").replaceChildren(
    ...sums.map(([term, figure]) => {
      const row = document.createElement("div");
      row.append(document.createElement("dt"), document.createElement("dd"));
      row.firstChild.textContent = term;
      row.lastChild.textContent = figure;
      return row;
    }),
  );
}
