"""Optimizers and learning-rate schedules, by transformers' names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, Muon, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR

from rlhf_pipeline.config.optim import SCHEDULES
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import ConfigError, Fault

OWN = ("linear", "cosine", "constant", "constant_with_warmup")
"""Schedules that `rate_factor` computes: importing transformers' takes longer than the first steps of a small run."""


def optimizer_of(config: TrainingConfig, model: nn.Module) -> Optimizer:
    """The optimizer of a config for the trained parameters of a model."""
    return make_optimizer(
        model.parameters(),
        name=config.optim,
        learning_rate=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        arguments=config.optim_args,
        vectors=embedding_parameters(model) if config.optim == "muon" else (),
    )


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    name: str = "adamw_torch_fused",
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    arguments: Mapping[str, Any] | None = None,
    vectors: Iterable[nn.Parameter] = (),
) -> Optimizer:
    """The optimizer of a name; weight decay applies to matrices only, not to vectors (norms, biases).

    Source: transformers, `trainer_optimizer.py`, for names and defaults; AdamW: Loshchilov and Hutter 2019; Adafactor
    with a given learning rate: Shazeer and Stern 2018; bitsandbytes: Dettmers et al. 2022.

    Args:
        arguments: `optim_args`. vectors: matrices that Muon leaves to AdamW.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    flat = [parameter for parameter in trained if parameter.ndim <= 1]

    def grouped(decayed: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": held, "weight_decay": rate} for held, rate in ((decayed, weight_decay), (flat, 0.0)) if held]

    groups = grouped(matrices)
    given: dict[str, Any] = dict(arguments or {})
    if name in ("adamw_torch_fused", "adamw_torch"):
        return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=name == "adamw_torch_fused")
    if name in ("lion", "lion_32bit"):
        return Lion(groups, lr=learning_rate, betas=betas)
    if name == "muon":
        apart = {id(parameter) for parameter in vectors}
        hidden = [one for one in matrices if one.ndim == 2 and id(one) not in apart]
        rest = [one for one in matrices if one.ndim != 2 or id(one) in apart]
        options: dict[str, Any] = {"lr": learning_rate, "weight_decay": weight_decay, "arguments": given}
        return MuonWithAdamW(hidden, grouped(rest), betas=betas, eps=eps, **options)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=learning_rate, scale_parameter=False, relative_step=False, **given)
    kinds: dict[str, type[Optimizer]] = {"sgd": SGD, "rmsprop": RMSprop, "adagrad": Adagrad}
    if name in kinds:
        return kinds[name](groups, lr=learning_rate, **given)  # type: ignore[call-arg]
    return _bitsandbytes(name, groups, given, lr=learning_rate, betas=betas, eps=eps)


def _bitsandbytes(
    name: str,
    groups: list[dict[str, Any]],
    given: dict[str, Any],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> Optimizer:
    """An optimizer of bitsandbytes, whose state has 8 bits per entry, or can be paged to the CPU's memory."""
    from bitsandbytes import optim  # type: ignore[import-not-found, unused-ignore]

    options: dict[str, Any] = {"lr": lr, "optim_bits": 8 if "8bit" in name else 32}
    parts: Any = groups  # bitsandbytes declares parameters alone, and reads groups as torch does
    if "rmsprop" in name:
        return optim.RMSprop(parts, **options, **given)
    options["is_paged"] = name.startswith("paged")
    if "ademamix" in name:
        three = (given.pop("beta1", betas[0]), given.pop("beta2", betas[1]), given.pop("beta3", 0.9999))
        return optim.AdEMAMix(parts, betas=three, eps=given.pop("eps", eps), **options, **given)
    if "lion" in name:
        return optim.Lion(parts, betas=betas, **options)
    return optim.AdamW(parts, betas=betas, eps=eps, **options)


