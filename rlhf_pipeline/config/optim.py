"""Optimizers and learning-rate schedules by transformers' names: what each takes and needs."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import CommandConfig, no_package, option, wrong
from rlhf_pipeline.config.yaml import parse_value
from rlhf_pipeline.errors import Fault, did_you_mean

OptimName = Literal[
    "adamw_torch_fused",
    "adamw_torch",
    "adafactor",
    "lion",
    "lion_32bit",
    "muon",
    "sgd",
    "rmsprop",
    "adagrad",
    "adamw_8bit",
    "adamw_bnb_8bit",
    "paged_adamw_32bit",
    "paged_adamw_8bit",
    "lion_8bit",
    "paged_lion_32bit",
    "paged_lion_8bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_32bit",
    "paged_ademamix_8bit",
    "rmsprop_bnb",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
]


@dataclass(frozen=True)
class Optim:
    """What an optimizer takes in `optim_args`, and the package it needs.

    state: bytes of its state per parameter in fp32, an upper bound for matrices.
    """

    args: frozenset[str] = frozenset()
    package: str | None = None
    state: float = 8.0


_ADEMAMIX = frozenset({"beta1", "beta2", "beta3", "alpha", "t_alpha", "t_beta3", "eps"})
_RMSPROP = frozenset({"momentum", "alpha", "eps", "centered"})
_BNB = "bitsandbytes"
OPTIMIZERS: Mapping[str, Optim] = {
    "adamw_torch_fused": Optim(),
    "adamw_torch": Optim(),
    "adafactor": Optim(frozenset({"clip_threshold", "decay_rate", "beta1"}), state=0.1),
    "lion": Optim(state=4),
    "lion_32bit": Optim(state=4),
    "muon": Optim(frozenset({"momentum", "nesterov", "ns_steps", "adjust_lr_fn"})),
    "sgd": Optim(frozenset({"momentum", "dampening", "nesterov"}), state=4),
    "rmsprop": Optim(_RMSPROP, state=12),
    "adagrad": Optim(frozenset({"lr_decay", "eps"}), state=4),
    "adamw_8bit": Optim(package=_BNB, state=2.1),
    "adamw_bnb_8bit": Optim(package=_BNB, state=2.1),
    "paged_adamw_32bit": Optim(package=_BNB),
    "paged_adamw_8bit": Optim(package=_BNB, state=2.1),
    "lion_8bit": Optim(package=_BNB, state=1.1),
    "paged_lion_32bit": Optim(package=_BNB, state=4),
    "paged_lion_8bit": Optim(package=_BNB, state=1.1),
    "ademamix": Optim(_ADEMAMIX, package=_BNB, state=12),
    "ademamix_8bit": Optim(_ADEMAMIX, package=_BNB, state=3.2),
    "paged_ademamix_32bit": Optim(_ADEMAMIX, package=_BNB, state=12),
    "paged_ademamix_8bit": Optim(_ADEMAMIX, package=_BNB, state=3.2),
    "rmsprop_bnb": Optim(_RMSPROP - {"centered"}, package=_BNB, state=4),
    "rmsprop_bnb_8bit": Optim(_RMSPROP - {"centered"}, package=_BNB, state=1.1),
    "rmsprop_bnb_32bit": Optim(_RMSPROP - {"centered"}, package=_BNB, state=4),
}
assert set(OPTIMIZERS) == set(get_args(OptimName))

_NOT_OFFERED = {
    "galore": "it changes weights outside of the optimizer's step, and its state holds projections",
    "apollo": "its state holds random projections, which a checkpoint could not restore exactly",
    "lomo": "it updates weights during the backward pass, before gradients are checked and clipped",
    "adalomo": "it updates weights during the backward pass, before gradients are checked and clipped",
    "schedule_free": "it trains on other weights than those it evaluates and saves",
    "adamw_torch_4bit": "torchao's quantised state cannot be stored as plain tensors",
    "adamw_torch_8bit": "torchao's quantised state cannot be stored as plain tensors",
    "adamw_torch_xla": "it needs a TPU",
    "adamw_torch_npu_fused": "it needs an NPU",
    "adamw_anyprecision": "its package, torchdistx, is no longer released",
    "grokadamw": "it has not been tested here",
    "stable_adamw": "it has not been tested here",
}
"""Optimizers of transformers that this package does not offer, by the beginning of their names, and why."""


def _offered(value: Any) -> Any:
    if isinstance(value, str) and value not in OPTIMIZERS:
        for start, why in _NOT_OFFERED.items():
            if value.startswith(start):
                raise wrong(f"one of {', '.join(OPTIMIZERS)}", f"{value} is not available: {why}")
    return value


OptimField = Annotated[OptimName, BeforeValidator(_offered)]


@dataclass(frozen=True)
class Schedule:
    """What a schedule takes in `lr_scheduler_kwargs`.

    required: keys of which one must be given. warms: whether the schedule has a warm-up of `warmup_steps`.
    measures: whether it follows the metric of evaluations instead of the number of steps.
    """

    args: frozenset[str] = frozenset()
    required: frozenset[str] = frozenset()
    warms: bool = True
    measures: bool = False


ScheduleName = Literal[
    "linear",
    "cosine",
    "constant",
    "constant_with_warmup",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "reduce_lr_on_plateau",
    "greedy",
]
_MINIMUM = frozenset({"min_lr", "min_lr_rate"})
_PLATEAU = frozenset({"mode", "factor", "patience", "threshold", "threshold_mode", "cooldown", "min_lr", "eps"})
SCHEDULES: Mapping[str, Schedule] = {
    "linear": Schedule(),
    "cosine": Schedule(frozenset({"num_cycles"})),
    "constant": Schedule(warms=False),
    "constant_with_warmup": Schedule(),
    "cosine_with_restarts": Schedule(frozenset({"num_cycles"})),
    "polynomial": Schedule(frozenset({"lr_end", "power"})),
    "inverse_sqrt": Schedule(frozenset({"timescale"})),
    "cosine_with_min_lr": Schedule(_MINIMUM | {"num_cycles"}, _MINIMUM),
    "cosine_warmup_with_min_lr": Schedule(_MINIMUM | {"num_cycles", "warmup_lr_rate"}, _MINIMUM),
    "warmup_stable_decay": Schedule(
        frozenset({"num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"}),
        frozenset({"num_decay_steps"}),
    ),
    "reduce_lr_on_plateau": Schedule(_PLATEAU, warms=False, measures=True),
    "greedy": Schedule(
        _PLATEAU | {"warmup", "smooth", "window_size", "reset_start", "max_lr"}, warms=False, measures=True
    ),
}
assert set(SCHEDULES) == set(get_args(ScheduleName))


def _arguments(value: Any) -> Any:
    """Read `a=1,b=0.5` or a JSON object, as transformers does, or a mapping; 'no value' is an empty mapping."""
    if value is None:
        return {}
    if not isinstance(value, str):
        return value
    if value.strip().startswith("{"):
        try:
            return json.loads(value)
        except ValueError:
            raise wrong("a mapping: {key: value}") from None
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise wrong("a mapping, or key=value,key=value")
    return {key.strip(): parse_value(text) for key, _, text in pairs}


Arguments = Annotated[dict[str, bool | int | float | str | None], BeforeValidator(_arguments)]


class WithOptimizer(CommandConfig):
    """A config with an optimizer and a learning-rate schedule."""

    optim: OptimField = option(
        "adamw_torch_fused",
        "optimizer, by transformers' names; lion is lion_32bit without bitsandbytes, muon trains hidden matrices by "
        "torch's Muon and the rest by AdamW (transformers)",
    )
    optim_args: Arguments = option(
        {}, "arguments of the optimizer, as a mapping or as key=value,key=value (transformers)"
    )
    lr_scheduler_type: ScheduleName = option("linear", "learning rate schedule over all steps (transformers)")
    lr_scheduler_kwargs: Arguments = option(
        {}, "arguments of the schedule, such as min_lr or num_cycles (transformers)"
    )


def check_optim(config: WithOptimizer) -> Iterator[Fault]:
    """Yield the faults of an optimizer whose package is missing, and of arguments that it does not take."""
    optim = OPTIMIZERS[config.optim]
    if optim.package and importlib.util.find_spec(optim.package) is None:
        yield no_package("optim", config.optim, optim.package, f"pip install {optim.package}, or optim: adafactor")
    yield from _unknown("optim_args", config.optim_args, optim.args, f"optim {config.optim}")


def check_schedule(config: WithOptimizer) -> Iterator[Fault]:
    """Yield the faults of arguments that a schedule does not take, or lacks."""
    name, given = config.lr_scheduler_type, config.lr_scheduler_kwargs
    schedule = SCHEDULES[name]
    yield from _unknown("lr_scheduler_kwargs", given, schedule.args, f"lr_scheduler_type {name}")
    if schedule.required and not schedule.required & given.keys():
        found = f"lr_scheduler_type {name} needs {' or '.join(sorted(schedule.required))}"
        yield Fault("lr_scheduler_kwargs", found, "a value for it")


def _unknown(key: str, given: Mapping[str, Any], known: frozenset[str], whose: str) -> Iterator[Fault]:
    for name in given:
        if name not in known:
            expected = ", ".join(sorted(known)) or "no arguments"
            yield Fault(f"{key}.{name}", f"{whose} does not take it", expected, did_you_mean(name, sorted(known)))
