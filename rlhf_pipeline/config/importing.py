"""`rlhf import`: recognise the tool of a config, translate it, and keep what this version can train."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.config import keys
from rlhf_pipeline.config.draft import Draft, dotted
from rlhf_pipeline.config.dump import RUN_ONLY
from rlhf_pipeline.config.foreign_files import read_config, with_dataset_info
from rlhf_pipeline.config.load import validate
from rlhf_pipeline.config.stages import SCHEMAS, TRAINING
from rlhf_pipeline.errors import ConfigError, Fault, did_you_mean
from rlhf_pipeline.foreign.table import Translation, name_of, refuse
from rlhf_pipeline.foreign.tools import TOOLS

TRL = "trl"
NAMES = (*TOOLS, TRL)
NOT_TRAINING = RUN_ONLY | {
    *("output_name", "eval_strategy", "eval_steps", "per_device_eval_batch_size", "test_split_size", "use_cpu"),
    *("gradient_checkpointing", "attn_implementation", "dataset_test_split", "rollout_engine"),
    "vllm_gpu_memory_utilization",
}
"""Keys of this package that do not change what is trained, besides those that are only of a run."""
_UNREADABLE = (TypeError, ValueError, LookupError, AttributeError)
"""What the tables raise at a value of a kind that they do not know, such as a list for a text."""
_REFERENCES = frozenset({"model_name_or_path", "dataset_name", "datasets", "reward_model_path", "ref_model"})
_OF_KTO = {"desirable_weight", "undesirable_weight"}
"""Keys that only TRL's KTOConfig has; its loss_type is by default kto."""
_TRL_DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {"num_train_epochs": 3.0, "bf16": True, "seed": 42, "dropout": True, "train_on": "all"},
    "train-rm": {"num_train_epochs": 3.0, "bf16": True, "seed": 42, "learning_rate": 1e-4, "reward_centering": "none"},
    "dpo": {"num_train_epochs": 3.0, "bf16": True, "seed": 42},
    "ppo": {"num_ppo_epochs": 4, "num_mini_batches": 1, "temperature": 0.7, "seed": 42, "adam_epsilon": 1e-8},
}


def import_config(path: Path, tool: str | None = None, stage: str | None = None) -> Translation:
    """Return the config of this package that trains what the config of another tool trains, and what is lost.

    Args:
        path: YAML file or shell script. tool: one of NAMES; None: it is recognised by its keys.
        stage: the command that reads the result; None: it follows from the keys.

    Raises:
        ConfigError: the file cannot be read or is no config of the tool, or this package has no such stage.
    """
    given = read_config(path)
    try:
        return _imported(path, given, tool, stage)
    except _UNREADABLE as error:
        raise ConfigError(list(_unreadable(path, given, tool, stage, error))) from error


