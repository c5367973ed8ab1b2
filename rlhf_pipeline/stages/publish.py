"""What a training stage records: its inputs, the options that move the optimum, its model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.base import spelled
from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.data.load import SourceReport
from rlhf_pipeline.data.tokenizers import chat_template_digest, tokenizer_digest
from rlhf_pipeline.models.adapters import adapter_facts
from rlhf_pipeline.models.loading import save_model
from rlhf_pipeline.models.sharding import whole_state
from rlhf_pipeline.registry.optimum import optimum_fields
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.stages.result import StageResult
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.precision import uses_bf16
from rlhf_pipeline.training.run_directory import finish_run
from rlhf_pipeline.training.session import Plan


def inputs_of(parents: Mapping[str, Resolved], reports: Sequence[SourceReport]) -> dict[str, str | None]:
    """Digests of the inputs of a run: its parents by role, and its data."""
    data = {f"{report.role or 'data'} {report.source} [{report.split}]": report.digest for report in reports}
    return {role: resolved.digest for role, resolved in parents.items()} | data


def log_moves(run: Run, parents: Mapping[str, Resolved]) -> None:
    """Log the options of this run and of its reward models that move the optimum."""
    fields = optimum_fields(run.config, parents)
    moved, may_move = (", ".join(f"{k}={spelled(v)}" for k, v in fields[name].items()) for name in fields)
    if moved and run.stage == "reward":
        run.log.say(
            f"these options move the minimiser of the reward model: {moved}; PPO on this model has another optimum "
            "than DPO at the same beta, and `rlhf compare` refuses to compare the two"
        )
    elif moved:
        run.log.say(f"these options move the optimum away from pi_ref exp(r / beta): {moved}")
    if may_move:
        run.log.say(
            f"note: {may_move} does not move the optimum if the critic is exact (with lam 1: never); "
            "val/explained_variance is the share of the returns' variance that the critic explains"
        )


def publish(
    run: Run,
    plan: Plan,
    *,
    parents: Mapping[str, Resolved],
    reports: Sequence[SourceReport],
    metrics: dict[str, Any],
) -> StageResult:
    """Register the plan's model with its snapshots, end the run, and return the result."""
    run.accelerator.wait_for_everyone()
    state = whole_state(plan.model)
    if not run.accelerator.is_main_process:
        return StageResult(run.stage, "", "", str(run.directory), metrics, {})
    snapshots = run.directory / "snapshots"

    def write(directory: Path) -> None:
        save_model(plan.model, plan.tokenizer, directory, state)
        if snapshots.is_dir():
            shutil.copytree(snapshots, directory / "snapshots")

    if plan.best is not None:
        metrics = {**metrics, "best": plan.best}
    if run.config.bf16 == "auto":
        metrics = {**metrics, "bf16": uses_bf16(run.config)}
    if run.shares > 1:
        metrics = {**metrics, "processes": run.shares}
    cost, tokenizer = run.meter.report(), plan.tokenizer
    # A process that was killed between registering and finishing has already registered this model.
    published = run.registry.models.of_run(run.config.output_name, run.origin) or run.registry.publish(
        run.config.output_name,
        run.stage,
        write,
        number=run.number,
        run=run.origin,
        config=run.config.model_dump(mode="json"),
        config_digest=config_digest(run.config),
        parents=dict(parents),
        data=[report.to_dict() for report in reports],
        tokenizer_digest=tokenizer_digest(tokenizer),
        chat_template_digest=chat_template_digest(tokenizer),
        seed=run.config.seed,
        metrics=metrics,
        **optimum_fields(run.config, parents),
        cost=cost,
        adapter=adapter_facts(plan.model),
    )
    run.log.say(f"registered {published.label}")
    if run.config.output_dir is not None:
        run.log.say(f"copied to {run.registry.export(published.label, run.config.output_dir, replace=True)}")
    finish_run(run.directory, published.label)
    path, directory = str(published.path), str(run.directory)
    return StageResult(run.stage, published.label, path, directory, metrics, cost, run.stopped_by)
