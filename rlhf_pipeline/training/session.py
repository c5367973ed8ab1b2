"""The work around the training loop: prepare, restore, log, evaluate, save, stop on a signal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import Interrupted, MismatchError, RunFailed, first_line
from rlhf_pipeline.health.monitor import Monitor, facts_of
from rlhf_pipeline.health.watches import WATCHES
from rlhf_pipeline.models.loading import save_model
from rlhf_pipeline.models.memory import ADVICE
from rlhf_pipeline.models.refusals import ran_out
from rlhf_pipeline.models.saving import mend_generation, require_saving
from rlhf_pipeline.models.sharding import whole_state
from rlhf_pipeline.training.best import Best
from rlhf_pipeline.training.checkpoint import Checkpoint, replacing, restore, save_checkpoint
from rlhf_pipeline.training.cost import COUNTS, JUDGE
from rlhf_pipeline.training.failure import failed_update, put_aside, user_error, write_failure
from rlhf_pipeline.training.finite import NotFinite
from rlhf_pipeline.training.loop import Step, fit
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.optimizer import MetricSchedule, optimizer_of, schedule_of
from rlhf_pipeline.training.precision import checkpoint_activations, uses_bf16
from rlhf_pipeline.training.ranks import of_the_first
from rlhf_pipeline.training.rounding import changed_share, sample_weights
from rlhf_pipeline.training.tracking import tell, tell_all
from rlhf_pipeline.training.windows import Window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Metrics = dict[str, float]


@dataclass
class Plan:
    """What a stage passes to `train`.

    windows: called with (the prepared model, updates done before); yields the remaining windows.
    total: number of updates. shown: names of the metrics in the live line.
    derive: converts the metrics of an update into those that are logged.
    model, tokenizer: what the stage publishes; `train` writes snapshots of them.
    inputs: digests of the models and data of the run; a checkpoint with other inputs is refused.
    evaluate: returns the metrics of an evaluation.
    warmup_offset: see `rate_factor`. 0: the first update of a warm-up has rate 0, as in transformers.
    known: facts that the watches need besides the config (fields of `Facts`).
    health: the findings of the watches for the manifest, filled in by `train`.
    best: the best evaluation, if the run follows its metric, filled in by `train`.
    """

    windows: Callable[[nn.Module, int], Iterable[Window]]
    step: Step
    total: int
    shown: Sequence[str]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    inputs: Mapping[str, str | None]
    derive: Callable[[Metrics], Metrics] = lambda metrics: metrics
    evaluate: Callable[[], Metrics] | None = None
    warmup_offset: int = 0
    known: Mapping[str, Any] = field(default_factory=dict)
    health: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def monitor(self, run: Run) -> Monitor:
        """The watches of the run's stage."""
        facts = facts_of(run.config, self.total, run.shares, self.known, bf16=uses_bf16(run.config))
        return Monitor(WATCHES[run.stage], facts)


def _every(setting: int | tuple[int, ...] | None, step: int) -> bool:
    if setting is None:
        return False
    return step in setting if isinstance(setting, tuple) else step % setting == 0


def is_due(strategy: str, every: float | None, step: int, total: int, epoch: float) -> bool:
    """Whether a run evaluates or saves after a step.

    Args:
        strategy: no, steps or epoch; best depends on the evaluations, not on the step. every: the number of steps, or
            below 1 a fraction of all steps, rounded up.
        total: steps of the run. epoch: number of epochs done after this step.
    """
    if strategy == "epoch":
        before = epoch * (step - 1) / step  # epochs are proportional to steps
        return int(before + 1e-9) < int(epoch + 1e-9)
    if strategy in ("no", "best") or every is None:
        return False
    return step % (math.ceil(every * total) if every < 1 else int(every)) == 0


def _agree_to_stop(run: Run) -> int | None:
    """The signal to any process before this update's end, which stops all; one that comes later waits for the next."""
    if run.accelerator.num_processes == 1:
        return run.stopped_by
    signals = run.accelerator.gather(torch.tensor([run.stopped_by or 0], device=run.device))
    return int(signals.max()) or None


def _require_same_inputs(run: Run, checkpoint: Checkpoint, inputs: Mapping[str, str | None]) -> None:
    """Refuse to resume from a checkpoint that was made with other models or data.

    Raises:
        MismatchError: the inputs differ; the message names them.
    """
    before = checkpoint.state["extra"].get("inputs", {})
    changed = sorted(name for name in {*before, *inputs} if before.get(name) != inputs.get(name))
    if changed:
        listed = ", ".join(
            f"{name} (found {str(inputs.get(name))[:12]}, the checkpoint has {str(before.get(name))[:12]})"
            for name in changed
        )
        raise MismatchError(
            f"run {run.id} was started with other inputs: {listed}; restore them, or start a new run with --no-resume"
        )


