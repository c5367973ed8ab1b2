"""`rlhf exact`: models of the built-in world against their closed-form optimum."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_pipeline.cli.evaluate import (
    MaxNewTokensOption,
    MaxPromptsOption,
    ReferenceOption,
    SplitOption,
    dry_run_of,
    given,
)
from rlhf_pipeline.cli.exact_table import print_exact
from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    common_of,
    references_and_overrides,
)
from rlhf_pipeline.cli.output import emit_json
from rlhf_pipeline.errors import BadInput


def exact(
    context: typer.Context,
    references: Annotated[
        list[str],
        typer.Argument(metavar="[REF|KEY=VALUE]...", help="Policies and reward models; overrides.", show_default=False),
    ],
    config: ConfigOption = None,
    beta: Annotated[
        float | None, typer.Option("--beta", help="Price of KL (each model's own).", show_default=False)
    ] = None,
    reward: Annotated[
        str | None, typer.Option("--reward", help="Reward of the objective: world or REF (world).", show_default=False)
    ] = None,
    reward_model: Annotated[
        str | None,
        typer.Option("--reward-model", help="Reward model that DPO is set against (PPO's).", show_default=False),
    ] = None,
    reward_model_prompts: Annotated[
        int | None,
        typer.Option(
            "--reward-model-prompts", help="Most prompts for a reward model's figures (4).", show_default=False
        ),
    ] = None,
    long_run: Annotated[
        str | None, typer.Option("--long-run", help="DPO model with the best training loss.", show_default=False)
    ] = None,
    training_loss: Annotated[
        bool, typer.Option("--training-loss/--no-training-loss", help="Excess training loss of DPO models.")
    ] = True,
    split: SplitOption = None,
    max_prompts: MaxPromptsOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    reference: ReferenceOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """Exact reward, KL and objective of models of the built-in world, and their distance from the optimum."""
    common = common_of(context, home, json, dry_run, debug)
    from rlhf_pipeline.config.load import load_config

    options = given(
        beta=beta,
        reward=reward,
        reward_model=reward_model,
        reward_model_prompts=reward_model_prompts,
        long_run=long_run,
        training_loss=None if training_loss else False,
        split=split,
        max_prompts=max_prompts,
        max_new_tokens=max_new_tokens,
        reference=reference,
    )
    models, overrides = references_and_overrides(references)
    if not models:
        raise BadInput("rlhf exact: found no model, expected at least one; write rlhf exact REF...")
    settings = load_config("exact", config, overrides, extra=options).config
    if common.dry_run:
        dry_run_of("exact", settings, models, common)
        return
    load_libraries()
    from rlhf_pipeline.experiment.exact import run_exact

    result = run_exact(models, settings, common.home_path)
    if common.json:
        emit_json(result)
    else:
        print_exact(result)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command("exact")(exact)