class Lion(Optimizer):
    """w <- w - lr (sign(b1 m + (1 - b1) g) + decay w); m <- b2 m + (1 - b2) g.

    Source: Chen et al. 2023 (arXiv 2302.06675), algorithm 2; `lion_32bit` of bitsandbytes computes the same.
    """

    def __init__(self, groups: Iterable[Any], *, lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, (beta1, beta2) = group["lr"], group["betas"]
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["exp_avg"] = torch.zeros_like(parameter)
                average = state["exp_avg"]
                parameter.mul_(1 - lr * group["weight_decay"])
                parameter.add_(average.lerp(gradient, 1 - beta1).sign_(), alpha=-lr)
                average.lerp_(gradient, 1 - beta2)


class MuonWithAdamW(Optimizer):
    """Muon for hidden matrices, AdamW for everything else, as one optimizer at one learning rate.

    Muon's step is 0.2 sqrt(max(rows, columns)) times the orthogonalised momentum (`adjust_lr_fn: match_rms_adamw`,
    Liu et al. 2025, arXiv 2502.16982), so that one learning rate suits both.

    Source: torch.optim.Muon; Jordan et al. 2024.
    """

    def __init__(
        self,
        hidden: list[nn.Parameter],
        rest: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        arguments: Mapping[str, Any],
    ):
        options = {"adjust_lr_fn": "match_rms_adamw", **arguments}
        muon = Muon(hidden, lr=lr, weight_decay=weight_decay, **options) if hidden else None
        adam = AdamW(rest, lr=lr, betas=betas, eps=eps, fused=True) if rest else None
        self.parts = [part for part in (muon, adam) if part is not None]
        super().__init__([group for part in self.parts for group in part.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Make the parts use the groups and the state of the whole, which a schedule and a checkpoint change."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The embeddings and the heads of a model, which Muon leaves to AdamW.

    Source: Jordan et al. 2024: Muon is for hidden layers.
    """
    from transformers import PreTrainedModel

    found: list[nn.Parameter] = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            found += module.parameters(recurse=False)
        if isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
            found += head.parameters()
        if isinstance(module, nn.Linear) and module.out_features == 1:  # the scores of a reward model, or values
            found += module.parameters()
    return found


def resolve_warmup(warmup_steps: float, total: int) -> int:
    """The number of warm-up steps; a value below 1 is a fraction of all steps, rounded up.

    Source: transformers, `TrainingArguments.get_warmup_steps`, which TRL uses as well.
    """
    return math.ceil(warmup_steps * total) if warmup_steps < 1 else int(warmup_steps)


def rate_factor(name: str, step: int, *, warmup: int, total: int, offset: int = 0) -> float:
    """The factor of the learning rate at a step.

    (step + offset) / (warmup + offset) while step < warmup; then, with p = (step - warmup) / (total - warmup):
    `linear` 1 - p, `cosine` (1 + cos(pi p)) / 2, `constant_with_warmup` 1. `constant` is 1 throughout.

    Source: transformers' schedules of the same names, at offset 0.

    Args:
        step: the number of steps done before, 0 for the first. warmup, total: in steps.
        offset: the factor of the first warm-up step is 0 with offset 0, and 1 / (warmup + 1) with offset 1.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in OWN:
        raise ValueError(f"unknown schedule {name!r}; expected one of {', '.join(OWN)}")
    if name == "constant":
        return 1.0
    if step < warmup:
        return (step + offset) / (warmup + offset)
    if name == "constant_with_warmup":
        return 1.0
    left = max(1, total - warmup)
    if name == "linear":
        return max(0.0, (total - step) / left)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / left))))


class MetricSchedule:
    """A schedule of transformers that follows a metric (`reduce_lr_on_plateau`, `greedy`); `step` keeps the rate."""

    def __init__(self, schedule: Any):
        self.schedule = schedule

    def step(self) -> None:
        """Do nothing: the rate changes after an evaluation."""

    def measured(self, value: float) -> None:
        """Set the rate after an evaluation."""
        self.schedule.step(value)

    def get_last_lr(self) -> list[float]:
        return self.schedule.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state)


def make_scheduler(
    optimizer: Optimizer,
    name: str,
    *,
    warmup_steps: float,
    total: int,
    offset: int = 0,
    arguments: Mapping[str, Any] | None = None,
    greater_is_better: bool = False,
) -> LambdaLR | MetricSchedule:
    """The schedule `name` over `total` steps (see `rate_factor`), with `arguments` for transformers' other schedules.

    The warm-up of any schedule is linear and starts at `offset`, unless the schedule defines its own.

    Args:
        arguments: `lr_scheduler_kwargs`. greater_is_better: direction of the metric that a measured schedule follows.

    Raises:
        ConfigError: the run has a single step, and its learning rate is 0; or transformers refuses an argument.
    """
    given, warmup = dict(arguments or {}), resolve_warmup(warmup_steps, total)
    if SCHEDULES[name].measures:
        mode = "max" if greater_is_better else "min"
        return MetricSchedule(_of_transformers(optimizer, name, None, None, {"mode": mode, **given}))
    own, own_start = name in OWN and not given, {"warmup_type", "warmup_lr_rate"} & given.keys()
    if not own:
        rate = optimizer.param_groups[0]["lr"]
        stand_in = SGD([nn.Parameter(torch.zeros(1))], lr=rate)  # a schedule changes the rates of its optimizer
        theirs = _of_transformers(stand_in, name, warmup, total, given).lr_lambdas[0]

    def factor(step: int) -> float:
        if own:
            return rate_factor(name, step, warmup=warmup, total=total, offset=offset)
        return (step + offset) / (warmup + offset) if offset and step < warmup and not own_start else theirs(step)

    if total == 1 and factor(0) == 0.0:
        found = f"found {warmup_steps:g} in a run of one step, whose learning rate is then 0"
        raise ConfigError(Fault("warmup_steps", found, "warmup_steps: 0, or a longer run"))
    return LambdaLR(optimizer, factor)


def schedule_of(
    config: TrainingConfig, optimizer: Optimizer, total: int, *, offset: int = 0
) -> LambdaLR | MetricSchedule:
    """The schedule of a config for a run of `total` updates; see `make_scheduler`."""
    return make_scheduler(
        optimizer,
        config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        total=total,
        offset=offset,
        arguments=config.lr_scheduler_kwargs,
        greater_is_better=config.best_is_greatest,
    )


def require_schedule(config: TrainingConfig, total: int, *, offset: int = 0) -> None:
    """Check the schedule of a run of `total` updates, before anything expensive.

    Raises:
        ConfigError: see `make_scheduler`.
    """
    schedule_of(config, SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate), total, offset=offset)


def _of_transformers(
    optimizer: Optimizer, name: str, warmup: int | None, total: int | None, arguments: dict[str, Any]
) -> Any:
    """A schedule of transformers.

    Raises:
        ConfigError: an argument has a value that transformers refuses.
    """
    from transformers import get_scheduler

    try:
        return get_scheduler(
            name, optimizer, num_warmup_steps=warmup, num_training_steps=total, scheduler_specific_kwargs=arguments
        )
    except (ValueError, TypeError) as error:
        found = f"transformers refuses {arguments} for {name}: {error}"
        raise ConfigError(Fault("lr_scheduler_kwargs", found, "other arguments")) from None
