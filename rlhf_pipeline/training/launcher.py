"""What `accelerate launch` asks of a stage: how weights are divided between the processes that it has started.

Accelerate hands the keys of its config file to a process as variables of the environment. Left there, they would make
accelerate wrap the model itself and ask for the package deepspeed, and transformers load weights in the first process
only. So they are read once and taken away, and `models/sharding.py` divides the weights, by PyTorch's FSDP2.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import BadInput, ConfigError, Fault

C = TypeVar("C", bound=TrainingConfig)
FSDP, DEEPSPEED = "fsdp_config", "deepspeed_config"
USES = {FSDP: "ACCELERATE_USE_FSDP", DEEPSPEED: "ACCELERATE_USE_DEEPSPEED"}
NOT_RUN = {
    "megatron_lm_config": "ACCELERATE_USE_MEGATRON_LM",
    "parallelism_config": "ACCELERATE_USE_PARALLELISM_CONFIG",
}
PRECISION = "ACCELERATE_MIXED_PRECISION"
# FSDP1's names of its strategies, and their numbers; FSDP2 has true and false.
KEEPS = ("shard_grad_op", "2", "false")
DIVIDES = ("full_shard", "1", "true")
WHOLE = ("no_shard", "3")


@dataclass(frozen=True)
class Launched:
    """What a launcher's config asks for.

    name: the key of that config with which it asks for it. strategy: its word for it. keys: those of the stage's config
    that do the same; none if weights stay whole. precision: its mixed_precision, if it is not 'no'. recomputes: whether
    it asks for activation checkpointing. processes: how many it has started.
    """

    name: str = ""
    strategy: str = ""
    keys: Mapping[str, bool] = field(default_factory=dict)
    precision: str | None = None
    recomputes: bool = False
    processes: int = 1

    @property
    def said(self) -> str:
        """What becomes of it, for the log."""
        what = f"{self.name} of accelerate ({self.strategy})"
        if not self.keys:
            return f"{what} divides no weights: the key fsdp of the stage decides"
        if self.processes == 1:
            return f"{what} has no effect in one process"
        given = ", ".join(f"{name}: {str(value).lower()}" for name, value in self.keys.items())
        return f"{what} is carried out by PyTorch's FSDP2 ({given}); the config of the stage decides all else"


@functools.cache
def launched() -> Launched:
    """What the launcher of this process asks for; the first call takes its variables out of the environment.

    Raises:
        BadInput: it asks for what no stage has.
    """
    return read_launcher(os.environ)


def read_launcher(variables: MutableMapping[str, str]) -> Launched:
    """Read what accelerate's config file asks for, and remove the variables that would make accelerate do it.

    * fsdp_config, version 1 or 2: FULL_SHARD, or true, is `fsdp: true`; SHARD_GRAD_OP, or false, is that with
      `fsdp_reshard_after_forward: false`; NO_SHARD is neither.
    * deepspeed_config, or the JSON file that it names: stage 3 is `fsdp: true`; 1 and 2 are that with
      `fsdp_reshard_after_forward: false`; 0 is neither.

    Raises:
        BadInput: it asks for offloading, a hybrid of both, a stage that is none, Megatron, or another parallelism.
    """
    for name, variable in NOT_RUN.items():
        if _on(variables, variable):
            raise BadInput(
                f"found {name} in the config of accelerate, expected whole weights (distributed_type: MULTI_GPU) or "
                f"{FSDP}; see docs/scaling.md"
            )
    found = Launched()
    if _on(variables, USES[DEEPSPEED]):
        found = _deepspeed(variables)
    elif _on(variables, USES[FSDP]):
        found = _fsdp(variables)
    precision = variables.get(PRECISION, "no").lower()
    for variable in (PRECISION, *USES.values()):
        variables.pop(variable, None)
    asked = found.precision if precision == "no" else precision
    return replace(found, precision=asked, processes=int(variables.get("WORLD_SIZE", "1")))


def with_launcher(config: C) -> tuple[C, list[str]]:
    """Return the config with what the launcher asks for, and lines for the log.

    Only keys that change no result, and are no part of a run's digest, are taken from a launcher. They come before
    those of the stage.

    Raises:
        BadInput: the launcher asks for what no stage has. ConfigError: the stage cannot divide its weights.
    """
    found = launched()
    lines = [found.said] if found.name else []
    if found.precision is not None and not (found.precision == "bf16" and config.bf16):
        decides = f"the key bf16 of the stage decides, and is {str(config.bf16).lower()}"
        lines.append(f"mixed_precision {found.precision} of accelerate has no effect: {decides}")
    if found.recomputes and not config.gradient_checkpointing:
        lines.append("fsdp_activation_checkpointing of accelerate has no effect; set gradient_checkpointing: true")
    if found.processes == 1 or all(getattr(config, name) == value for name, value in found.keys.items()):
        return config, lines
    divided = config.model_copy(update=dict(found.keys))
    if faults := [_from(found, fault) for check in type(config).checks for fault in check(divided)]:
        raise ConfigError(faults)
    return divided, lines


def _from(found: Launched, fault: Fault) -> Fault:
    """A fault of a config with the launcher's keys, which says where they come from."""
    fix = fault.fix.replace("fsdp: false", "a config of accelerate that keeps weights whole (ddp.yaml)")
    return replace(fault, found=f"{fault.found} ({found.name} of accelerate asks for fsdp)", fix=fix)


