"""Train a stage's model in place with TRL's trainer, on the examples and in the order of the native loop."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.reward import RewardConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput, Interrupted
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.precision import require_checkpointing
from rlhf_pipeline.training.session import Metrics, Plan, log_update, optimizer_and_schedule, rehearse
from rlhf_pipeline.training.tracking import tell_all
from rlhf_pipeline.training.trl_engine.order import WindowSampler, columns
from rlhf_pipeline.training.trl_engine.trainers import make_trainer
from rlhf_pipeline.training.trl_engine.untouched import contained, untouched
from rlhf_pipeline.training.windows import steps_per_epoch

_SAME = ("learning_rate", "grad_norm")
_SHARED = {
    "sft": ("entropy",),
    "reward": ("accuracy", "margin"),
    "dpo": (
        "entropy",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ),
}
_LOSS = {"sft": "loss/nll", "reward": "loss/bradley_terry", "dpo": "loss/dpo"}
_NOT_OURS = ("epoch", "loss", "step")


def train_with_trl(
    run: Run,
    plan: Plan,
    *,
    examples: Sequence[Example],
    shape: ModelShape,
    reference: nn.Module | None = None,
) -> Metrics:
    """Train the plan's model in place with TRL's trainer of this stage; the counterpart of `train`.

    Data order, optimizer and schedule are those of this package; forward pass, loss, accumulation, clipping and step
    are TRL's. Every optimizer step gets the examples of the native loop, in the same micro-batches. The losses agree,
    except in the last window of an epoch if its micro-batches have different sizes: TRL then averages the means of the
    micro-batches for reward model and DPO, while the native loop averages over pairs.

    Args:
        plan: the trainer uses its `total`, `shown`, `model`, `tokenizer`, `evaluate`, `known` and `health`; it reads no
            checkpoint and takes no snapshots. Of the model only the weights are changed.
        reference: the frozen model of DPO.

    Returns:
        the metrics of the last update.

    Raises:
        BadInput: there are several processes or GPUs. Interrupted: a signal arrived. RunFailed: a loss is not finite.
    """
    import trl
    from datasets import Dataset

    _require_one_device(run)
    config, model = run.config, plan.model
    rehearse(run, plan)
    if config.gradient_checkpointing:
        require_checkpointing(model)
    run.log.say(
        f"engine: TRL {trl.__version__} on transformers; it writes no checkpoints: an interrupted run starts again"
    )
    _warn_of_final_padding(run, plan.tokenizer.pad_token_id, examples)
    if (tokens := getattr(model, "token_count", None)) is not None and run.stage != "reward":
        run.log.say(f"TRL gives probability to the outputs beyond the {tokens} tokens too, the native loop does not")
    sampler = WindowSampler(
        examples,
        micro_batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
    )
    per_epoch = steps_per_epoch(len(examples), sampler.size)
    windows = sampler.all_windows()
    optimizers = optimizer_and_schedule(config, model, plan)
    run.log.total, run.log.shown = plan.total, plan.shown
    moves = isinstance(config, DpoConfig) and config.sync_ref_model
    precomputes = reference is not None and config.precompute_ref_log_probs and not moves
    last: Metrics = {}
    monitor = plan.monitor(run)

    def on_update(step: int, logs: dict[str, float]) -> None:
        nonlocal last
        epoch = step / per_epoch
        members = [examples[index] for index in next(windows)]
        scored = reference is not None and not precomputes
        _count(run.meter, shape, members, trained=True, scored=scored)
        run.meter.optimizer_steps += 1
        last = native_names(run.stage, logs, config) | {"epoch": epoch}
        log_update(run, plan, monitor, step, last, epoch)
        if run.stopped_by is not None and step < plan.total:  # after the last step the model is first registered
            raise Interrupted(
                f"stopped by signal {run.stopped_by} at step {step} of {plan.total}; engine trl keeps no checkpoint: "
                "run the same command to start again",
                run.stopped_by,
            )

    frozen = [] if reference is None else [reference]
    with contained(), untouched(model, *frozen), run.meter.part("training"):
        if precomputes:
            _count(run.meter, shape, examples, scored=True)
        trainer = make_trainer(
            run,
            plan.total,
            model=model,
            reference=reference,
            train_dataset=Dataset.from_dict(columns(run.stage, examples, getattr(config, "use_margin", False))),
            processing_class=copy.deepcopy(plan.tokenizer),  # TRL gives it a PAD if it has none
            optimizers=optimizers,
        )
        trainer.sampler, trainer.on_update = sampler, on_update
        run.phase = "updating"
        trainer.train()
        run.phase = "ending"
    tell_all(run.log, monitor.findings)
    plan.health = monitor.report()
    return last


def _require_one_device(run: Run) -> None:
    if run.accelerator.num_processes > 1:
        raise BadInput(
            f"engine: found trl in {run.accelerator.num_processes} processes, expected one; "
            "start it without a launcher, or use engine: native"
        )
    if run.device.type == "cuda" and torch.cuda.device_count() > 1:
        raise BadInput(
            f"engine: found trl with {torch.cuda.device_count()} GPUs, expected one; "
            "select one with CUDA_VISIBLE_DEVICES, or use engine: native"
        )


def _warn_of_final_padding(run: Run, pad_id: int, examples: Sequence[Example]) -> None:
    """Log responses that end with PAD: transformers' classifiers read the score at the last token that is not PAD."""
    if run.stage != "reward":
        return
    ends = [ids[-1] == pad_id for example in examples for ids in example.completions]
    if any(ends):
        found = f"{sum(ends)} of {len(ends)} responses end in the padding token"
        run.log.say(f"{found}: TRL reads their score at an earlier token, so it differs from the native loop")


