// The keyboard. Single keys can be switched off, because they get in the way of speech input.
import { find } from "./view.js";

const SWITCH = "rlhf-label:single-keys";
export const singleKeys = () => localStorage.getItem(SWITCH) !== "off";

const isText = (element) =>
  element.tagName === "TEXTAREA" || (element.tagName === "INPUT" && !["radio", "checkbox"].includes(element.type));
const isPressed = (element) => ["BUTTON", "SUMMARY", "A"].includes(element.tagName);

// acts: what the page can do; `digit` and `arrow` say whether they used the key.
export function enableKeys(acts) {
  const box = find("single-keys");
  box.checked = singleKeys();
  box.addEventListener("change", () => {
    localStorage.setItem(SWITCH, box.checked ? "on" : "off");
    acts.redraw();
  });

  const plain = {
    z: acts.undo,
    r: acts.switchMode,
    p: acts.switchPairs,
    f: acts.openFlags,
    s: acts.skip,
    i: acts.instructions,
    m: acts.plain,
    "?": acts.keys,
    n: () => find("note").focus(),
    "=": acts.tie,
    t: acts.tie,
    Backspace: acts.takeOut,
  };

  let pointed = null;
  document.addEventListener("pointerdown", (event) => (pointed = event.target.closest("button, summary, a")));
  document.addEventListener("focusin", (event) => {
    if (event.target !== pointed) pointed = null;
  });

  document.addEventListener("keydown", (event) => {
    const { key, target } = event;
    if (document.querySelector("dialog[open]")) return;
    if (event.ctrlKey || event.metaKey) {
      if (key === "Enter") used(event, acts.submit);
      if (key === "z" && !event.shiftKey && !isText(target)) used(event, acts.undo);
      return;
    }
    if (event.altKey) return;
    if (key === "Escape") return void acts.escape();
    if (isText(target) || !singleKeys()) return;

    const flag = target.closest(".flag");
    if (flag && (key === "y" || key === "n")) return void used(event, () => acts.answer(flag, key === "y"));
    if (key === "Enter") {
      // On a button Enter presses it; but not on one that has the focus from a pointer, nor on a response that has its
      // rank already and so nothing to press.
      if (isPressed(target) && target !== pointed && !target.closest("#groups, .ranked .badge")) return;
      return void used(event, acts.submit);
    }
    if (event.repeat && key !== "ArrowLeft" && key !== "ArrowRight") return;
    if (/^[0-9]$/.test(key)) return void (acts.digit(Number(key)) && event.preventDefault());
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[key];
    if (step) {
      const chip = target.closest(".chip");
      // Up and down scroll the page, except on a chip; in a row of radio buttons the arrows are the row's.
      if (target.type === "radio" || (!chip && key !== "ArrowLeft" && key !== "ArrowRight")) return;
      return void (acts.arrow(step, chip ? Number(chip.dataset.place) : null) && event.preventDefault());
    }
    const act = plain[key];
    if (act) used(event, act);
  });
}

function used(event, act) {
  event.preventDefault();
  act();
}
