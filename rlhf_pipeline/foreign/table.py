"""The entries of a tool's table, and what a translation collects."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf_pipeline.errors import ConfigError, Fault, did_you_mean

Convert = Callable[[Any], Any]


@dataclass(frozen=True)
class Entry:
    """What becomes of one key of another tool.

    ours: the key of this package with the same meaning; "": none.
    values: how its value is written here, if not in the same way. A mapping without the value means that it is lost.
    why: the reason why it is lost or has no effect. changes: whether a lost value changes what is trained.
    off: values with which nothing is lost. joint: the tool's `complete` reads it, together with other keys.
    """

    ours: str = ""
    values: Mapping[Any, Any] | Convert | None = None
    why: str = ""
    changes: bool = False
    off: tuple[Any, ...] = ()
    joint: bool = False


def to(ours: str, values: Mapping[Any, Any] | Convert | None = None) -> Entry:
    """Return the entry of a key that this package has too."""
    return Entry(ours, values)


def idle(why: str = "it changes speed, storage or logs, not what is trained") -> Entry:
    """Return the entry of a key that has no effect here and changes nothing that is trained."""
    return Entry(why=why)


def lost(why: str, *off: Any) -> Entry:
    """Return the entry of a key that changes what is trained and that this package does not have.

    Args:
        off: values that mean what this package does.
    """
    return Entry(why=why, changes=True, off=(None, *off))


JOINT = Entry(joint=True)
"""The entry of a key that is read together with other keys."""


@dataclass(frozen=True)
class Loss:
    """A key that a translation leaves out, and whether that changes what is trained."""

    key: str
    value: Any
    why: str
    changes_training: bool = True


@dataclass
class Translation:
    """A config of this package in the making, and what is lost on the way.

    stage: the command that reads the config. given: the values of the other tool.
    origin: our key -> the key that it comes from.
    """

    tool: str
    stage: str
    given: Mapping[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    lost: list[Loss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    origin: dict[str, str] = field(default_factory=dict)

    def put(self, key: str, value: Any, origin: str) -> None:
        """Set a key of this package, with the key that it comes from."""
        self.config[key], self.origin[key] = value, origin

    def lose(self, key: str, value: Any, why: str, changes: bool = True) -> None:
        """Record a key that is left out."""
        self.lost.append(Loss(key, value, why, changes))

    def drop(self, ours: str, why: str, changes: bool) -> None:
        """Take a key of this package out again, and record the key that it comes from."""
        value = self.config.pop(ours)
        origin = self.origin.get(ours) or ours
        self.lose(origin, self.given.get(origin, value), why, changes)

    def name(self, folder: Any, origin: str) -> None:
        """Set the output folder, and the name in the registry that follows from it."""
        if isinstance(folder, str) and "$" not in folder:
            self.put("output_dir", folder, origin)
            if name := name_of(folder):
                self.put("output_name", name, origin)
        elif folder is not None:
            self.lose(origin, folder, "it is a variable: give output_name, or output_dir", changes=False)


@dataclass(frozen=True)
class Tool:
    """A tool: how its configs are recognised and translated.

    signs: keys that only this tool has. entries: by key; nested keys are dotted, and a name may end with `*`.
    stage_of: the command for its config; None: unknown. complete: translates the joint keys.
    defaults: by stage, what the tool does where its config says nothing, if this package does something else.
    """

    name: str
    signs: tuple[str, ...]
    entries: Mapping[str, Entry]
    stage_of: Callable[[Mapping[str, Any]], str | None]
    complete: Callable[[Mapping[str, Any], Translation], None]
    defaults: Mapping[str, Mapping[str, Any]]
    whole: frozenset[str] = frozenset()  # mappings that are values, not nested keys

    def entry(self, key: str) -> Entry | None:
        """Return the entry of a key, or None."""
        if key in self.entries:
            return self.entries[key]
        patterns = [name for name in self.entries if name.endswith("*") and key.startswith(name[:-1])]
        return self.entries[max(patterns, key=len)] if patterns else None

    def flat(self, values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        """Return the values with dotted keys in place of nested mappings."""
        found: dict[str, Any] = {}
        for key, value in values.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping) and value and name not in self.whole:
                found |= self.flat(value, f"{name}.")
            else:
                found[name] = value
        return found

    def translate(self, values: Mapping[str, Any], stage: str) -> Translation:
        """Return the config of `stage` that means the same as flat values of this tool, and what is lost."""
        result = Translation(self.name, stage, values)
        for key, value in values.items():
            entry = self.entry(key)
            if value is None or (entry is not None and entry.joint):
                continue
            if entry is None:
                near = did_you_mean(key, [name for name in self.entries if not name.endswith("*")])
                result.lose(key, value, f"not in the table of {self.name}" + (f"; {near}" if near else ""))
            elif not entry.ours:
                if value not in entry.off:
                    result.lose(key, value, entry.why, entry.changes)
            else:
                _carry(result, entry, key, value)
        self.complete(values, result)
        if result.config.get("load_in_4bit") and "use_bnb_nested_quant" not in result.config:
            result.put("use_bnb_nested_quant", True, "")
            result.notes.append(f"use_bnb_nested_quant True: the default of {self.name}")
        for key, value in self.defaults.get(stage, {}).items():
            if key not in result.config:
                result.put(key, value, "")
                result.notes.append(f"{key} {value}: the default of {self.name}")
        return result


def _carry(result: Translation, entry: Entry, key: str, value: Any) -> None:
    if entry.values is None:
        result.put(entry.ours, value, key)
    elif callable(entry.values):
        if (written := entry.values(value)) is not None:
            result.put(entry.ours, written, key)
    elif value in entry.values:
        if entry.values[value] is not None:
            result.put(entry.ours, entry.values[value], key)
    else:
        result.lose(key, value, f"{entry.ours} has no such value")


_FILES = (".json", ".jsonl", ".gz", ".csv", ".parquet", ".txt")


def whole_split(name: Any, split: Any = "train", **more: Any) -> dict[str, Any]:
    """Return an entry of `datasets` that takes all rows of a split, or of a local file."""
    local = (isinstance(name, str) and name.startswith(("/", ".", "~"))) or str(name).endswith(_FILES)
    rows = {"split": "all" if local and split == "train" else split, "fraction": 1.0}
    return {"dataset_name": name, **rows, **{key: value for key, value in more.items() if value is not None}}


def name_of(folder: str) -> str:
    """Return the name for the registry that the last part of a folder's path gives; it may be empty."""
    last = re.split(r"[/\\]", folder.rstrip("/\\"))[-1]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:64]


