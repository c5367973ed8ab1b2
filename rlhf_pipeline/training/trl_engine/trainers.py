"""TRL's trainers with this package's data, order and log; losses and steps are TRL's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.training.precision import uses_bf16
from rlhf_pipeline.training.trl_engine.order import WindowSampler

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from rlhf_pipeline.training.open_run import Run

DPO_LOSSES = {
    "sigmoid": "sigmoid",
    "robust": "robust",
    "hinge": "hinge",
    "ipo_mean": "ipo",
    "sigmoid_norm": "sigmoid_norm",
    "apo_zero": "apo_zero",
}
"""This package's `loss_type` -> TRL's."""

DIVERGENCES = {"js": "js_divergence", "alpha": "alpha_divergence"}
"""This package's `f_divergence` -> TRL's, where they differ."""


class Driven:
    """A mixin for TRL's trainers that sets their examples, order and log."""

    sampler: WindowSampler
    on_update: Callable[[int, dict[str, float]], None]
    state: Any  # an attribute of the trainer, like the next one
    _tr_loss: Any

    def _prepare_dataset(self, dataset: Any, *_args: Any, **_options: Any) -> Any:
        """Return the ids unchanged: no chat template, EOS, truncation, filter or shuffling."""
        return dataset

    def _get_train_sampler(self, *_args: Any) -> WindowSampler:
        return self.sampler

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Refuse to step on a loss or gradient that is not finite, as the native loop does."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[misc]
        loss = float(self._tr_loss)  # of this step only, because every step is logged
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise RunFailed(
                f"update {self.state.global_step + 1}: the loss or the gradient is not finite (loss {loss}, gradient "
                f"norm {float(norm)}); this step was not applied; try a smaller learning_rate, a smaller "
                "max_grad_norm, or fp32"
            )
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)  # type: ignore[misc]  # adds TRL's own metrics to `logs`
        if "loss" in logs:
            self.on_update(self.state.global_step, logs)


def common_arguments(run: Run, total: int) -> dict[str, Any]:
    """The common arguments of TRL's three configs."""
    config = run.config
    return {
        "output_dir": str(run.directory),
        "max_steps": total,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "learning_rate": config.learning_rate,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "bf16": uses_bf16(config),
        "use_cpu": run.device.type == "cpu",
        "max_length": None,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "gradient_checkpointing": config.gradient_checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "dataloader_pin_memory": False,
        # This run already has an Accelerator: the trainer must not reset its shared state.
        "accelerator_config": {"use_configured_state": True},
    }


def make_trainer(
    run: Run,
    total: int,
    *,
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    **options: Any,
) -> Any:
    """TRL's trainer of this stage, without its sampler.

    Args:
        options: arguments of the trainer: train_dataset, processing_class, optimizers.
    """
    import trl
    from transformers import PrinterCallback

    config, common = run.config, common_arguments(run, total)
    # TRL's other trainers would set an adapter's dropout to 0 as well; the model's own is already 0.
    dropout: dict[str, Any] = {"disable_dropout": not config.lora_dropout}
    base: type[Trainer]
    arguments: TrainingArguments
    if run.stage == "sft":
        # Without a coefficient TRL adds the load-balancing loss that a mixture-of-experts config names.
        base, arguments = trl.SFTTrainer, trl.SFTConfig(**common, router_aux_loss_coef=0.0)
    elif run.stage == "reward":
        base = trl.RewardTrainer
        centering = config.center_rewards_coefficient or None
        arguments = trl.RewardConfig(**common, **dropout, center_rewards_coefficient=centering)
    else:
        base, options = trl.DPOTrainer, {**options, "ref_model": reference}
        arguments = trl.DPOConfig(
            **common,
            **dropout,
            router_aux_loss_coef=0.0,
            beta=config.beta,
            loss_type=[*(DPO_LOSSES[name] for name, _ in config.losses), *["sft"] * bool(config.sft_term)],
            loss_weights=[*(weight for _, weight in config.losses), *[config.sft_term] * bool(config.sft_term)],
            label_smoothing=config.label_smoothing,
            f_divergence_type=DIVERGENCES.get(config.f_divergence, config.f_divergence),
            f_alpha_divergence_coef=config.alpha,
            ld_alpha=config.ld_alpha,
            precompute_ref_log_probs=config.precompute_ref_log_probs and not config.sync_ref_model,
            sync_ref_model=config.sync_ref_model,
            ref_model_mixup_alpha=config.mixup_alpha,
            ref_model_sync_steps=config.sync_steps,
        )
    trainer = type(f"Driven{base.__name__}", (Driven, base), {})(model=model, args=arguments, **options)
    trainer.remove_callback(PrinterCallback)  # this package writes the log
    return trainer
