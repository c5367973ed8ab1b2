"""Curves of what each run logged while it trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_pipeline.report.charts import Entry, arm_legend, panel, panels, plot
from rlhf_pipeline.report.drawing import colour, dress
from rlhf_pipeline.report.markup import Markup, Section, section
from rlhf_pipeline.report.points import Points
from rlhf_pipeline.report.style import NEUTRAL
from rlhf_pipeline.report.text import clean, headed, number, plural
from rlhf_pipeline.report.view import REWARD_MODEL, View

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = {
    "objective/rlhf_reward": "reward minus β KL",
    "objective/scores": "reward of the rollouts",
    "objective/judge": "judge's score of the rollouts",
    "objective/kl": "KL of the rollouts, nats per response",
    "val/ended": "share ended by EOS",
    "val/response_length": "response length, tokens",
    "val/explained_variance": "explained variance of the critic",
    "loss/dpo": "DPO loss",
    "rewards/margins": "margin of DPO's implicit reward",
    "rewards/accuracies": "accuracy on the training pairs, DPO",
    "logps/chosen_minus_reference": "log-probability of chosen minus reference's",
    "loss/nll": "negative log-likelihood per token",
    "loss/bradley_terry": "Bradley-Terry loss",
    "accuracy": "accuracy on the training pairs, reward model",
}
"""Metrics of metrics.jsonl that results.json keeps and the page draws, in this order, and their titles."""


def curves_section(view: View, points: Points) -> Section | None:
    """Small multiples: one panel for each metric, one line for each run."""
    curves = view.results.curves
    made, csv, drawn = [], [], set()
    for place, (name, title) in enumerate(PANELS.items()):
        lines = {model: metrics[name] for model, metrics in curves.items() if metrics.get(name)}
        if lines:
            csv += [[model, name, step, value] for model, line in lines.items() for step, value in line]
            drawn |= {view.kind(model) for model in lines}
            made.append(_training_panel(view, f"curve-{place}", title, lines))
    if not made:
        return None
    file = points.add("curves", ["model", "metric", "step", "value"], csv)
    arms = [arm for arm in [*view.arms, REWARD_MODEL] if arm in drawn]
    others: list[Entry] = [(NEUTRAL, "other stages", "line")] if drawn - set(arms) else []
    caption = (
        f"One line for each of {plural(len(curves), 'run')}; it shows values logged during training. Settings and "
        "seeds of an arm share its colour. A step of PPO is one update: a rollout and all of its minibatches."
    )
    return section("curves", "Training", plot(panels(made), caption, [file], arm_legend(view, arms, *others)))


def _training_panel(view: View, ident: str, title: str, lines: dict[str, list[tuple[float, float]]]) -> Markup:
    faint = 1.0 if len(lines) < 4 else 0.6 if len(lines) < 12 else 0.42
    ends = [f"{clean(model)} ends at {number(line[-1][1], 3)}" for model, line in lines.items()]
    rest = f"; and {len(ends) - 12} more" if len(ends) > 12 else ""

    def paint(axes: Axes) -> None:
        dress(axes, "step", title)
        for model, line in lines.items():
            hue = colour(view.look(view.kind(model)).hue)
            marker = "o" if len(line) == 1 else None
            axes.plot(*zip(*line), color=hue, lw=1.4, alpha=faint, marker=marker, ms=4)
        low, high = axes.get_ylim()
        if low < 0 < high:
            axes.axhline(0, color=colour("line"), lw=1.2, zorder=1)

    return panel(ident, headed(title), f"{'; '.join(ends[:12])}{rest}.", paint)