def refuse(where: str, found: str, expected: str, fix: str = "") -> ConfigError:
    """Return the error of a config that cannot be translated."""
    return ConfigError(Fault(where, found, expected, fix))


def number(values: Mapping[str, Any], key: str, default: int) -> int:
    """Return a whole number of another tool's config, or its default."""
    value = values.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def listed(value: Any) -> list[Any]:
    """Return a list, or the parts of a comma-separated text."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return list(value) if isinstance(value, Iterable) else [value]


IDLE = idle()
LIKE_HF = {
    key: to(key)
    for key in (
        *("model_name_or_path", "model_revision", "trust_remote_code", "learning_rate", "weight_decay"),
        *("max_grad_norm", "num_train_epochs", "max_steps", "per_device_train_batch_size", "warmup_steps", "seed"),
        *("per_device_eval_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
        *("adam_beta1", "adam_beta2", "adam_epsilon", "gradient_checkpointing", "logging_steps", "eval_steps"),
        *("save_steps", "save_strategy", "save_total_limit", "eval_strategy", "report_to", "optim", "use_peft"),
        *("load_in_4bit", "lora_alpha", "lora_dropout", "lora_r", "lora_target_modules", "attn_implementation"),
        *("load_best_model_at_end", "metric_for_best_model", "dataset_num_proc"),
    )
} | {"warmup_ratio": to("warmup_steps"), "evaluation_strategy": to("eval_strategy"), "output_dir": JOINT}
"""Keys that have the names and the meaning of transformers and peft."""
IDLE_HF = dict.fromkeys(
    (
        *("do_train", "do_eval", "overwrite_output_dir", "overwrite_cache", "preprocessing_num_workers", "run_name"),
        *("dataloader_num_workers", "ddp_timeout", "resume_from_checkpoint", "remove_unused_columns", "log_level"),
        *("gradient_checkpointing_kwargs*", "save_only_model", "push_to_hub", "disable_tqdm"),
        *("logging_strategy", "save_safetensors", "torch_compile", "use_liger_kernel", "hub_*", "wandb_*"),
    ),
    IDLE,
) | {
    "tf32": lost("use bf16 for speed", False, True),
    "deepspeed": idle("it distributes the work; several processes: accelerate launch"),
    "fsdp": idle("it distributes the work; several processes: accelerate launch"),
}
"""Keys of transformers that change nothing that is trained."""