def _unreadable(
    path: Path, given: Mapping[str, Any], tool: str | None, stage: str | None, error: Exception
) -> Iterator[Fault]:
    """Yield a fault for each key without which a config can be read: their values are of a kind that no tool has."""
    several = True
    for key, value in given.items():
        try:
            _imported(path, {name: kept for name, kept in given.items() if name != key}, tool, stage)
        except _UNREADABLE:
            continue
        except ConfigError:
            pass
        several = False
        shown = str(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        yield Fault(
            f"{path}: {key}", f"found {shown}, which cannot be read", "a value of the tool", "or remove it", key
        )
    if several:
        why = f"values of several keys cannot be read ({type(error).__name__}: {error})"
        yield Fault(str(path), why, f"a config of {tool or 'a tool'} with values that it takes")


def _imported(path: Path, given: Mapping[str, Any], tool: str | None, stage: str | None) -> Translation:
    tool = _tool_of(path, given) if tool is None else tool
    if tool not in NAMES:
        raise refuse("--from", f"found {tool!r}", f"one of {', '.join(NAMES)}", did_you_mean(tool, NAMES))
    if stage not in (None, *TRAINING):
        raise refuse("--stage", f"found {stage!r}", f"one of {', '.join(TRAINING)}")
    values = TOOLS[tool].flat(given) if tool != TRL else given
    told = stage or (TOOLS[tool].stage_of(values) if tool != TRL else _trl_stage(given))
    stage = told or _stage_of_path(path)
    if tool == TRL:
        result = _from_trl(given, stage)
    else:
        result = TOOLS[tool].translate(with_dataset_info(values, path) if tool == "llamafactory" else values, stage)
    if told is None:
        result.notes.append(f"taken as {stage}: no key tells the stage; another one: --stage")
    if "output_name" not in result.config and (name := name_of(path.stem)):
        result.put("output_name", name, "")
    sources = result.config.get("datasets")
    if sources and (mapping := result.config.pop("column_mapping", None)):  # a mixture has a mapping for each source
        result.config["datasets"] = [{"column_mapping": mapping} | source for source in sources]
    _keep_what_this_version_has(result)
    return result


def _stage_of_path(path: Path) -> str:
    """The stage that a file or its folder is named after; sft if none is."""
    words = {word for part in path.absolute().parts[-4:] for word in re.split(r"[^a-z]+", part.lower())}
    names = {"dpo": "dpo", "ppo": "ppo", "reward": "train-rm", "rm": "train-rm"}
    return next((stage for word, stage in names.items() if word in words), "sft")


def _tool_of(path: Path, given: Mapping[str, Any]) -> str:
    program = str(given.get("program", "")).partition(".")[0]
    if program in NAMES:
        return program
    counts = {name: sum(sign in tool.flat(given) for sign in tool.signs) for name, tool in TOOLS.items()}
    best = max(counts, key=lambda name: counts[name])
    if counts[best]:
        return best
    if "model_name_or_path" in given:
        return TRL
    raise refuse(
        str(path), "found no key that tells the tool", f"the config of {', '.join(NAMES)}", "name it with --from"
    )


def _trl_stage(given: Mapping[str, Any]) -> str | None:
    program = str(given.get("program", "")).rpartition(".")[2]
    if program:
        return {"reward": "train-rm", "kto": "dpo"}.get(program, program)
    own = {stage: set(SCHEMAS[stage].model_fields) | set(keys.ALIASES[stage]) for stage in TRAINING}
    only = {stage: own[stage].difference(*(own[other] for other in TRAINING if other != stage)) for stage in TRAINING}
    only["dpo"].add("beta")
    found = [stage for stage in ("ppo", "dpo", "train-rm") if only[stage] & set(given)]
    return found[0] if found else None


def _from_trl(given: Mapping[str, Any], stage: str) -> Translation:
    """TRL's keys are those of this package, its aliases and shorthands; see draft.py."""
    result = Translation(TRL, stage, given)
    values = {key: value for key, value in given.items() if key != "program"}
    for key, value in values.items():
        if note := keys.note_on_unused(stage, key, value):
            result.lose(key, value, note, changes=False)
    draft = Draft(stage, TRL)
    draft.add(values, dotted)
    draft.settle()
    for fault in draft.faults:
        key = fault.key.partition(".")[0]
        result.lose(key, values.get(key), fault.found, key not in NOT_TRAINING)
    for key, value in draft.values.items():
        result.put(key, value, key)
    result.notes += draft.notes
    of_kto = str(given.get("program", "")).endswith("kto") or _OF_KTO & set(given)
    for key, value in (_TRL_DEFAULTS[stage] | ({"loss_type": "kto"} if of_kto and stage == "dpo" else {})).items():
        if key not in result.config:
            result.put(key, value, "")
            result.notes.append(f"{key} {value}: the default of trl")
    return result


def _keep_what_this_version_has(result: Translation) -> None:
    """Move keys and values that the stage does not have, or refuses, to what is lost; order the rest as in the docs."""
    fields = SCHEMAS[result.stage].model_fields
    for key, value in list(result.config.items()):
        later = keys.later(result.stage, key)
        refused = later is not None and not keys.same(value, later)
        if key in fields and not refused:
            continue
        if keys.note_on_unused(result.stage, key, value) or (later is not None and not refused):
            del result.config[key]
            continue
        why = f"this version has no {key}" if key not in fields else f"this version has no {key} {keys.shown((value,))}"
        result.drop(key, why, key not in NOT_TRAINING)
    for _ in range(len(result.config)):
        draft = Draft(result.stage, result.stage)
        draft.add(result.config, dotted)
        validate(draft)
        tops = {fault.key.partition(".")[0]: fault for fault in draft.faults}
        removable = [key for key in tops if key in result.config and key not in _REFERENCES]
        if not removable:
            result.notes += [f"to mend: {fault}" for fault in draft.faults]
            break
        for key in removable:
            fault = tops[key]
            why = f"{key}: {fault.found}" + (f"; expected {fault.expected}" if fault.expected else "")
            result.drop(key, why, key not in NOT_TRAINING)
    result.config = {key: result.config[key] for key in fields if key in result.config}
