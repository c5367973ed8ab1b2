"""Train a stage's model in place with TRL's trainer, on the examples and in the order of the native loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput, Interrupted
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.optimizer import make_optimizer, make_scheduler
from rlhf_pipeline.training.precision import require_checkpointing
from rlhf_pipeline.training.session import Metrics, Plan, evaluates_at
from rlhf_pipeline.training.tracking import tell, tell_all
from rlhf_pipeline.training.trl_engine.metric_names import native_names
from rlhf_pipeline.training.trl_engine.order import COLUMNS, WindowSampler
from rlhf_pipeline.training.trl_engine.trainers import make_trainer
from rlhf_pipeline.training.trl_engine.untouched import contained, untouched
from rlhf_pipeline.training.windows import steps_per_epoch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def train_with_trl(
    run: Run,
    plan: Plan,
    *,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    shape: ModelShape,
    reference: nn.Module | None = None,
) -> Metrics:
    """Train `model` in place with TRL's trainer of this stage; the counterpart of `train`.

    Data order, optimizer and schedule are those of this package; forward pass, loss, accumulation, clipping and step
    are TRL's. Every optimizer step gets the examples of the native loop, in the same micro-batches. The losses agree,
    except in the last window of an epoch if its micro-batches have different sizes: TRL then averages the means of the
    micro-batches for reward model and DPO, while the native loop averages over pairs.

    Args:
        plan: the trainer uses its `total`, `shown`, `evaluate`, `known` and `health`; it reads no checkpoint and takes
            no snapshots.
        model: the plain transformers model; only its weights are changed.
        reference: the frozen model of DPO.

    Returns:
        the metrics of the last update.

    Raises:
        BadInput: there are several processes or GPUs. Interrupted: a signal arrived. RunFailed: a loss is not finite.
    """
    import trl
    from datasets import Dataset

    _require_one_device(run)
    config = run.config
    if config.gradient_checkpointing:
        require_checkpointing(model)
    run.log.say(
        f"engine: TRL {trl.__version__} on transformers; it writes no checkpoints: an interrupted run starts again"
    )
    _warn_of_final_padding(run, tokenizer.pad_token_id, examples)
    sampler = WindowSampler(
        examples,
        micro_batch_size=config.per_device_train_batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
    )
    per_epoch = steps_per_epoch(len(examples), sampler.size)
    windows = sampler.all_windows()
    optimizer = make_optimizer(
        model.parameters(),
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
    )
    scheduler = make_scheduler(optimizer, config.lr_scheduler_type, warmup_steps=config.warmup_steps, total=plan.total)
    run.log.total, run.log.shown = plan.total, plan.shown
    precomputes = reference is not None and config.precompute_ref_log_probs
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
        tell(run.log, monitor.update(step, last))
        run.log.update(step, last | monitor.lasting())
        if plan.evaluate is not None and evaluates_at(config, step, epoch):
            figures = plan.evaluate()
            run.log.record(step, figures)
            tell(run.log, monitor.update(step, figures))
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
            train_dataset=Dataset.from_dict(COLUMNS[run.stage](examples)),
            processing_class=tokenizer,
            optimizers=(optimizer, scheduler),
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
