"""`rlhf evaluate | generate`, and what the commands that measure models share."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import (
    ConfigOption,
    DebugOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    WordsArgument,
    common_of,
    one_reference,
)
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table, flat_metrics, interval

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
JudgeOption = Annotated[
    str | None,
    typer.Option("--judge", help="Held-out reward model, trained on pairs that no arm has seen.", show_default=False),
]
TrueRewardOption = Annotated[
    str | None,
    typer.Option("--true-reward", help="What labelled the data: module:function, or a model.", show_default=False),
]

NAMES = {
    "true_reward": "true reward",
    "judge": "judge",
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
    words: WordsArgument,
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
    judge: JudgeOption = None,
    true_reward: TrueRewardOption = None,
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
        judge=judge,
        true_reward=true_reward,
    )
    reference_text, overrides = one_reference("evaluate", words)
    loaded = load_config("evaluate", config, overrides, extra=options)
    if common.dry_run:
        dry_run_of("evaluate", loaded.config, [reference_text], common)
        return
    load_libraries()
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
    emit_table(title, ("metric", "mean and 95 % interval"), rows)
    legend = {"KL to": result["reference"], "RM score by": result["reward_model"], "judge": result["judge"]}
    emit_lines(["; ".join(f"{what} {who}" for what, who in legend.items() if who)] if any(legend.values()) else [])


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


def generate(
    context: typer.Context,
    words: WordsArgument,
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
    reference_text, overrides = one_reference("generate", words)
    settings = load_config("evaluate", config, overrides, extra=options).config
    few = {"max_prompts": 8, "samples": 1}  # to read, not to measure, where nothing else is asked for
    settings = settings.model_copy(update={k: v for k, v in few.items() if k not in settings.model_fields_set})
    if common.dry_run:
        dry_run_of("generate", settings, [reference_text], common)
        return
    load_libraries()
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
    app.command("evaluate")(evaluate)
    app.command("generate")(generate)
