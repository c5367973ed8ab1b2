"""Training curves: what each run logged while it trained."""

from __future__ import annotations

from typing import Any

from rlhf_pipeline.report.markup import h
from rlhf_pipeline.report.palette import NEUTRAL
from rlhf_pipeline.report.parts import PANEL, Section, arm_legend, panels, plot, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.svg import colour, draw, dress
from rlhf_pipeline.report.text import clean, number, plural
from rlhf_pipeline.report.view import REWARD_MODEL, View, items, tuples

PANELS = {
    "objective/scores": "reward of the rollouts",
    "objective/judge": "judge of the rollouts",
    "objective/kl": "KL of the rollouts, nats per response",
    "objective/rlhf_reward": "reward minus β KL",
    "val/response_length": "response length, tokens",
    "val/ended": "share ended by EOS",
    "val/explained_variance": "explained variance of the critic",
    "rewards/accuracies": "accuracy on the training pairs",
    "accuracy": "accuracy on the training pairs, reward model",
    "rewards/margins": "implicit reward margin",
    "logps/chosen_minus_reference": "log-probability of chosen over reference",
    "loss/dpo": "DPO loss",
    "loss/bradley_terry": "Bradley-Terry loss",
    "loss/nll": "negative log-likelihood per token",
}
"""Metrics of metrics.jsonl that are drawn, in this order, and what they are called."""

MOST = 240
"""Points of a line that are drawn; of longer ones the extremes of each stretch."""

Lines = list[tuple[str, list[tuple[float, ...]]]]


def curves_section(view: View, points: Points) -> Section | None:
    """Small multiples: one panel for each metric, one line for each run."""
    curves = {model: dict(items(metrics)) for model, metrics in items(view.get("curves"))}
    made, csv, drawn = [], [], set()
    for name, title in PANELS.items():
        lines: Lines = [(model, tuples(metrics[name], 2)) for model, metrics in curves.items() if name in metrics]
        lines = [(model, line) for model, line in lines if line]
        if not lines:
            continue
        csv += [[model, name, step, value] for model, line in lines for step, value in line]
        drawn |= {view.kind(model) for model, _ in lines}
        made.append(_panel(view, name, title, lines))
    if not made:
        return None
    file = points.add("curves", ["model", "metric", "step", "value"], csv)
    arms = [arm for arm in view.arms if arm in drawn]
    arms += [REWARD_MODEL] if REWARD_MODEL in drawn else []
    others: list[Any] = [(NEUTRAL, "other stages", "line")] if drawn - set(arms) else []
    caption = (
        f"One line for each of {plural(len(curves), 'run')}, as it logged itself on training batches; settings and "
        "seeds of an arm share its colour. A step of PPO is one update: a rollout and all of its minibatches."
    )
    return section("curves", "Training", plot(panels(made), caption, [file], arm_legend(view, arms, *others)))


def _panel(view: View, name: str, title: str, lines: Lines) -> Any:
    faint = 1.0 if len(lines) < 4 else 0.6 if len(lines) < 12 else 0.42
    ends = "; ".join(f"{clean(model)} ends at {number(line[-1][1], 3)}" for model, line in lines[:12])
    rest = f"; and {len(lines) - 12} more" if len(lines) > 12 else ""

    def paint(axes: Any) -> None:
        dress(axes, "step", title)
        for model, line in lines:
            hue = colour(view.look(view.kind(model)).hue)
            marker = "o" if len(line) == 1 else None
            axes.plot(*zip(*thinned(line)), color=hue, lw=1.4, alpha=faint, marker=marker, ms=4)
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=colour("line"), lw=1.2, zorder=1)

    ident = f"curve-{list(PANELS).index(name)}"
    return h("div", draw(ident, title.capitalize(), f"{ends}{rest}.", paint, size=PANEL))


def thinned(line: list[tuple[float, ...]], most: int = MOST) -> list[tuple[float, ...]]:
    """At most `most` points of a line: its ends, and the lowest and highest of each stretch between them."""
    if len(line) <= most:
        return line
    stretches = (most - 2) // 2
    inner = line[1:-1]
    kept = [line[0]]
    for index in range(stretches):
        stretch = inner[index * len(inner) // stretches : (index + 1) * len(inner) // stretches]
        lowest, highest = (pick(range(len(stretch)), key=lambda i: stretch[i][1]) for pick in (min, max))
        kept += [stretch[i] for i in sorted({lowest, highest})]
    return [*kept, line[-1]]
