"""The table of exact figures."""

from __future__ import annotations

from typing import Any

from rlhf_pipeline.cli.output import emit_lines, emit_table, number


def _value(figure: dict[str, Any] | None, key: str = "value") -> str:
    return "-" if figure is None else number(figure[key], 4)


def print_exact(result: dict[str, Any]) -> None:
    """The table of exact figures, and what its columns mean."""
    columns = (
        "model",
        "beta",
        "reward",
        "KL",
        "objective",
        "share",
        "βKL(π‖π*)",
        "βKL(π‖π*_RM)",
        "excess loss",
    )
    rows = []
    for row in result["rows"]:
        name = f"optimum under {row['name']}" if row["stage"] == "reward" else row["name"]
        against = row.get("optimisation_gap") or row.get("disagreement")
        rows.append(
            (
                name,
                number(row["beta"], 2),
                number(row["reward"]),
                number(row["kl"]),
                number(row["objective"]),
                "-" if row["share"] is None else f"{row['share']:.1%}",
                _value(row["gap_true"]),
                _value(against),
                _value(row["training_loss"], "excess"),
            )
        )
    title = (
        f"exact figures over all {result['responses']:,} responses to {result['prompts']} prompts ({result['split']})"
    )
    emit_table(title, columns, rows)
    learned = result["reward_model"]
    lines = [
        f"objective: {result['reward']} reward - beta KL to {result['reference']}; share: of what an optimal policy "
        "gains over the reference",
        "βKL(π‖π*): distance to the optimum of the true reward, all causes together",
    ]
    if learned:
        few = result["reward_model_prompts"]
        lines.append(
            f"βKL(π‖π*_RM): to the optimum of the reward that a PPO model was trained on (its optimisation error), or "
            f"of {learned} for DPO (their disagreement); learned rewards over {few} prompts"
        )
    lines.append("these figures do not add up: a part may be larger than the whole")
    emit_lines(lines)
