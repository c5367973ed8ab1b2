"""Colours and markers: an arm keeps its own everywhere, on light and dark ground, on screen and on paper.

Hues after Okabe and Ito's palette for colour-blind readers, each set twice so that text in it keeps a contrast of at
least 4.5 to 1 on the page and on panels. Arms differ in the marker as well: colour is never all that tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_pipeline.report.markup import Markup, h

LIGHT = {
    "page": "#ffffff",
    "panel": "#f5f7f9",
    "ink": "#191d23",
    "muted": "#565f6b",
    "line": "#d5dbe2",
    "grid": "#e6eaee",
    "accent": "#1f5fc4",
    "warn": "#9a4b00",
    "hue-0": "#1f5fc4",
    "hue-1": "#b14d06",
    "hue-2": "#0a7658",
    "hue-3": "#7a3ab2",
    "hue-4": "#b3306b",
    "hue-5": "#0a6d87",
    "hue-6": "#736300",
    "hue-7": "#745146",
}
DARK = {
    "page": "#101318",
    "panel": "#191e25",
    "ink": "#e7eaee",
    "muted": "#a3adb9",
    "line": "#353d47",
    "grid": "#272e37",
    "accent": "#82b4ff",
    "warn": "#f2b069",
    "hue-0": "#7db2ff",
    "hue-1": "#f2a65e",
    "hue-2": "#4fcb9f",
    "hue-3": "#cda2f5",
    "hue-4": "#f58db9",
    "hue-5": "#5cc8e0",
    "hue-6": "#d8c74c",
    "hue-7": "#d3ac9d",
}
HUES = 8
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "h")
RESERVED = {"ppo": 0, "dpo": 1, "best-of-n": 2}

# The same shapes as matplotlib's markers, for legends in the text; a box of 12 x 12 around (0, 0).
SHAPES = {
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0Z",
    "s": "M-4 -4H4V4H-4Z",
    "D": "M0 -5.2L5.2 0L0 5.2L-5.2 0Z",
    "^": "M0 -5L5 4.2H-5Z",
    "v": "M0 5L5 -4.2H-5Z",
    "P": "M-1.7 -5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7Z",
    "X": "M-5 -2.8L-2.8 -5L0 -2.2L2.8 -5L5 -2.8L2.2 0L5 2.8L2.8 5L0 2.2L-2.8 5L-5 2.8L-2.2 0Z",
    "h": "M0 -5L4.4 -2.5V2.5L0 5L-4.4 2.5V-2.5Z",
}


@dataclass(frozen=True)
class Look:
    """How something that is compared looks: the name of its colour, its marker, and whether it is filled."""

    hue: str
    marker: str = "o"
    filled: bool = True

    @property
    def css(self) -> str:
        """The colour in CSS."""
        return f"var(--{self.hue})"


NEUTRAL = Look("muted", "o")


def looks(names: Sequence[str], stages: Mapping[str, str] | None = None) -> dict[str, Look]:
    """A look for each name: `ppo`, `ppo@v1` or the first arm of the stage ppo always has PPO's, others the next free.

    stages: the stage of an arm, where it is known.
    """
    stages = stages or {}
    places: dict[str, int] = {}
    for called in (lambda name: name, lambda name: name.partition("@")[0], lambda name: stages.get(name, "")):
        for name in names:
            index = RESERVED.get(called(name))
            if index is not None and name not in places and index not in places.values():
                places[name] = index
    free = [index for index in range(HUES) if index not in RESERVED.values()]
    for name in names:
        if name not in places:
            places[name] = free.pop(0) if free else len(places) % HUES
    return {name: Look(f"hue-{i}", MARKERS[i], filled=name != "best-of-n") for name, i in places.items()}


def swatch(look: Look) -> Markup:
    """The marker of something that is compared, for a legend or a table."""
    fill = look.css if look.filled else "none"
    path = h("path", d=SHAPES[look.marker], style=f"fill:{fill};stroke:{look.css};stroke-width:1.6")
    return h("svg", path, class_="swatch", viewBox="-6.5 -6.5 13 13", aria_hidden="true")


def variables(colours: dict[str, str]) -> str:
    """The colours as CSS variables."""
    return "".join(f"--{name}:{value};" for name, value in colours.items())