def _on(variables: Mapping[str, str], name: str) -> bool:
    return variables.get(name, "false").lower() == "true"


def _fsdp(variables: Mapping[str, str]) -> Launched:
    """Read the keys of fsdp_config.

    Raises:
        BadInput: see `read_launcher`; or two keys ask for different things.
    """
    for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
        if _on(variables, name):
            raise _refused(FSDP, f"{name.lower()}: true", "false")
    words = [variables.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()]
    expected = "true or false"
    if variables.get("FSDP_VERSION", "1") == "1":  # which has two keys for it; a launcher sets both
        words.append(variables.get("FSDP_SHARDING_STRATEGY", "full_shard").lower())
        expected = "FULL_SHARD, SHARD_GRAD_OP or NO_SHARD"
    for word in words:
        if word not in (*DIVIDES, *KEEPS, *WHOLE):
            raise _refused(FSDP, f"the strategy {word.upper()}", expected)
    given = [word for word in words if word not in DIVIDES]
    if len({word in KEEPS for word in given}) > 1:
        raise _refused(FSDP, f"two strategies, {' and '.join(map(str.upper, given))}", "one")
    word = (given or words)[0]
    keys = {} if word in WHOLE else {"fsdp": True, "fsdp_reshard_after_forward": word in DIVIDES}
    kind = "whole weights" if word in WHOLE else "FULL_SHARD" if word in DIVIDES else "SHARD_GRAD_OP"
    return Launched(FSDP, kind, keys, recomputes=_on(variables, "FSDP_ACTIVATION_CHECKPOINTING"))


def _deepspeed(variables: Mapping[str, str]) -> Launched:
    """Read the keys of deepspeed_config, or of the JSON file that it names.

    Raises:
        BadInput: see `read_launcher`.
    """
    named, precision = variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none"), None
    if named.lower() != "none":
        stage, offload, precision = _deepspeed_file(Path(named))
    else:
        stage = variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        parts = ("optimizer", "param")
        offload = {
            f"offload_{part}_device": variables.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            for part in parts
        }
    for key, device in offload.items():
        if device.lower() not in ("none", "false"):
            raise _refused(DEEPSPEED, f"{key}: {device}", "none")
    if stage not in ("0", "1", "2", "3"):
        raise _refused(DEEPSPEED, f"zero_stage: {stage}", "0, 1, 2 or 3")
    keys = {} if stage == "0" else {"fsdp": True, "fsdp_reshard_after_forward": stage == "3"}
    return Launched(DEEPSPEED, f"ZeRO stage {stage}", keys, precision)


def _deepspeed_file(path: Path) -> tuple[str, dict[str, str], str | None]:
    """The stage, where it offloads to, and the precision of a config file of DeepSpeed.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        zero = content.get("zero_optimization", {})
        offload = {"cpu_offload": str(zero.get("cpu_offload", False))}
        for key in ("offload_optimizer", "offload_param"):
            offload[f"{key}.device"] = str((zero.get(key) or {}).get("device", "none"))
        enabled = [kind for kind in ("bf16", "fp16") if content.get(kind, {}).get("enabled") is True]
        return str(zero.get("stage", 0)), offload, next(iter(enabled), None)
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{path}: found a deepspeed_config_file that cannot be read ({error}), expected JSON with zero_optimization"
        ) from error


def _refused(name: str, found: str, expected: str) -> BadInput:
    return BadInput(f"found {found} in {name} of accelerate, expected {expected}; see docs/scaling.md")