def native_names(stage: str, logs: dict[str, float], config: TrainingConfig) -> dict[str, float]:
    """One line of TRL's log with the native names; metrics without a native counterpart are under `trl/`.

    TRL reports the sum of a loss and the term beside it (centering, SFT), which is logged as `loss`. The scores of
    chosen and rejected responses follow from their common mean m and their margin d: m + d/2 and m - d/2.
    """
    beside = config.center_rewards_coefficient if isinstance(config, RewardConfig) else None
    beside = config.sft_term if isinstance(config, DpoConfig) else beside
    loss = "loss" if beside else _LOSS[stage]
    metrics = {loss: logs["loss"]}
    shared = (*_SHARED[stage], *_SAME)
    metrics |= {name: float(logs[name]) for name in shared if name in logs}
    if stage == "reward":
        metrics["chosen_score"] = logs["mean_reward"] + logs["margin"] / 2
        metrics["rejected_score"] = logs["mean_reward"] - logs["margin"] / 2
    if isinstance(config, DpoConfig):
        metrics["logps/chosen_minus_reference"] = logs["rewards/chosen"] / config.beta
    rest = {name: value for name, value in logs.items() if name not in (*shared, *_NOT_OURS)}
    return metrics | {f"trl/{name}": float(value) for name, value in rest.items()}


def _count(
    meter: CostMeter, shape: ModelShape, examples: Sequence[Example], *, trained: bool = False, scored: bool = False
) -> None:
    """Count the cost of examples as TRL computes them: one row for each prompt with a completion, without padding.

    trained: count a forward and a backward pass. scored: count a forward pass of the reference.
    """
    tokens = context = head = 0
    for example in examples:
        for ids in example.completions:
            length = len(example.prompt_ids) + len(ids)
            tokens += length
            context += length * (length + 1) // 2
            head += len(ids)
    meter.flops += shape.training_flops(tokens, context, head) if trained else 0.0
    meter.flops += shape.forward_flops(tokens, context, head) if scored else 0.0
    meter.tokens_trained += tokens if trained else 0