def _user_error(run: Run, error: Exception, plan: Plan, known: Mapping[str, Any]) -> Exception:
    """The error for the user; for a figure that is not finite, its batch is written first."""
    if isinstance(error, NotFinite):
        try:
            kept = f"the batch is stored in {write_failure(run.directory, error, known, plan.tokenizer)}"
        except Exception as unwritten:  # the cause that stopped the run is always reported
            kept = f"the batch could not be stored ({first_line(unwritten)})"
        error = user_error(error, run.checkpoints, kept)
    elif ran_out(error):
        error = RunFailed(f"out of memory: {first_line(error)}; {ADVICE}")
    if isinstance(error, RunFailed) and error.agreed:
        run.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one exits
    return error


def optimizer_and_schedule(config: TrainingConfig, model: nn.Module, plan: Plan) -> tuple[Optimizer, Any]:
    """The optimizer of a config and the schedule of its learning rate."""
    optimizer = optimizer_of(config, model)
    return optimizer, schedule_of(config, optimizer, plan.total, offset=plan.warmup_offset)


def log_update(
    run: Run, plan: Plan, monitor: Monitor, step: int, metrics: Metrics, epoch: float, shares: str = ""
) -> Metrics:
    """Log an update, the evaluation after it if one is due, and the findings of the watches; return the evaluation."""
    tell(run.log, monitor.update(step, metrics))
    run.log.update(step, metrics | monitor.lasting(), shares)
    config = run.config
    if plan.evaluate is not None and is_due(config.eval_strategy, config.eval_steps, step, plan.total, epoch):
        # The last bits may differ between GPUs, and what follows from these figures must not.
        figures = of_the_first(run.accelerator, plan.evaluate())
        run.log.record(step, figures)
        tell(run.log, monitor.update(step, figures))
        return figures
    return {}


def rehearse(run: Run, plan: Plan) -> None:
    """Check before training that the model can be published, and log what was mended for that.

    Raises:
        BadInput: see `require_saving`.
    """
    if mended := mend_generation(plan.model):
        run.log.say(f"note: {mended}")
    if run.accelerator.is_main_process:
        require_saving(plan.model, plan.tokenizer)


