// A ranking as groups of places, best first: [[1], [0, 3]] ranks place 1 first and places 0 and 3, tied, second.
// Every function returns a new ranking. Places that stand in no group are not ranked yet.

export function fromRanks(ranks) {
  const levels = [...new Set(ranks.filter((rank) => rank !== null))].sort((a, b) => a - b);
  return levels.map((level) => ranks.flatMap((rank, place) => (rank === level ? [place] : [])));
}

export function toRanks(groups, count) {
  const ranks = Array(count).fill(null);
  groups.forEach((group, index) => group.forEach((place) => (ranks[place] = index + 1)));
  return ranks;
}

export const unranked = (groups, count) =>
  [...Array(count).keys()].filter((place) => !groups.some((group) => group.includes(place)));

export const groupOf = (groups, place) => groups.findIndex((group) => group.includes(place));

export const remove = (groups, place) =>
  groups.map((group) => group.filter((other) => other !== place)).filter((group) => group.length);

// The place alone in a group of its own, in front of the group that `index` counts in `groups` as they are now.
export function insertAt(groups, place, index) {
  const before = remove(groups.slice(0, index), place);
  return [...before, [place], ...remove(groups.slice(index), place)];
}

// The place tied with the group that `index` counts in `groups` as they are now.
export function joinGroup(groups, place, index) {
  const joined = groups.map((group, at) => {
    const others = group.filter((other) => other !== place);
    return at === index ? [...others, place] : others;
  });
  return joined.filter((group) => group.length);
}

// One step better (-1) or worse (+1): out of a tie first, then past the neighbour.
export function move(groups, place, step) {
  const index = groupOf(groups, place);
  if (index < 0) return groups;
  if (groups[index].length > 1) return insertTied(groups, place, index, step);
  const neighbour = index + step;
  if (neighbour < 0 || neighbour >= groups.length) return groups;
  const moved = [...groups];
  [moved[index], moved[neighbour]] = [moved[neighbour], moved[index]];
  return moved;
}

function insertTied(groups, place, index, step) {
  const others = groups[index].filter((other) => other !== place);
  const pair = step < 0 ? [[place], others] : [others, [place]];
  return [...groups.slice(0, index), ...pair, ...groups.slice(index + 1)];
}

// A tie with the next better group (for the best: with the next worse); a place that is tied leaves its tie.
export function tie(groups, place) {
  const index = groupOf(groups, place);
  if (index < 0) return groups;
  if (groups[index].length > 1) return insertTied(groups, place, index, 1);
  if (groups.length === 1) return groups;
  return joinGroup(groups, place, index > 0 ? index - 1 : 1);
}

export function ordinal(number) {
  const tens = number % 100;
  const ending = tens > 10 && tens < 14 ? "th" : { 1: "st", 2: "nd", 3: "rd" }[number % 10] || "th";
  return `${number}${ending}`;
}

// "Response 2 is 1st of 4, tied with 3."
export function inWords(groups, place, count, name) {
  const index = groupOf(groups, place);
  if (index < 0) return `${name(place)} is not ranked.`;
  const others = groups[index].filter((other) => other !== place).map(name);
  const tied = others.length ? `, tied with ${others.join(" and ")}` : "";
  return `${name(place)} is ${ordinal(index + 1)} of ${count}${tied}.`;
}

// Pairwise ranking by binary insertion: the next two places to compare, or null when all are ranked.
// bounds: the part of the ranking where the new place still can go, {place, low, high}, or null for a new place.
export function nextPair(groups, count, bounds) {
  const rest = unranked(groups, count);
  if (!groups.length) return { place: rest[1], other: rest[0], start: rest[0], low: 0, high: 1 };
  if (!rest.length) return null;
  const place = bounds && rest.includes(bounds.place) ? bounds.place : rest[0];
  const known = bounds && bounds.place === place && bounds.high <= groups.length;
  const [low, high] = known ? [bounds.low, bounds.high] : [0, groups.length];
  return { place, other: groups[(low + high) >> 1][0], start: null, low, high };
}

// What a verdict on that pair amounts to: verdict < 0: `place` is better, > 0: worse, 0: the same.
export function judged(groups, pair, verdict) {
  const known = pair.start === null ? groups : [[pair.start]];
  const middle = (pair.low + pair.high) >> 1;
  if (verdict === 0) return { groups: joinGroup(known, pair.place, middle), bounds: null };
  const [low, high] = verdict < 0 ? [pair.low, middle] : [middle + 1, pair.high];
  if (low < high) return { groups: known, bounds: { place: pair.place, low, high } };
  return { groups: insertAt(known, pair.place, low), bounds: null };
}
