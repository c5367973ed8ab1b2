"""`rlhf evaluate | generate`, and the common parts of commands that measure models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common, Settings, WordsArgument, one_reference
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_plan, emit_table, flat_metrics, interval

if TYPE_CHECKING:
    from rlhf_pipeline.config.compare import PromptsConfig

DECODING_KEYS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "num_beams",
    "length_penalty",
)
SAMPLING_KEYS = (
    *("split", "prompts", "max_prompts", "samples"),
    *DECODING_KEYS,
    *("max_new_tokens", "seed", "reward_model"),
)
MEASURING_KEYS = (*SAMPLING_KEYS, "reference", "best_of", "judge", "true_reward")

NAMES = {
    "true_reward": "true reward",
    "judge": "judge",
    "score": "RM score",
    "kl": "KL",
    "length": "tokens",
    "ended": "EOS",
    "well_formed": "well-formed",
    "entropy": "entropy",
    "context_tokens": "context",
    "tokens_read": "tokens read",
    "tokens_generated": "tokens generated",
    "only_copies": "only copies",
}


def evaluate(common: Common, settings: Settings, words: WordsArgument) -> None:
    """Evaluate one model: a policy on sampled responses, a reward model on held-out pairs."""
    from rlhf_pipeline.config.compare import EvaluateConfig, require_in_context
    from rlhf_pipeline.config.decoding import KL_OF

    model, overrides = one_reference("evaluate", words)
    config = settings.load(overrides).of(EvaluateConfig)
    require_in_context(config, model)
    if common.dry_run:
        emit_measuring(common, config, [model])
        return
    load_libraries()
    from rlhf_pipeline.measure.evaluate import run_evaluate

    result = run_evaluate(model, config, common.home_path)
    if common.json:
        emit_json(result)
        return
    if result["stage"] == "reward":
        emit_table(f"reward model {result['model']}", ("metric", "value"), flat_metrics(result["metrics"]))
        return
    rows = [(NAMES.get(name, name), interval(value, 3)) for name, value in result["metrics"].items()]
    rows += [(f"accuracy of {name}", interval(value, 3)) for name, value in (result["accuracy"] or {}).items()]
    for row in result["best_of_n"]:
        best = row.metrics.get("true_reward") or row.metrics.get("score")
        rows.append((f"best of {row.n} by {row.chosen_by}", interval(best, 3)))
    title = f"{result['model']}: {result['prompts']} prompts x {result['samples']} samples"
    emit_table(title, ("metric", "mean and 95 % interval"), rows)
    legend = {"KL to": result["reference"], "RM score by": result["reward_model"], "judge": result["judge"]}
    lines = ["; ".join(f"{what} {who}" for what, who in legend.items() if who)] if any(legend.values()) else []
    if not config.decoding.is_plain:
        lines.append(f"responses are made by {config.decoding.text}; {KL_OF}")
    emit_lines(lines)


def emit_measuring(common: Common, config: PromptsConfig, models: Sequence[str]) -> None:
    """Resolve the models and print the plan of a dry run.

    Raises:
        UnknownReference, MismatchError, DamagedFile.
    """
    from rlhf_pipeline.config.in_context import name_arm, split_arm
    from rlhf_pipeline.registry.roles import check_role

    registry, labels = common.registry, []
    for method, text in map(split_arm, models):
        resolved = registry.resolve(text)
        if config.stage == "compare" or method is not None:
            check_role(resolved, "policy")
        labels.append(name_arm(method, resolved.label))
    plan = {"command": config.stage, "models": ", ".join(labels), "config": config.model_dump(mode="json")}
    emit_plan(plan, "nothing was measured", json=common.json)


def generate(
    common: Common,
    settings: Settings,
    words: WordsArgument,
    prompt: Annotated[
        list[str] | None,
        typer.Option("--prompt", help="A prompt; may be repeated. A chat model reads it as a user's turn."),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the model the prompts without its chat template.")] = False,
) -> None:
    """Sample responses of a policy to prompts from the command line or from a source."""
    from rlhf_pipeline.config.compare import GenerateConfig

    model, overrides = one_reference("generate", words)
    config = settings.load(overrides).of(GenerateConfig)
    if common.dry_run:
        emit_measuring(common, config, [model])
        return
    load_libraries()
    from rlhf_pipeline.measure.generate import run_generate

    result = run_generate(model, config, common.home_path, texts=prompt or [], raw=raw)
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
