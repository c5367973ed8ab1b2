"""Reward against KL: what each arm pays for what it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlhf_pipeline.report.palette import NEUTRAL
from rlhf_pipeline.report.parts import Section, arm_legend, both, error_bars, mark, plot, section, trail
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.svg import colour, dress, place_labels
from rlhf_pipeline.report.text import finite, number, plain, short
from rlhf_pipeline.report.view import (
    BEST_OF_N,
    Reading,
    View,
    items,
    listed,
    part,
    reading,
    records,
    setting_csv,
    setting_key,
    setting_text,
    tuples,
)


@dataclass
class Frontier:
    """What the figure shows, read from the results."""

    figure: str
    points: dict[str, list[tuple[Mapping[str, Any], Reading, Reading]]] = field(default_factory=dict)
    envelope: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    band: dict[str, list[tuple[float, ...]]] = field(default_factory=dict)
    passed: dict[str, list[tuple[Mapping[str, Any], Reading, Reading]]] = field(default_factory=dict)  # snapshots
    base: list[tuple[str, Reading, Reading]] = field(default_factory=list)
    best: list[tuple[float, float, Reading]] = field(default_factory=list)  # n, the upper bound of its KL, reward
    gibbs: list[tuple[float, float]] = field(default_factory=list)
    matched: float | None = None
    common: tuple[float, float] | None = None

    @property
    def right(self) -> float:
        """The largest KL of anything that was measured."""
        known = [kl.mean if kl.interval is None else kl.interval[1] for arm in self.points.values() for _, kl, _ in arm]
        known += [kl.mean for arm in self.passed.values() for _, kl, _ in arm]
        known += [bound for _, bound, _ in self.best] + [kl.mean for _, kl, _ in self.base]
        return max(known, default=0.0)

    def runs(self, arm: str) -> list[list[tuple[float, float]]]:
        """(KL, reward) of the snapshots of each run of an arm in order of steps, and of the model at its end."""
        steps: dict[str, list[tuple[float, float, float]]] = {}
        for point, kl, reward in self.passed.get(arm, ()):
            run = str(point.get("model")).partition("#")[0]
            steps.setdefault(run, []).append((finite(point.get("step")) or 0.0, kl.mean, reward.mean))
        ends = {str(point.get("model")): (kl.mean, reward.mean) for point, kl, reward in self.points.get(arm, ())}
        return [[*(place[1:] for place in sorted(found)), ends[run]] for run, found in steps.items() if run in ends]


def _read(view: View) -> Frontier:
    figure = str(view.get("frontier", "figure"))
    found = Frontier(figure)
    for arm, entry in items(view.get("frontier", "arms")):
        for point in records(part(entry, "points")):
            kl, reward = reading(point.get("kl")), reading(point.get("reward"))
            if kl is not None and reward is not None:
                kind = found.points if finite(point.get("step")) is None else found.passed
                kind.setdefault(arm, []).append((point, kl, reward))
        found.envelope[arm] = tuples(part(entry, "envelope"), 2)
        found.band[arm] = tuples(part(entry, "band"), 3)
    for row in view.trained():
        kl, reward = view.figure(row, "kl"), view.figure(row, figure)
        if kl is not None and reward is not None and view.is_baseline(row):
            found.base.append((str(row.get("name")), kl, reward))
    for row in view.best_of_n():
        bound, reward = finite(row.get("kl_bound")), view.figure(row, figure)
        if bound is not None and reward is not None:
            found.best.append((finite(row.get("n")) or 0.0, bound, reward))
    found.gibbs = _gibbs(view)
    found.matched = finite(view.get("frontier", "matched_kl"))
    found.common = _ends(view.get("frontier", "common_range"))
    return found


def _ends(value: Any) -> tuple[float, float] | None:
    """The two ends of a range; None where there are not two."""
    ends = [finite(end) for end in listed(value)]
    if len(ends) != 2 or ends[0] is None or ends[1] is None:
        return None
    return ends[0], ends[1]


def _gibbs(view: View) -> list[tuple[float, float]]:
    """The exact frontier in order of KL."""
    curve = view.get("frontier", "gibbs")
    pairs = zip(listed(part(curve, "kl")), listed(part(curve, "reward")))
    known = [(finite(kl), finite(reward)) for kl, reward in pairs]
    return sorted((kl, reward) for kl, reward in known if kl is not None and reward is not None)


def frontier_section(view: View, points: Points) -> Section | None:
    """The figure of reward against KL."""
    found = _read(view)
    if not found.points:
        return None
    files = _files(found, points)
    arms = [arm for arm in view.arms if arm in found.points]
    title = (
        f"{view.name_of(found.figure).capitalize()} against KL to {short(view.get('reference') or 'the reference', 40)}"
    )
    more: list[Any] = []
    if found.base:
        more.append((NEUTRAL, short(found.base[0][0], 40), None))
    if any(found.envelope.values()):
        more.append((None, "envelope with its 95 % band" if any(found.band.values()) else "envelope", "line"))
    if found.gibbs:
        more.append((None, "exact frontier", "thin"))
    if found.matched is not None:
        more.append((None, f"matched KL {number(found.matched)}", "dashed"))
    shown = [*arms, BEST_OF_N] if found.best else arms
    body = both("frontier-figure", title, _description(view, found, arms), lambda axes: _paint(axes, view, found))
    return section(
        "frontier", "Reward against KL", plot(body, _caption(view, found), files, arm_legend(view, shown, *more))
    )


def _description(view: View, found: Frontier, arms: list[str]) -> str:
    said = []
    for arm in arms:
        rewards = [reward.mean for _, _, reward in found.points[arm]]
        kls = [kl.mean for _, kl, _ in found.points[arm]]
        said.append(
            f"{arm}: {len(rewards)} points, KL {number(min(kls))} to {number(max(kls))}, {view.name_of(found.figure)} "
            f"{number(min(rewards))} to {number(max(rewards))}"
        )
    return "; ".join(said) + "."


def _caption(view: View, found: Frontier) -> str:
    several = sum(len(entries) for entries in found.points.values())
    said = [f"Each point is a trained model ({several} in all) with its 95 % intervals both ways. {view.basis()}"]
    if found.passed:
        count = sum(len(entries) for entries in found.passed.values())
        said.append(f"Small and light: {count} snapshots on the way there, joined run by run; the curves use them too.")
    if any(found.envelope.values()):
        chooser = view.get("frontier", "chosen_by")
        by = f" by the {view.name_of(chooser)}" if isinstance(chooser, str) else ""
        kinds = "settings and snapshots" if found.passed else "settings"
        chosen = f"The envelope joins the means over seeds of the {kinds}"
        said.append(
            f"{chosen} chosen on validation prompts{by}." if by and view.get("validation_split") else f"{chosen}."
        )
    if found.common is not None:
        said.append(f"Both arms reach KL {number(found.common[0])} to {number(found.common[1])} (shaded).")
    if found.gibbs:
        said.append("No policy lies above the exact frontier; a sampled point may, by as much as its interval allows.")
    if found.best:
        said.append("Best of n stands at the upper bound of its KL (log n − (n − 1)/n): the truth lies to the left.")
    return " ".join(said)


def _files(found: Frontier, points: Points) -> list[str]:
    rows = [
        [
            arm,
            setting_csv(point.get("setting")),
            *map(point.get, ("seed", "step", "model")),
            *kl.cells,
            *reward.cells,
            note,
        ]
        for kind, note in ((found.points, ""), (found.passed, "snapshot"))
        for arm, entries in kind.items()
        for point, kl, reward in entries
    ]
    rows += [["", "", "", "", name, *kl.cells, *reward.cells, "baseline"] for name, kl, reward in found.base]
    rows += [
        [BEST_OF_N, f"n={plain(n)}", "", "", "", bound, None, None, *reward.cells, "kl is an upper bound"]
        for n, bound, reward in found.best
    ]
    ends = ["kl", "kl_low", "kl_high", found.figure, f"{found.figure}_low", f"{found.figure}_high"]
    files = [points.add("frontier", ["arm", "setting", "seed", "step", "model", *ends, "note"], rows)]
    lines = [["envelope", arm, kl, reward, "", ""] for arm, curve in found.envelope.items() for kl, reward in curve]
    lines += [["band", arm, kl, "", low, high] for arm, curve in found.band.items() for kl, low, high in curve]
    lines += [["exact frontier", "", kl, reward, "", ""] for kl, reward in found.gibbs]
    if lines:
        files.append(points.add("frontier_lines", ["line", "arm", "kl", found.figure, "low", "high"], lines))
    return files


def _paint(axes: Any, view: View, found: Frontier) -> Any:
    unit = "KL to the reference, nats per response"
    dress(axes, unit, view.name_of(found.figure))
    right = found.right * 1.06 or 1.0
    heights: list[float] = []
    if found.common is not None:
        axes.axvspan(*found.common, color=colour("grid"), alpha=0.55, lw=0, zorder=0)
    if found.matched is not None:
        axes.axvline(found.matched, color=colour("muted"), lw=1.2, dashes=(4, 3), zorder=1)
    if found.gibbs:
        inside = [pair for pair in found.gibbs if pair[0] <= right]
        beyond = [pair for pair in found.gibbs if pair[0] > right][:1]  # the line goes on to the edge of the figure
        axes.plot(*zip(*inside, *beyond), color=colour("ink"), lw=1.1, zorder=1.5)
        heights += [reward for _, reward in inside]
    spots, labels = [], []
    for arm, entries in found.points.items():
        look = view.look(arm)
        hue = colour(look.hue)
        if found.band.get(arm):
            places, low, high = zip(*found.band[arm])
            axes.fill_between(places, low, high, color=hue, alpha=0.16, lw=0, zorder=1)
            heights += [*low, *high]
        if found.envelope.get(arm):
            axes.plot(*zip(*found.envelope[arm]), color=hue, lw=2.2, zorder=3)
        for line in found.runs(arm):
            trail(axes, line, look)
            heights += [reward for _, reward in line]
            spots += line
        for _, kl, reward in entries:
            error_bars(axes, kl, reward, hue)
            heights += [reward.mean, *(reward.interval or ())]
        x, y = [kl.mean for _, kl, _ in entries], [reward.mean for _, _, reward in entries]
        mark(axes, x, y, look, size=7)
        spots += list(zip(x, y))
        labels += _setting_labels(entries, look.hue)
    for name, kl, reward in found.base:
        error_bars(axes, kl, reward, colour("muted"))
        mark(axes, [kl.mean], [reward.mean], NEUTRAL, size=7)
        heights += [reward.mean]
        spots.append((kl.mean, reward.mean))
        labels.append((kl.mean, reward.mean, short(name, 24), "muted"))
    look = view.look(BEST_OF_N)
    for n, bound, reward in found.best:
        hue = colour(look.hue)
        error_bars(axes, Reading(bound), reward, hue)
        mark(axes, [bound], [reward.mean], look, size=7, filled=False)
        if bound > 0:
            axes.plot([max(0.0, bound - 0.04 * right), bound], [reward.mean] * 2, color=hue, lw=1.4, ls=":", zorder=2)
        heights.append(reward.mean)
        spots.append((bound, reward.mean))
        labels.append((bound, reward.mean, f"n = {plain(n)}", look.hue))
    room = 0.07 * (max(heights) - min(heights) or 1.0)
    axes.set_xlim(-0.03 * right, right)
    axes.set_ylim(min(heights) - room, max(heights) + room)
    curves: list[Sequence[tuple[float, ...]]] = [found.gibbs, *found.envelope.values()]
    lines = [(kl_at, height) for curve in curves for kl_at, height in curve if kl_at <= right]
    if found.matched is not None:
        bottom, top = axes.get_ylim()
        lines += [(found.matched, bottom + (top - bottom) * step / 60) for step in range(61)]
    return lambda done: place_labels(done, labels, spots, lines)


def _setting_labels(entries: list[tuple[Any, Reading, Reading]], hue: str) -> list[tuple[float, float, str, str]]:
    """One label for each setting, at the mean of its seeds."""
    together: dict[tuple, list[tuple[Any, Reading, Reading]]] = {}
    for entry in entries:
        together.setdefault(setting_key(entry[0].get("setting")), []).append(entry)
    labels = []
    for group in together.values():
        text = setting_text(group[0][0].get("setting")) or (short(group[0][0].get("model") or "", 24))
        x = sum(kl.mean for _, kl, _ in group) / len(group)
        y = sum(reward.mean for _, _, reward in group) / len(group)
        labels.append((x, y, text, hue))
    return labels if len(labels) <= 12 else []
