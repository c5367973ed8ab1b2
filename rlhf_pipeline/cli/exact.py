"""`rlhf exact`: models of the built-in world against their closed-form optimum."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_pipeline.cli.evaluate import emit_measuring
from rlhf_pipeline.cli.exact_table import print_exact
from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common, Settings, command, references_and_overrides
from rlhf_pipeline.cli.output import emit_json
from rlhf_pipeline.errors import BadInput

KEYS = (
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
    models, overrides = references_and_overrides(references)
    if not models:
        raise BadInput("rlhf exact: found no model, expected at least one; write rlhf exact REF...")
    config = settings.load(overrides).config
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


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(app, "exact", dry_run=True, config="exact", keys=KEYS)(exact)
