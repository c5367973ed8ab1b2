// Dragging a chip to its place in the ranking, with a mouse, a pen or a finger. The keyboard's equal is in keys.js.
import { find } from "./view.js";

const FAR = 6; // pixels before a press becomes a drag
const NEAR = 48; // pixels around the rail that still count as the rail

const within = (box, x, y, margin = 0) =>
  x >= box.left - margin && x <= box.right + margin && y >= box.top - margin && y <= box.bottom + margin;

function chipsBox(group) {
  const boxes = [...group.children].map((chip) => chip.getBoundingClientRect());
  const last = boxes[boxes.length - 1];
  return { left: boxes[0].left, right: last.right, top: boxes[0].top, bottom: boxes[0].bottom };
}

// Where a chip would go if it were dropped now: {kind: "pool"}, {kind: "tie", index}, {kind: "insert", index} or null.
export function targetAt(x, y) {
  const pool = find("pool");
  if (within(pool.getBoundingClientRect(), x, y, 4)) return { kind: "pool" };
  if (!within(find("rail").getBoundingClientRect(), x, y, NEAR)) return null;
  const groups = [...find("groups").children];
  if (!groups.length) return { kind: "insert", index: 0 };
  const boxes = groups.map(chipsBox);
  const distance = (box) =>
    Math.hypot(Math.max(box.left - x, 0, x - box.right), 4 * Math.max(box.top - y, 0, y - box.bottom));
  const index = boxes.reduce((best, box, at) => (distance(box) < distance(boxes[best]) ? at : best), 0);
  const share = (x - boxes[index].left) / (boxes[index].right - boxes[index].left);
  if (share > 0.25 && share < 0.75) return { kind: "tie", index };
  return { kind: "insert", index: share >= 0.75 ? index + 1 : index };
}

function showTarget(target) {
  const groups = find("groups");
  for (const group of groups.children) group.classList.remove("target", "before", "behind");
  find("pool").classList.toggle("target", target !== null && target.kind === "pool");
  if (!target || target.kind === "pool") return;
  if (target.kind === "tie") groups.children[target.index].classList.add("target");
  else if (target.index < groups.children.length) groups.children[target.index].classList.add("before");
  else if (groups.children.length) groups.lastElementChild.classList.add("behind");
}

// drop(place, target) is called once for each drag that ends on a target.
export function enableDragging(drop) {
  let held = null;

  const end = () => {
    if (!held) return;
    if (held.ghost) held.ghost.remove();
    held.chip.classList.remove("away");
    find("rail").classList.remove("dragging");
    showTarget(null);
    held = null;
  };

  document.addEventListener("pointerdown", (event) => {
    const chip = event.target.closest && event.target.closest(".chip");
    if (!chip || event.button !== 0) return;
    // A finger on a response scrolls the page; the chips at the lower edge can be dragged by it.
    if (chip.classList.contains("badge") && event.pointerType !== "mouse") return;
    held = { chip, place: Number(chip.dataset.place), x: event.clientX, y: event.clientY, ghost: null };
  });

  document.addEventListener("pointermove", (event) => {
    if (!held) return;
    const { clientX: x, clientY: y } = event;
    if (!held.ghost) {
      if (find("rail").hidden || Math.hypot(x - held.x, y - held.y) < FAR) return;
      held.ghost = held.chip.cloneNode(true);
      held.ghost.classList.add("lifted");
      held.ghost.setAttribute("aria-hidden", "true");
      held.ghost.tabIndex = -1;
      document.body.append(held.ghost);
      held.chip.classList.add("away");
      find("rail").classList.add("dragging");
    }
    held.ghost.style.left = `${x - held.ghost.offsetWidth / 2}px`;
    held.ghost.style.top = `${y - held.ghost.offsetHeight / 2}px`;
    showTarget(targetAt(x, y));
  });

  document.addEventListener("pointerup", (event) => {
    if (!held || !held.ghost) return void end();
    const { place } = held;
    const target = targetAt(event.clientX, event.clientY);
    end();
    // The click that the browser makes of the same press is not one.
    const swallow = (click) => click.stopPropagation();
    document.addEventListener("click", swallow, { capture: true, once: true });
    setTimeout(() => document.removeEventListener("click", swallow, { capture: true }));
    if (target) drop(place, target);
  });
  document.addEventListener("pointercancel", end);
  document.addEventListener("keydown", (event) => event.key === "Escape" && end());
}