def train(run: Run, model: nn.Module, plan: Plan) -> Metrics:
    """Train `model` in place, from the run's checkpoint if it has one.

    Returns:
        the metrics of the last update.

    Raises:
        Interrupted: a signal arrived; a checkpoint was written.
        RunFailed: a figure is not finite (runs/<id>/failure/ holds the batch), or memory ran out.
    """
    config = run.config
    rehearse(run, plan)
    model.train()  # every part: a part in eval mode (a critic copied from a frozen model) would keep its activations
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    optimizer, scheduler = optimizer_and_schedule(config, model, plan)
    start = 0
    inputs = {**plan.inputs, "processes": str(run.shares)}
    if config.bf16 == "auto":  # the machine that resumes may decide otherwise
        inputs["precision"] = "bf16" if uses_bf16(config) else config.dtype
    last: Metrics = {}
    monitor = plan.monitor(run)
    best = Best(config, run.directory, writes=run.accelerator.is_main_process)
    if config.follows_metric:
        best.require(plan.evaluate is not None)
    ended_early = False
    if run.checkpoint is not None:
        _require_same_inputs(run, run.checkpoint, inputs)
        extra = restore(run.checkpoint, model=model, optimizer=optimizer, scheduler=scheduler)
        start, last = run.checkpoint.step, extra["last"]
        _restore_meter(run, extra["cost"])
        monitor.restore(extra.get("health"))
        best.restore(extra.get("best"))
        ended_early = best.given_up  # interrupted at the very step that would have been the last
        run.memory.halvings |= extra.get("halvings", {})
        other = run.shares != run.accelerator.num_processes
        began = f"; it began in {run.shares} processes, and a step keeps its number of examples" if other else ""
        run.log.say(f"resumed at step {start} of {plan.total}{began}")
    run.log.total, run.log.shown = plan.total, plan.shown
    prepared, prepared_optimizer = run.prepared(model, optimizer)
    failed_at = failed_update(run.directory) if run.accelerator.is_main_process else None
    weights = sample_weights(model.parameters())

    counts = ("flops", "tokens_trained", "tokens_generated")
    before = {name: getattr(run.meter, name) for name in counts}

    def over_ranks() -> Metrics:
        """The meter's counts, summed over all ranks."""
        grown = [getattr(run.meter, name) - before[name] for name in counts]
        if run.accelerator.num_processes > 1:
            here = torch.tensor(grown, dtype=torch.float64, device=run.device)
            grown = run.accelerator.reduce(here, "sum").tolist()
        totals = [before[name] + value for name, value in zip(counts, grown, strict=True)]
        return dict(zip(counts, (totals[0], *map(int, totals[1:])), strict=True))

    def save(step: int) -> None:
        counted = asdict(run.meter) | over_ranks() | {"wall": run.meter.wall_seconds()}
        if not (run.accelerator.is_main_process or run.sharded):
            return
        counted["optimizer_steps"] += 1  # the window of this update is not counted yet
        run.log.sync()
        save_checkpoint(
            run.checkpoints,
            step,
            model=model,
            optimizer=optimizer,
            scheduler=scheduler,
            extra={
                "cost": counted,
                "last": last,
                "inputs": inputs,
                "health": monitor.state(),
                "best": best.state(),
                "halvings": run.memory.halvings,
            },
            keep=config.save_total_limit,
            writes=run.accelerator.is_main_process,
        )
        best.saved()

    def on_update(step: int, metrics: Metrics, window: Window) -> None:
        nonlocal last, failed_at, ended_early
        last = plan.derive(metrics)
        if weights and 3 * (step - start) >= plan.total:
            last["weights/changed"] = changed_share(weights)
        shares = "  ".join(f"{name} {share:.0%}" for name, share in run.meter.shares().items())
        figures = log_update(run, plan, monitor, step, last, window.epoch, shares)
        if figures and isinstance(scheduler, MetricSchedule):
            scheduler.measured(figures[best.metric])
        if figures and config.follows_metric:
            ended_early = best.consider(step, figures[best.metric], model)
        if failed_at is not None and step >= failed_at:
            kept, failed_at = put_aside(run.directory), None
            run.log.say(f"update {step}, which had failed before, is done; the record of the failure is now in {kept}/")
        if _every(config.snapshot_steps, step):
            # Every rank takes part in the count; the window of this update is not counted yet.
            run.meter.mark(step, **over_ranks(), optimizer_steps=run.meter.optimizer_steps + 1)
            state = whole_state(plan.model)
            if run.accelerator.is_main_process:
                with replacing(run.directory / "snapshots" / f"step-{step}") as staged:
                    save_model(plan.model, plan.tokenizer, staged, state)
        if (number := _agree_to_stop(run)) is not None:
            save(step)
            run.accelerator.wait_for_everyone()  # a launcher ends all processes when the first one exits
            raise Interrupted(
                f"stopped by signal {number} at step {step} of {plan.total}; run the same command to resume",
                number,
            )
        due = is_due(config.save_strategy, config.save_steps, step, plan.total, window.epoch)
        if step < plan.total and (due or (config.save_strategy == "best" and best.step == step)):
            save(step)

    def counted(windows: Iterable[Window]) -> Iterable[Window]:
        for window in () if ended_early else windows:
            yield window
            run.meter.optimizer_steps += 1  # the loop asks for the next window after its step
            if ended_early:
                return

    run.phase = "updating"
    try:
        with run.meter.part("training"):
            fit(
                prepared,
                counted(plan.windows(prepared, start)),
                plan.step,
                optimizer=prepared_optimizer,
                scheduler=scheduler,
                accelerator=run.accelerator,
                max_grad_norm=config.max_grad_norm,
                on_update=on_update,
                start=start,
                memory=run.memory,
            )
    except Exception as error:
        known = {"learning_rate": scheduler.get_last_lr()[0], "last_metrics": last, "parents": inputs}
        failed = _user_error(run, error, plan, known)
        if failed is error:
            raise
        raise failed from error
    run.phase = "ending"
    for name, value in over_ranks().items():
        setattr(run.meter, name, value)
    if best.step is not None:
        _end_with_best(run, plan, model, best, ended_early)
    tell_all(run.log, monitor.findings)
    plan.health = monitor.report()
    return last


def _end_with_best(run: Run, plan: Plan, model: nn.Module, best: Best, ended_early: bool) -> None:
    """Log the best evaluation, and put its weights into the model if the config asks for them."""
    assert best.value is not None
    plan.best = {"metric": best.metric, "value": best.value, "step": best.step, "ended_early": ended_early}
    if ended_early:
        misses = f"{best.misses} evaluation{'s' if best.misses > 1 else ''} in a row"
        run.log.say(f"stopped early: {misses} did not better the one of step {best.step}")
    if run.config.load_best_model_at_end:
        run.accelerator.wait_for_everyone()
        best.load(model)
        run.log.say(f"the weights are those of step {best.step}, whose {best.metric} is the best: {best.value:.4g}")


def _restore_meter(run: Run, cost: dict[str, Any]) -> None:
    meter = run.meter
    for name in COUNTS:
        setattr(meter, name, cost[name])
    meter.seconds = dict(cost["seconds"])
    meter.earlier_seconds = cost["wall"] + meter.seconds.get(JUDGE, 0.0)
    meter.judge_flops = cost.get("judge_flops", 0.0)
    meter.at_step = dict(cost.get("at_step", {}))  # checkpoints of earlier versions have none
