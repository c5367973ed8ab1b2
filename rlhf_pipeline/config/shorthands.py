"""Keys of TRL and alignment-handbook that stand for several keys of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.config.names import is_name
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.foreign.table import name_of


@dataclass(frozen=True)
class Expanded:
    """What one key becomes: values of this package's keys, and a note. They replace `used`, the keys that it reads."""

    key: str
    used: tuple[str, ...]
    values: Mapping[str, Any]
    note: str


def expand(stage: str, values: Mapping[str, Any]) -> Iterator[Expanded]:
    """Yield what the shorthands in the values of a training config stand for.

    Raises:
        ConfigError: a shorthand has another form.
    """
    if values.get("dataset_mixer") is not None:
        yield _mixer(values)
    if values.get("dataset_mixture") is not None:
        yield _mixture(values["dataset_mixture"])
    if any(isinstance(entry, dict) and "path" in entry for entry in _list(values.get("datasets"))):
        entries = [_entry("datasets", entry, _TRL_ENTRY) for entry in values["datasets"]]
        yield Expanded(
            "datasets", (), {"datasets": entries}, "path and name of a source are dataset_name and dataset_config"
        )
    if values.get("use_flash_attention_2") is not None:
        kernel = {"attn_implementation": "flash_attention_2"} if values["use_flash_attention_2"] else {}
        yield Expanded(
            "use_flash_attention_2",
            ("use_flash_attention_2",),
            kernel,
            "an old name of attn_implementation: flash_attention_2",
        )
    if values.get("assistant_only_loss") is not None:
        turns = "all_assistant" if values["assistant_only_loss"] else "all"
        yield Expanded("assistant_only_loss", ("assistant_only_loss",), {"train_on": turns}, f"train_on: {turns}")
    if stage == "ppo" and values.get("rollout_batch_size") is None and values.get("gradient_accumulation_steps"):
        yield from _rollout(values)
    if values.get("output_dir") is not None and values.get("output_name") is None:
        name = name_of(str(values["output_dir"]))
        if is_name(name):
            yield Expanded(
                "output_dir",
                (),
                {"output_name": name},
                f"the model is registered as {name}, the last part of output_dir",
            )


_SINGLE = ("use_flash_attention_2", "assistant_only_loss")
SHORTHANDS = ("dataset_mixer", "dataset_splits", "dataset_configs", "dataset_mixture", *_SINGLE)
"""Keys that this package does not have itself."""
ROLLOUT = 64
"""The default of rollout_batch_size."""
_TRL_ENTRY = {"path": "dataset_name", "name": "dataset_config", "split": "split"}
_HANDBOOK_ENTRY = {"id": "dataset_name", "config": "dataset_config", "split": "split", "weight": "fraction"}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _entry(key: str, entry: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """One source of a mixture: all rows of one split, `train` by default. `columns` only names those that are kept."""
    if not isinstance(entry, dict):
        raise _form(key, f"sources as mappings with {', '.join(names)}")
    kept = {names.get(name, name): value for name, value in entry.items() if name != "columns" and value is not None}
    return {"split": "train", "fraction": 1.0, **kept}


def _mixture(given: Any) -> Expanded:
    """`dataset_mixture` of alignment-handbook: a share of one split of each source, test rows drawn from all."""
    if not isinstance(given, dict) or not _list(given.get("datasets")):
        raise _form("dataset_mixture", "a mapping with a list `datasets`")
    extra = set(given) - {"datasets", "test_split_size", "seed"}
    if extra:
        raise _form("dataset_mixture", f"datasets, test_split_size and seed, not {', '.join(sorted(map(str, extra)))}")
    entries = [_entry("dataset_mixture", entry, _HANDBOOK_ENTRY) for entry in given["datasets"]]
    found: dict[str, Any] = {"datasets": entries}
    if given.get("test_split_size") is not None:
        found["test_split_size"] = given["test_split_size"]
    note = "read as datasets with fractions; rows are chosen by hash, not by its seed"
    return Expanded("dataset_mixture", ("dataset_mixture",), found, note)


def _mixer(values: Mapping[str, Any]) -> Expanded:
    """`dataset_mixer` of alignment-handbook: {source: fraction}, with `dataset_splits` and `dataset_configs`."""
    mixer, splits = values["dataset_mixer"], values.get("dataset_splits", ["train", "test"])
    configs = values.get("dataset_configs")
    if not isinstance(mixer, dict) or not mixer:
        raise _form("dataset_mixer", "a mapping of sources to fractions")
    trained, tested = ([name for name in _list(splits) if word in str(name)] for word in ("train", "test"))
    if len(trained) != 1 or len(tested) > 1 or len(trained) + len(tested) != len(_list(splits)):
        raise _form("dataset_splits", "a split to train on and at most one to evaluate on")
    if configs is not None and len(_list(configs)) != len(mixer):
        raise _form("dataset_configs", "one configuration for each source of dataset_mixer")
    entries: list[dict[str, Any]] = []
    for place, (name, fraction) in enumerate(mixer.items()):
        entry = {"dataset_name": name, "fraction": fraction}
        if configs is not None and configs[place] is not None:
            entry["dataset_config"] = configs[place]
        entries.append(entry if tested else entry | {"split": trained[0]})
    found: dict[str, Any] = {"datasets": entries}
    if tested:
        found |= {"dataset_train_split": trained[0], "dataset_test_split": tested[0]}
    if tested and len(entries) == 1 and entries[0].pop("fraction") == 1:
        del found["datasets"]
        found |= entries[0]
    read = ", ".join(found)
    return Expanded("dataset_mixer", SHORTHANDS[:3], found, f"read as {read}")


def _rollout(values: Mapping[str, Any]) -> Iterator[Expanded]:
    micro, steps = values.get("per_device_train_batch_size", 8), values["gradient_accumulation_steps"]
    parts = values.get("num_mini_batches", 1 if values.get("algorithm") == "a2c" else 4)
    if all(isinstance(part, int) and not isinstance(part, bool) and part > 0 for part in (micro, steps, parts)):
        size = micro * steps * parts
        if size == ROLLOUT:
            return
        note = f"rollout_batch_size is {micro} x {steps} x num_mini_batches {parts} = {size}, as in TRL"
        yield Expanded("gradient_accumulation_steps", (), {"rollout_batch_size": size}, note)


def _form(key: str, expected: str) -> ConfigError:
    return ConfigError(Fault(key, "found another form", expected))
