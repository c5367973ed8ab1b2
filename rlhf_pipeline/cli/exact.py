"""`rlhf exact`: models of the built-in world against their closed-form optimum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_pipeline.cli.evaluate import emit_measuring
from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common, Settings, references_and_overrides
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table, number
from rlhf_pipeline.errors import BadInput

if TYPE_CHECKING:
    from rlhf_pipeline.report.figures import Exact

EXACT_KEYS = (
    *("beta", "reward", "reward_model", "reward_model_prompts", "long_run", "training_loss"),
    *("split", "max_prompts", "max_new_tokens", "reference"),
)


def exact(
    common: Common,
    settings: Settings,
    references: Annotated[
        list[str],
        typer.Argument(metavar="[REF|KEY=VALUE]...", help="Policies and reward models; overrides.", show_default=False),
    ],
) -> None:
    """Exact reward, KL and objective of models of the built-in world, and their distance from the optimum."""
    from rlhf_pipeline.config.compare import ExactConfig

    models, overrides = references_and_overrides(references)
    if not models:
        raise BadInput("rlhf exact: found no model, expected at least one; write rlhf exact REF...")
    config = settings.load(overrides).of(ExactConfig)
    if common.dry_run:
        emit_measuring(common, config, models)
        return
    load_libraries()
    from rlhf_pipeline.measure.exact import run_exact

    result = run_exact(models, config, common.home_path)
    if common.json:
        emit_json(result)
    else:
        print_exact(result, result.split)


def print_exact(exact: Exact, split: str) -> None:
    """Print the table of exact figures, and what its columns mean."""
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
    for row in exact.rows:
        against = row.optimisation_gap or row.disagreement
        rows.append(
            (
                f"optimum under {row.name}" if row.stage == "reward" else row.name,
                number(row.beta, 2),
                number(row.reward),
                number(row.kl),
                number(row.objective),
                "-" if row.share is None else f"{row.share:.1%}",
                number(row.gap_true.value, 4),
                number(against and against.value, 4),
                number(row.training_loss and row.training_loss.excess, 4),
            )
        )
    prompts = f"{exact.prompts} prompt{'' if exact.prompts == 1 else 's'}"
    title = f"exact figures over all {exact.responses:,} responses to {prompts} ({split})"
    emit_table(title, columns, rows)
    lines = [
        f"objective: {exact.reward} reward - beta KL to {exact.reference}; share: the part of the optimal "
        "policy's gain over the reference that a model reaches",
        "βKL(π‖π*): distance from the optimum of the true reward, from all causes together",
    ]
    if exact.reward_model:
        lines.append(
            "βKL(π‖π*_RM): distance from the optimum of the reward that a PPO model was trained on (its optimisation "
            f"error); for DPO, from that of {exact.reward_model} (their disagreement); taken over "
            f"{exact.reward_model_prompts} prompts"
        )
    lines.append("these distances do not add up: the second may be larger than the first")
    emit_lines(lines)
