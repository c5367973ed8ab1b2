"""Reward against KL: every model, the envelope of each arm, best of n, and the exact frontier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.report.charts import Entry, arm_legend, both, plot
from rlhf_pipeline.report.drawing import colour, dress, mark, place_labels, trail
from rlhf_pipeline.report.figures import BEST_OF_N
from rlhf_pipeline.report.markup import Section, section
from rlhf_pipeline.report.points import Points, cells
from rlhf_pipeline.report.sides import Frontier, FrontierPoint
from rlhf_pipeline.report.style import NEUTRAL
from rlhf_pipeline.report.text import clean, headed, number, plural, short
from rlhf_pipeline.report.view import Key, View, setting_csv, setting_key, setting_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Pair = tuple[float, float]


class _Shown:
    """The contents of the figure of reward against KL."""

    def __init__(self, view: View, frontier: Frontier):
        arms, figure = frontier.arms, frontier.figure
        self.frontier = frontier
        self.points = {arm: [one for one in entry.points if one.step is None] for arm, entry in arms.items()}
        self.passed = {arm: [one for one in entry.points if one.step is not None] for arm, entry in arms.items()}
        self.band = {
            arm: [(kl, low, high) for kl, low, high in entry.band if low is not None and high is not None]
            for arm, entry in arms.items()
        }
        self.base = [
            (row.name, row.metrics["kl"], row.metrics[figure])
            for row in view.baseline()
            if {"kl", figure} <= row.metrics.keys() and view.results.decoder is None  # else another policy's reward
        ]
        self.best_of = [
            (row, row.kl_bound, row.metrics[figure])
            for row in view.best_of_n
            if row.kl_bound is not None and figure in row.metrics
        ]
        self.gibbs = [] if frontier.gibbs is None else sorted(zip(frontier.gibbs.kl, frontier.gibbs.reward))

    @property
    def right(self) -> float:
        """The largest KL of anything in the figure."""
        known = [one.kl.ends[1] if one.kl.ends else one.kl.mean for arm in self.points.values() for one in arm]
        known += [one.kl.mean for arm in self.passed.values() for one in arm]
        return max([*known, *(bound for _, bound, _ in self.best_of), *(kl.mean for _, kl, _ in self.base)])


def frontier_section(view: View, points: Points) -> Section | None:
    """The figure of reward against KL."""
    if view.results.frontier is None:
        return None
    found = _Shown(view, view.results.frontier)
    frontier = found.frontier
    arms = [arm for arm in view.arms if arm in found.points]
    reference = short(view.results.reference or "the reference", 40)
    title = f"{headed(view.name_of(frontier.figure))} against KL to {reference}"
    more: list[Entry] = [(NEUTRAL, short(name, 40), None) for name, _, _ in found.base[:1]]
    if any(entry.envelope for entry in frontier.arms.values()):
        more.append((NEUTRAL, "envelope with its 95 % band" if any(found.band.values()) else "envelope", "line"))
    if found.gibbs:
        more.append((NEUTRAL, "exact frontier", "thin"))
    if frontier.matched_kl is not None:
        more.append((NEUTRAL, f"matched KL {number(frontier.matched_kl)}", "dashed"))
    said = []
    for arm in arms:
        kls, rewards = ([getattr(one, name).mean for one in found.points[arm]] for name in ("kl", "reward"))
        said.append(
            f"{arm}: {plural(len(kls), 'point')}, KL {number(min(kls))} to {number(max(kls))}, "
            f"{view.name_of(frontier.figure)} "
            f"{number(min(rewards))} to {number(max(rewards))}"
        )
    body = both("frontier-figure", title, f"{'; '.join(said)}.", lambda axes: _paint(axes, view, found))
    key = arm_legend(view, [*arms, BEST_OF_N] if found.best_of else arms, *more)
    caption, files = _frontier_caption(view, found), _frontier_files(found, points)
    return section("frontier", "Reward against KL", plot(body, caption, files, key))


def _frontier_caption(view: View, found: _Shown) -> str:
    frontier, models = found.frontier, sum(map(len, found.points.values()))
    said = [f"Each point is a trained model ({models} in all) with 95 % intervals in both directions. {view.basis()}"]
    if view.results.decoder:
        said.append(f"Responses are samples of the policies themselves, not of the decoder ({view.results.decoder}).")
    if passed := sum(map(len, found.passed.values())):
        said.append(
            f"Small light points are {passed} snapshots; a line joins those of one run. The envelope uses them too."
        )
    if any(entry.envelope for entry in frontier.arms.values()):
        chosen = f"The envelope joins the means over seeds of the {'settings and snapshots' if passed else 'settings'}"
        if frontier.chosen_by is not None and view.results.validation_split:
            chosen += f" chosen on validation prompts by the {view.name_of(frontier.chosen_by)}"
        said.append(f"{chosen}.")
    if frontier.common_range is not None:
        left, right = frontier.common_range
        said.append(f"Both arms reach KL {number(left)} to {number(right)} (shaded).")
    if found.gibbs:
        said.append("No policy lies above the exact frontier; a sampled point may lie above it within its interval.")
    bounded = [row.name for row in view.trained if row.in_context is not None and row.in_context.kl_is_bound]
    if bounded:
        said.append(f"The KL of {', '.join(map(clean, bounded))} is an upper bound.")
    if found.best_of:
        said.append("Best of n is drawn at the upper bound of its KL (log n − (n − 1)/n): its KL is at most that.")
    return " ".join(said)


def _frontier_files(found: _Shown, points: Points) -> list[str]:
    figure = found.frontier.figure
    rows: list[Sequence[object]] = [
        [arm, setting_csv(one.setting), one.seed, one.step, one.model, *cells(one.kl), *cells(one.reward), note]
        for kind, note in ((found.points, ""), (found.passed, "snapshot"))
        for arm, entries in kind.items()
        for one in entries
    ]
    rows += [["", "", "", "", name, *cells(kl), *cells(reward), "baseline"] for name, kl, reward in found.base]
    rows += [
        [BEST_OF_N, f"n={row.n}", "", "", "", bound, None, None, *cells(reward), "kl is an upper bound"]
        for row, bound, reward in found.best_of
    ]
    ends = ["kl", "kl_low", "kl_high", figure, f"{figure}_low", f"{figure}_high"]
    files = [points.add("frontier", ["arm", "setting", "seed", "step", "model", *ends, "note"], rows)]
    envelopes = {arm: entry.envelope for arm, entry in found.frontier.arms.items()}
    lines: list[Sequence[object]] = [
        ["envelope", arm, kl, reward, "", ""] for arm, curve in envelopes.items() for kl, reward in curve
    ]
    lines += [["band", arm, kl, "", low, high] for arm, curve in found.band.items() for kl, low, high in curve]
    lines += [["exact frontier", "", kl, reward, "", ""] for kl, reward in found.gibbs]
    if lines:
        files.append(points.add("frontier_lines", ["line", "arm", "kl", figure, "low", "high"], lines))
    return files


def _paint(axes: Axes, view: View, found: _Shown) -> None:
    frontier = found.frontier
    dress(axes, "KL to the reference, nats per response", view.name_of(frontier.figure))
    right = found.right * 1.06 or 1.0
    heights: list[float] = []
    spots: list[Pair] = []
    curves: list[Sequence[Pair]] = [found.gibbs]
    labels: list[tuple[float, float, str, str]] = []
    if frontier.common_range is not None:
        axes.axvspan(*frontier.common_range, color=colour("grid"), alpha=0.55, lw=0, zorder=0)
    if frontier.matched_kl is not None:
        axes.axvline(frontier.matched_kl, color=colour("muted"), lw=1.2, dashes=(4, 3), zorder=1)
    if found.gibbs:
        inside = [pair for pair in found.gibbs if pair[0] <= right]
        beyond = [pair for pair in found.gibbs if pair[0] > right][:1]  # the line goes on to the edge of the figure
        axes.plot(*zip(*inside, *beyond), color=colour("ink"), lw=1.1, zorder=1.5)
        heights += [reward for _, reward in inside]
    for arm, entry in frontier.arms.items():
        look, finals = view.look(arm), found.points[arm]
        hue = colour(look.hue)
        if found.band[arm]:
            places, low, high = zip(*found.band[arm])
            axes.fill_between(places, low, high, color=hue, alpha=0.16, lw=0, zorder=1)
            heights += [*low, *high]
        if entry.envelope:
            axes.plot(*zip(*entry.envelope), color=hue, lw=2.2, zorder=3)
            curves.append(entry.envelope)
        every = [(one, one.kl.mean, one.reward.mean) for one in entry.points]
        for one in finals:
            line = trail(axes, one.model, every, look)
            mark(axes, one.kl.mean, one.reward.mean, look, one.kl.ends, one.reward.ends, size=7)
            heights += [*(reward for _, reward in line), *(one.reward.ends or ())]
            spots += line
        labels += _setting_labels(finals, look.hue)
    for name, kl, reward in found.base:
        mark(axes, kl.mean, reward.mean, NEUTRAL, kl.ends, reward.ends, size=7)
        heights.append(reward.mean)
        spots.append((kl.mean, reward.mean))
        labels.append((kl.mean, reward.mean, short(name, 24), "muted"))
    look = view.look(BEST_OF_N)
    for row, bound, reward in found.best_of:
        mark(axes, bound, reward.mean, look, None, reward.ends, size=7, filled=False)
        if bound > 0:
            to = [max(0.0, bound - 0.04 * right), bound]
            axes.plot(to, [reward.mean] * 2, color=colour(look.hue), lw=1.4, ls=":", zorder=2)
        heights.append(reward.mean)
        spots.append((bound, reward.mean))
        labels.append((bound, reward.mean, f"n = {row.n}", look.hue))
    room = 0.07 * (max(heights) - min(heights) or 1.0)
    bottom, top = min(heights) - room, max(heights) + room
    axes.set_xlim(-0.03 * right, right)
    axes.set_ylim(bottom, top)
    lines = [(kl_at, height) for curve in curves for kl_at, height in curve if kl_at <= right]
    if frontier.matched_kl is not None:
        lines += [(frontier.matched_kl, bottom + (top - bottom) * step / 60) for step in range(61)]
    place_labels(axes, labels, spots, lines)


def _setting_labels(points: list[FrontierPoint], hue: str) -> list[tuple[float, float, str, str]]:
    """One label for each setting, at the mean of its seeds."""
    together: dict[Key, list[FrontierPoint]] = {}
    for one in points:
        together.setdefault(setting_key(one.setting), []).append(one)
    labels = []
    for group in together.values():
        x, y = (sum(getattr(one, name).mean for one in group) / len(group) for name in ("kl", "reward"))
        labels.append((x, y, setting_text(group[0].setting) or short(group[0].model, 24), hue))
    return labels if len(labels) <= 12 else []
