"""When a run evaluates, on how many rows, which evaluation is the best, and when it stops early."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, model_validator

from rlhf_pipeline.config.base import Count, NonNegative, Text, option, wrong
from rlhf_pipeline.config.optim import SCHEDULES, WithOptimizer
from rlhf_pipeline.errors import Fault, did_you_mean

_PAIRS = {"eval_accuracy": True, "eval_nll": False, "eval_brier": False, "eval_ece": False}
METRICS: dict[str, dict[str, bool]] = {
    "sft": {"eval_nll": False, "eval_nll_per_sequence": False, "eval_reward": True},
    "train-rm": _PAIRS,
    "dpo": _PAIRS,
}
"""The metrics of evaluations, by stage, and whether a greater value is better."""

_OTHER_NAMES = {"eval_loss": "eval_nll", "eval_rewards/accuracies": "eval_accuracy"}
"""Names of transformers and TRL for the same figures."""


def _cadence(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and (0 < value < 1 or (value >= 1 and float(value).is_integer()))):
        raise wrong("a whole number >= 1, or a fraction between 0 and 1")
    return int(value) if number and value >= 1 else value


Cadence = Annotated[int | float | None, BeforeValidator(_cadence)]


class WithEvaluation(WithOptimizer):
    """A config of a run that evaluates; it can end with the weights of its best evaluation, or stop early."""

    logging_steps: Count = option(10, "steps between two lines of the log (TRL)")
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no", "when to evaluate on the test split (transformers); eval_steps implies 'steps'"
    )
    eval_steps: Cadence = option(
        None, "steps between evaluations; below 1: a fraction of all steps (transformers: logging_steps)"
    )
    max_eval_samples: Count | None = option(
        2000, "maximum number of rows of the test split to evaluate on, in hash order; null: all (ours)"
    )
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "steps",
        "when to write checkpoints: every save_steps, at the end of every epoch, after an evaluation that is the best "
        "so far, or never (transformers)",
    )
    load_best_model_at_end: bool = option(
        False, "register the weights of the best evaluation instead of the last ones (transformers)"
    )
    metric_for_best_model: Text | None = option(
        None, "metric of the best evaluation, with or without eval_ (transformers: the loss, eval_nll here)"
    )
    greater_is_better: bool | None = option(
        None, "whether a greater metric is better (default: yes for accuracy, no for the others)"
    )
    early_stopping_patience: Count | None = option(
        None, "stop after this number of evaluations in a row that are not better than the best before (ours: never)"
    )
    early_stopping_threshold: NonNegative = option(
        0.0, "how much better an evaluation must be to count for early_stopping_patience (transformers)"
    )

    @model_validator(mode="before")
    @classmethod
    def _eval_steps_imply_strategy(cls, values: Any) -> Any:
        implied = isinstance(values, dict) and values.get("eval_steps") is not None
        return {"eval_strategy": "steps", **values} if implied else values

    @model_validator(mode="after")
    def _fill_eval_steps(self) -> WithEvaluation:
        if self.eval_strategy == "steps" and self.eval_steps is None:
            object.__setattr__(self, "eval_steps", self.logging_steps)
        return self

    @property
    def follows_metric(self) -> bool:
        """Whether the run needs the metric: for its best weights or checkpoints, or to stop early."""
        return self.load_best_model_at_end or self.early_stopping_patience is not None or self.save_strategy == "best"

    @property
    def following_key(self) -> str:
        """The key that makes the run follow the metric."""
        if self.load_best_model_at_end:
            return "load_best_model_at_end"
        return "save_strategy" if self.early_stopping_patience is None else "early_stopping_patience"

    @property
    def best_metric(self) -> str:
        """The name of the metric that decides which evaluation is the best; by default the loss."""
        name = self.metric_for_best_model or "eval_loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        return _OTHER_NAMES.get(name, name)

    @property
    def best_is_greatest(self) -> bool:
        """Whether a greater value of the metric is better."""
        if self.greater_is_better is not None:
            return self.greater_is_better
        return METRICS.get(self.stage, {}).get(self.best_metric, False)


def check_metric(config: WithEvaluation) -> Iterator[Fault]:
    """Yield the faults of a metric that no evaluation measures, and of a threshold without patience."""
    known, given = METRICS.get(config.stage), config.metric_for_best_model
    if given is not None and known is not None and config.best_metric not in known:
        near = did_you_mean(given, [*known, *(name.removeprefix("eval_") for name in known)])
        found = f"found {given!r}, which an evaluation of {config.stage} does not measure"
        yield Fault("metric_for_best_model", found, f"one of {', '.join(known)}", near)
    if config.early_stopping_threshold and config.early_stopping_patience is None:
        yield Fault("early_stopping_threshold", "there is no early_stopping_patience", "early_stopping_patience")


def check_eval(config: WithEvaluation) -> Iterator[Fault]:
    """Yield the fault of `eval_steps` with a strategy that does not use it."""
    if config.eval_steps is not None and config.eval_strategy != "steps":
        found = f"eval_strategy {config.eval_strategy!r} does not use eval_steps"
        yield Fault("eval_steps", found, "eval_strategy 'steps', or no eval_steps")


def check_evaluations(config: WithEvaluation) -> Iterator[Fault]:
    """Yield the faults of keys that follow the metric of evaluations, in a run that has none."""
    schedule = config.lr_scheduler_type
    if SCHEDULES[schedule].measures and config.eval_strategy == "no":
        found = f"{schedule} follows the metric of evaluations, but eval_strategy is no"
        yield Fault("lr_scheduler_type", found, "eval_strategy steps or epoch, or another schedule")
    if config.stage == "ppo" and "max_eval_samples" in config.model_fields_set and config.max_eval_samples != 2000:
        yield Fault("max_eval_samples", "ppo makes no evaluation on held-out rows", "no max_eval_samples")
    if not config.follows_metric:
        return
    key = config.following_key
    if config.stage == "ppo":
        fix = "use snapshot_steps, and compare the snapshots by rlhf compare --snapshots"
        yield Fault(key, "ppo makes no evaluation on held-out rows", f"no {key}", fix)
    elif config.eval_strategy == "no":
        yield Fault(key, "there is no evaluation: eval_strategy is no", "eval_strategy steps or epoch, or eval_steps")
