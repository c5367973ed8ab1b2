"""What `accelerate launch` asks of a stage: how weights are divided between the processes that it has started.

Accelerate hands the keys of its config file to a process as variables of the environment. Left there, they would make
accelerate wrap the model itself, ask for the package deepspeed, and make transformers load no weights in all processes
but the first. So they are read once and taken away, and `models/sharding.py` divides the weights, by PyTorch's FSDP2.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import BadInput, ConfigError

C = TypeVar("C", bound=TrainingConfig)
USES = {"fsdp_config": "ACCELERATE_USE_FSDP", "deepspeed_config": "ACCELERATE_USE_DEEPSPEED"}
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
    """What a launcher's config asks for: keys of the stage's config, and a line for the log.

    precision: its mixed_precision, if it is not 'no'. recomputes: whether it asks for activation checkpointing.
    """

    keys: Mapping[str, bool]
    said: str | None = None
    precision: str | None = None
    recomputes: bool = False


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
        if variables.get(variable, "").lower() == "true":
            raise _refused(name, "it", "weights whole (distributed_type: MULTI_GPU), or divided by fsdp_config")
    uses = {name: variables.get(variable, "").lower() == "true" for name, variable in USES.items()}
    found = Launched({})
    if uses["deepspeed_config"]:
        found = _deepspeed(variables)
    elif uses["fsdp_config"]:
        found = _fsdp(variables)
    precision = variables.get(PRECISION, "no").lower()
    for variable in (PRECISION, *USES.values()):
        variables.pop(variable, None)
    return replace(found, precision=None if precision == "no" else precision)


def with_launcher(config: C) -> tuple[C, list[str]]:
    """Return the config with what the launcher asks for, and lines for the log.

    Only keys that change no result, and are no part of a run's digest, are taken from a launcher.

    Raises:
        BadInput: the launcher asks for what no stage has. ConfigError: the stage cannot divide its weights.
    """
    found, lines = launched(), []
    if found.said is not None:
        lines.append(found.said)
    if found.precision is not None and not config.bf16:
        without = "has no effect, because bf16: false of the stage decides"
        lines.append(f"mixed_precision {found.precision} of accelerate {without}")
    if found.recomputes and not config.gradient_checkpointing:
        lines.append("fsdp_activation_checkpointing of accelerate has no effect; set gradient_checkpointing: true")
    if not found.keys or all(getattr(config, name) == value for name, value in found.keys.items()):
        return config, lines
    divided = config.model_copy(update=dict(found.keys))
    faults = [fault for check in type(config).checks for fault in check(divided)]
    if faults:
        raise ConfigError(faults)
    return divided, lines


def _fsdp(variables: Mapping[str, str]) -> Launched:
    """Read the keys of fsdp_config."""
    if variables.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true":
        raise _refused("fsdp_config", "fsdp_offload_params: true", "false")
    words = [variables.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower()]
    if variables.get("FSDP_VERSION", "1") == "1":  # which has two keys for it; a launcher sets both
        words.append(variables.get("FSDP_SHARDING_STRATEGY", "full_shard").lower())
    word = next((word for word in words if word not in DIVIDES), words[0])
    if word not in (*DIVIDES, *KEEPS, *WHOLE):
        raise _refused("fsdp_config", f"the strategy {word.upper()}", "FULL_SHARD or SHARD_GRAD_OP")
    keys = {} if word in WHOLE else {"fsdp": True, "fsdp_reshard_after_forward": word in DIVIDES}
    recomputes = variables.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true"
    return Launched(keys, _told("fsdp_config of accelerate", keys), recomputes=recomputes)


def _deepspeed(variables: Mapping[str, str]) -> Launched:
    """Read the keys of deepspeed_config, or of the JSON file that it names."""
    named = variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if named.lower() != "none":
        stage, offload = _deepspeed_file(Path(named))
    else:
        stage = variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
        parts = ("optimizer", "param")
        offload = {
            f"offload_{part}_device": variables.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
            for part in parts
        }
    for key, device in offload.items():
        if device.lower() != "none":
            raise _refused("deepspeed_config", f"{key}: {device}", "none")
    if stage not in ("0", "1", "2", "3"):
        raise _refused("deepspeed_config", f"zero_stage: {stage}", "0, 1, 2 or 3")
    keys = {} if stage == "0" else {"fsdp": True, "fsdp_reshard_after_forward": stage == "3"}
    return Launched(keys, _told(f"deepspeed_config of accelerate, ZeRO stage {stage}", keys))


def _deepspeed_file(path: Path) -> tuple[str, dict[str, str]]:
    """The stage and the devices of offloading in a config file of DeepSpeed.

    Raises:
        BadInput: the file cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        zero = content.get("zero_optimization", {})
        parts = {f"{key}.device": zero.get(key) or {} for key in ("offload_optimizer", "offload_param")}
        return str(zero.get("stage", 0)), {key: str(part.get("device", "none")) for key, part in parts.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise BadInput(
            f"{path}: found a deepspeed_config_file that cannot be read ({error}), expected JSON with zero_optimization"
        ) from error


def _told(what: str, keys: Mapping[str, bool]) -> str:
    if not keys.get("fsdp"):
        return f"{what}: every process holds whole weights (DDP)"
    given = ", ".join(f"{name}: {str(value).lower()}" for name, value in keys.items())
    return f"{what}: carried out by PyTorch's FSDP2 ({given}); for all else the config of the stage decides"


def _refused(name: str, found: str, expected: str) -> BadInput:
    return BadInput(f"found {found} in {name} of accelerate, expected {expected}; see docs/scaling.md")
