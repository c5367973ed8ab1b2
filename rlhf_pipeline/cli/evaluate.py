"""`rlhf evaluate | compare | generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlhf_pipeline.cli.exact_table import print_exact
from rlhf_pipeline.cli.options import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    common_of,
)
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table, flat_metrics, interval, number

SplitOption = Annotated[str | None, typer.Option("--split", help="Split of the prompts (test).", show_default=False)]
PromptsOption = Annotated[
    str | None, typer.Option("--prompts", help="Source of the prompts (the model's own data).", show_default=False)
]
MaxPromptsOption = Annotated[
    int | None, typer.Option("--max-prompts", help="Most prompts, by hash order (256).", show_default=False)
]
SamplesOption = Annotated[int | None, typer.Option("--samples", help="Responses per prompt (4).", show_default=False)]
TemperatureOption = Annotated[
    float | None, typer.Option("--temperature", help="Divides the logits of the sampler (1).", show_default=False)
]
MaxNewTokensOption = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Longest response, tokens (as trained).", show_default=False)
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seed of sampling (0).", show_default=False)]
RewardModelOption = Annotated[
    str | None,
    typer.Option(
        "--reward-model",
        help="Who scores: REF, world or module:function (the reward model it was trained on).",
        show_default=False,
    ),
]
ReferenceOption = Annotated[
    str | None, typer.Option("--reference", help="Model that KL is measured to (as trained).", show_default=False)
]
BestOfOption = Annotated[
    str | None, typer.Option("--best-of", help="Sizes n of best-of-n, as in 1,4,16.", show_default=False)
]

NAMES = {
    "true_reward": "true reward",
    "score": "RM score",
    "kl": "KL",
    "length": "tokens",
    "ended": "EOS",
    "well_formed": "well-formed",
    "entropy": "entropy",
}


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def evaluate(
    context: typer.Context,
    reference_text: Annotated[str, typer.Argument(metavar="REF", help="Model.", show_default=False)],
    config: ConfigOption = None,
    split: SplitOption = None,
    prompts: PromptsOption = None,
    max_prompts: MaxPromptsOption = None,
    samples: SamplesOption = None,
    temperature: TemperatureOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    seed: SeedOption = None,
    reward_model: RewardModelOption = None,
    reference: ReferenceOption = None,
    best_of: BestOfOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """Figures of one model: a policy by its samples, a reward model by held-out pairs."""
    common = common_of(context, home, json, dry_run, debug)
    from rlhf_pipeline.config.load import load_config

    options = given(
        split=split,
        prompts=prompts,
        max_prompts=max_prompts,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        reward_model=reward_model,
        reference=reference,
        best_of=best_of,
    )
    loaded = load_config("evaluate", config, options)
    if common.dry_run:
        dry_run_of("evaluate", loaded.config, [reference_text], common)
        return
    from rlhf_pipeline.experiment.evaluate import run_evaluate

    result = run_evaluate(reference_text, loaded.config, common.home_path)
    if common.json:
        emit_json(result)
        return
    if result["stage"] == "reward":
        emit_table(f"reward model {result['model']}", ("metric", "value"), flat_metrics(result["metrics"]))
        return
    rows = [(NAMES.get(name, name), interval(value, 3)) for name, value in result["metrics"].items()]
    for row in result["best_of_n"]:
        best = row["metrics"].get("true_reward") or row["metrics"].get("score")
        rows.append((f"best of {row['n']} by {row['chosen_by']}", interval(best, 3)))
    title = f"{result['model']}: {result['prompts']} prompts x {result['samples']} samples"
    emit_table(title, ("metric", "mean ± 95 %"), rows)
    emit_lines([f"KL to {result['reference'] or '-'}; score by {result['reward_model'] or '-'}"])


def compare(
    context: typer.Context,
    references: Annotated[
        list[str] | None,
        typer.Argument(metavar="[REF|KEY=VALUE]...", help="Models; overrides of the config.", show_default=False),
    ] = None,
    config: ConfigOption = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Model to set the arms against.")] = None,
    name: Annotated[str | None, typer.Option("--name", help="Name of the report.")] = None,
    split: SplitOption = None,
    prompts: PromptsOption = None,
    max_prompts: MaxPromptsOption = None,
    samples: SamplesOption = None,
    temperature: TemperatureOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    seed: SeedOption = None,
    reward_model: RewardModelOption = None,
    reference: ReferenceOption = None,
    best_of: BestOfOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """Compare policies on the same prompts with the same random numbers; writes reports/NAME/results.json."""
    common = common_of(context, home, json, dry_run, debug)
    from rlhf_pipeline.config.load import load_config

    words = references or []
    overrides = [word for word in words if "=" in word]
    arms = [word for word in words if "=" not in word]
    options = given(
        baseline=baseline,
        name=name,
        split=split,
        prompts=prompts,
        max_prompts=max_prompts,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        reward_model=reward_model,
        reference=reference,
        best_of=best_of,
        arms=arms or None,
    )
    loaded = load_config("compare", config, overrides, extra=options)
    if common.dry_run:
        models = [*loaded.config.arms, *([loaded.config.baseline] if loaded.config.baseline else [])]
        dry_run_of("compare", loaded.config, models, common)
        return
    from rlhf_pipeline.experiment.compare import run_compare

    result = run_compare(loaded.config, common.home_path)
    if common.json:
        emit_json(result)
    else:
        print_comparison(result)


def dry_run_of(what: str, config: Any, models: list[str], common: Any) -> None:
    """Resolve the models and print what would be done."""
    from rlhf_pipeline.registry import Registry, check_role

    registry = Registry(common.home_path)
    labels = []
    for text in models:
        resolved = registry.resolve(text)
        if what == "compare":
            check_role(resolved, "policy")
        labels.append(resolved.label)
    result = {"command": what, "models": ", ".join(labels), "config": config.model_dump(mode="json")}
    if common.json:
        emit_json(result)
    else:
        emit_table("dry run: nothing was measured", ("what", "value"), flat_metrics(result))


def print_comparison(result: dict[str, Any]) -> None:
    """The table of a comparison, and where its results are."""
    shown = ("true_reward", "score", "kl", "well_formed", "ended", "length")
    names = [name for name in shown if name in result["rows"][0]["metrics"]]
    primary = result["primary"]
    columns = ["model", "beta", *(NAMES[name] for name in names)]
    columns += ["win rate", "gain/sd"] if primary else []
    rows, costs = [], []
    for row in result["rows"]:
        if cost := row.get("cost"):
            counts = (number(int(cost[key])) for key in ("tokens_trained", "tokens_generated", "optimizer_steps"))
            costs.append((row["name"], number(cost["wall_seconds"], 0), number(cost["flops"] / 1e12, 2), *counts))
        cells = [row["name"], "-" if row.get("beta") is None else f"{row['beta']:g}"]
        for name in names:
            if name == "kl" and "kl_bound" in row:
                cells.append(f"<= {row['kl_bound']:.2f}")
            else:
                cells.append(interval(row["metrics"].get(name)))
        if primary:
            cells += [interval(row.get("win_rate")), number(row.get("gain_in_sd"), 2)]
        rows.append(cells)
    title = (
        f"{result['name']}: {result['prompts']} prompts of the split {result['split']!r} x {result['samples']} samples"
    )
    emit_table(title, columns, rows)
    if result.get("exact"):
        print_exact(result["exact"] | {"split": result["split"]})
    emit_table("cost", ("model", "seconds", "TFLOP", "tokens trained", "tokens generated", "optimizer steps"), costs)
    judge = result["reward_model"] or "-"
    emit_lines(
        [
            "figures: mean ± half of the 95 % interval, clustered by prompt",
            f"KL to {result['reference'] or '-'}, nats per response; RM score by {judge}; <= marks an upper bound",
            f"win rate and gain (in standard deviations of its responses) against {result['baseline']}",
            "cost: the arm's own run and, for PPO, that of its reward model; stages that arms share are on no bill",
            f"results  {result['path']}",
        ]
    )


def generate(
    context: typer.Context,
    reference_text: Annotated[str, typer.Argument(metavar="REF", help="Model.", show_default=False)],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.")] = None,
    prompts: PromptsOption = None,
    split: SplitOption = None,
    max_prompts: MaxPromptsOption = None,
    samples: SamplesOption = None,
    temperature: TemperatureOption = None,
    max_new_tokens: MaxNewTokensOption = None,
    seed: SeedOption = None,
    reward_model: RewardModelOption = None,
    config: ConfigOption = None,
    home: HomeOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
) -> None:
    """Sample responses of a policy to prompts, given here or from a source."""
    common = common_of(context, home, json, dry_run, debug)
    from rlhf_pipeline.config.load import load_config

    options = given(
        split=split,
        prompts=prompts,
        max_prompts=max_prompts,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        seed=seed,
        reward_model=reward_model,
    )
    settings = load_config("evaluate", config, options).config
    few = {"max_prompts": 8, "samples": 1}  # to read, not to measure, where nothing else is asked for
    settings = settings.model_copy(update={k: v for k, v in few.items() if k not in settings.model_fields_set})
    if common.dry_run:
        dry_run_of("generate", settings, [reference_text], common)
        return
    from rlhf_pipeline.experiment.generate import run_generate

    result = run_generate(reference_text, settings, common.home_path, texts=prompt or [])
    if common.json:
        emit_json(result)
        return
    lines: list[str] = []
    for entry in result["responses"]:
        lines.append(f"> {entry['prompt']}")
        for response in entry["responses"]:
            score = "" if response.get("score") is None else f"  (score {response['score']:.2f})"
            lines.append(f"  {response['text']}{'' if response['ended'] else ' ...'}{score}")
    emit_lines(lines)


def register(app: typer.Typer) -> None:
    """Add the commands to the app."""
    app.command("compare")(compare)
    app.command("evaluate")(evaluate)
    app.command("generate")(generate)
