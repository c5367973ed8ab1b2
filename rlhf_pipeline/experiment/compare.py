"""Compare policies: same prompts, same random numbers, one table."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.evaluation.sampled import Samples, paired_difference, win_rate
from rlhf_pipeline.experiment.best_of import best_of_n_rows, primary_figure
from rlhf_pipeline.experiment.evaluate import measure
from rlhf_pipeline.experiment.exact import Judge, beta_of, exact_figures
from rlhf_pipeline.experiment.leaves import TRUTH, Leaves
from rlhf_pipeline.experiment.subjects import Bench, find_policies, reference_of, reward_model_of, set_up
from rlhf_pipeline.models.roles import Policy
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.rewards import names_a_model
from rlhf_pipeline.training.run import make_accelerator
from rlhf_pipeline.training.tracking import console, jsonable

COST_KEYS = ("wall_seconds", "flops", "tokens_trained", "tokens_generated", "optimizer_steps")


def bill(registry: Registry, resolved: Resolved) -> dict[str, float]:
    """What an arm cost: its own run and, for PPO, those of its reward models. Shared stages are on no bill.

    Empty where it is not known: outside the registry, and for a snapshot in the middle of a run.
    """
    if resolved.manifest is None or resolved.step is not None:
        return {}
    total = {key: float(resolved.manifest.cost.get(key, 0)) for key in COST_KEYS}
    for role, parent in resolved.manifest.parents.items():
        if role.startswith("reward_model"):
            for key, value in bill(registry, registry.resolve(parent.ref)).items():
                total[key] += value
    return total


def _exact(bench: Bench, config: Any, models: list[Resolved]) -> dict[str, Any] | None:
    """Exact figures of the models, where every response can be listed and a price of KL is known."""
    betas = [beta for model in models if (beta := beta_of(model)) is not None]
    if not (config.exact and bench.knows_truth and bench.reference is not None and betas):
        return None
    learned = config.reward_model if config.reward_model and names_a_model(config.reward_model) else None
    leaves = Leaves.of(bench)
    judge = Judge(leaves, TRUTH, None, usual_beta=betas[0], reward_model=learned, few=config.reward_model_prompts)
    return exact_figures(judge, models)


def _require_one_stop_token(models: list[Resolved]) -> None:
    """Refuse models whose responses end in different tokens: one rule cuts all of them.

    Raises:
        MismatchError: naming two of them.
    """
    tokens = {m.label: m.manifest.config.get("stop_token") for m in models if m.manifest is not None}
    first = next(iter(tokens.items()), None)
    for label, token in tokens.items():
        if first is not None and token != first[1]:
            raise MismatchError(
                f"{label} was trained with stop_token {token!r}; expected {first[1]!r}, that of {first[0]}; "
                "compare models whose responses end in the same token"
            )


def run_compare(config: Any, home: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Compare arms with a baseline; writes reports/<name>/results.json and returns its content."""

    def say(text: str) -> None:
        if not quiet:
            console.print(text, markup=False)

    # 1. Models, prompts, reference, judge: the same for all.
    registry = Registry(home)
    device = make_accelerator(config).device
    arms = find_policies(registry, list(config.arms), say)
    baseline = find_policies(registry, [config.baseline], say)[0] if config.baseline else None
    reference = find_policies(registry, [config.reference], say)[0] if config.reference else None
    if reference is None:
        known = [found for arm in arms if (found := reference_of(registry, arm)) is not None]
        reference = known[0] if known else baseline
        for arm, found in zip(arms, [reference_of(registry, arm) for arm in arms], strict=True):
            if found is not None and reference is not None and found.digest != reference.digest:
                say(f"note: {arm.label} was trained against {found.label}; KL is measured to {reference.label} for all")
    models = ([baseline] if baseline is not None else []) + arms
    _require_one_stop_token(models)
    if config.reward_model is None and (trained_on := reward_model_of(registry, models)):
        config = config.model_copy(update={"reward_model": trained_on})
    samples = max([config.samples, *config.best_of])
    bench = set_up(registry, config, models[0], device, reference=reference, samples=samples, seed=config.seed, say=say)

    # 2. Sample and score every model with the same plan.
    measured: list[tuple[Resolved, Samples]] = []
    for resolved in models:
        policy: Policy = bench.policy(resolved)
        measured.append((resolved, measure(bench, policy)))
        say(f"measured {resolved.label}")

    # 3. Rows: figures with intervals, differences to the first row paired by prompt, cost.
    first = measured[0][1]
    primary = primary_figure(first)
    rows = []
    for number, (resolved, found) in enumerate(measured):
        row: dict[str, Any] = {
            "name": resolved.label,
            "model": resolved.label,
            "stage": resolved.stage,
            "digest": resolved.digest,
            "beta": beta_of(resolved),
            "metrics": found.table(),
            "cost": bill(registry, resolved),
        }
        if number and primary is not None:
            row["win_rate"] = win_rate(found, first, primary).as_dict()
            row["difference"] = paired_difference(found, first, primary).as_dict()
            spread = float(np.std(first.values[primary]))
            row["gain_in_sd"] = row["difference"]["mean"] / spread if spread > 0 else None
        rows.append(row)
    rows += best_of_n_rows(bench, first, measured[0][0].label, config.best_of)

    # 4. Write.
    directory = home / "reports" / config.name
    results = {
        "name": config.name,
        "primary": primary,
        "baseline": models[0].label,
        "reference": reference.label if reference is not None else None,
        "reward_model": bench.judge.label if bench.judge is not None else None,
        "prompts": len(bench.plan.prompts),
        "samples": samples,
        "split": config.split,
        "temperature": config.temperature,
        "seed": config.seed,
        "data": bench.data,
        "rows": rows,
        "exact": _exact(bench, config, models),
        "path": str(directory / "results.json"),
    }
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".results.json.{os.getpid()}.tmp"
    temporary.write_text(json.dumps(jsonable(results), indent=2) + "\n")
    os.replace(temporary, directory / "results.json")
    return jsonable(results)
