"""The manifest of a version: `manifest.json`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rlhf_pipeline.disk.sealed import seal, unseal
from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.registry.digests import MANIFEST, FileEntry, files_digest

MODEL_STAGES = ("sft", "reward", "ppo", "dpo")
DATA_STAGE = "collect"
MOST_BYTES = 64 << 20  # a normal manifest has kilobytes


class Parent(BaseModel):
    """A parent model, by reference and digest (None for a hub model)."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    ref: str
    digest: str | None = None


class DataEntry(BaseModel):
    """A data source of a version; further fields are kept."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    source: str
    split: str | None = None
    digest: str
    rows: int = Field(ge=0)
    dropped: dict[str, int] = {}

    @property
    def is_stream(self) -> bool:
        """Whether these are the data of a pretraining stream beside the data of the stage."""
        return (self.model_extra or {}).get("role") == "stream"


class Manifest(BaseModel):
    """Name, origin and files of one version; unknown fields of newer releases are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    name: str
    version: int = Field(ge=1)
    stage: str
    parents: dict[str, Parent] = {}
    config: dict[str, Any] = {}
    config_digest: str = ""
    data: list[DataEntry] = []
    tokenizer_digest: str | None = None
    chat_template_digest: str | None = None
    seed: int | None = None
    code: dict[str, Any] = {}
    environment: dict[str, Any] = {}
    metrics: dict[str, Any] = {}
    moves_optimum: dict[str, Any] | None = None  # None: from an older release, see registry/optimum.py
    may_move_optimum: dict[str, Any] = {}
    cost: dict[str, Any] = {}
    adapter: dict[str, Any] = {}  # facts of an adapter on the parent `base`; {}: whole weights
    license: str | None = None  # that of its parents
    created: str = ""
    run: str = ""  # its folder in runs/, and an identifier of the run
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in files:
            parts = path.split("/")
            if {"", ".", ".."} & set(parts) or "\\" in path or not path.isprintable():
                raise ValueError(f"{path!r} is not a path within the version")
        return files

    @property
    def label(self) -> str:
        """`name@vN`."""
        return f"{self.name}@v{self.version}"

    @property
    def digest(self) -> str:
        """The digest of the version's files."""
        return files_digest(self.files)

    def to_json(self) -> str:
        """Return strict JSON with a digest of its own text; nan and inf become null."""
        return seal(plain(self.model_dump()))


def plain(value: Any) -> Any:
    """Return a value as plain JSON: lists, string keys, no nan, numpy and torch scalars as numbers."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain(item) for item in value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def without_reach(manifest: Manifest) -> Manifest:
    """Return the untrusted manifest of a folder without anything that could access the network or run code.

    The result has no data source that is not local, no permission to run a model's code, and no value of an unexpected
    type in config, metrics and cost.
    """

    def given(source: str) -> bool:
        return source.startswith(("world:", "collected:")) or os.path.exists(os.path.expanduser(source))

    def kept(key: str, value: Any) -> bool:
        if key in ("trust_remote_code", "attn_implementation"):
            return False
        if value is None:
            return True
        if key in ("max_prompt_length", "response_length", "max_length"):
            return type(value) is int and 0 < value < 1 << 31
        if key in _KINDS:
            return _KINDS[key](value)
        if key in ("dataset_name", "dataset_test_name", "prompts"):
            return isinstance(value, str) and given(value)
        if key == "datasets":
            parts = value if isinstance(value, list) else []
            return all(isinstance(part, dict) and given(str(part.get("dataset_name"))) for part in parts)
        return True

    config = {key: value for key, value in manifest.config.items() if kept(key, value)}
    metrics = {key: value for key, value in manifest.metrics.items() if key not in _METRICS or _METRICS[key](value)}
    cost = {key: value for key, value in manifest.cost.items() if isinstance(value, dict) or _is_number(value)}
    return manifest.model_copy(update={"config": config, "metrics": metrics, "cost": cost})


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _are_fractions(value: Any) -> bool:
    amounts = isinstance(value, dict) and all(map(_is_amount, value.values()))
    return amounts and math.isclose(sum(value.values()), 1.0, abs_tol=1e-6)


def _are_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_text, (*value, *value.values())))


def _are_rewards(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(part, dict) and _is_text(part.get("source")) and _is_number(part.get("weight", 1.0))
        for part in value
    )


def _are_findings(value: Any) -> bool:
    told = ("cause", "since_step", "message")
    return isinstance(value, list) and all(isinstance(one, dict) and one.keys() >= set(told) for one in value)


def _is_slope(value: Any) -> bool:
    ends = [value.get(key) for key in ("mean", "low", "high")] if isinstance(value, dict) else []
    return bool(ends) and all(end is None or _is_number(end) for end in ends)


# The fields of a manifest's config and metrics that are read, and checks of their types.
_KINDS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("stop_token", "dataset_config", "reward_model_path"), _is_text),
    **dict.fromkeys(("temperature", "kl_coef", "beta"), _is_amount),
    "split_fractions": _are_fractions,
    "column_mapping": _are_texts,
    "reward_functions": _are_rewards,
    "reward_tokenization": lambda value: value in ("auto", "ids", "text", "chat"),
}
_METRICS = {"calibration_slope": _is_slope, "gate": _is_object, "health": _are_findings}


def build_manifest(**fields: Any) -> Manifest:
    """Return a validated manifest; the values are converted to plain JSON first."""
    return Manifest.model_validate(plain(fields))


def parse_manifest(text: str, where: str) -> Manifest:
    """Return the manifest in a text.

    Raises:
        DamagedFile: the text is not strict JSON, was changed, or lacks a required field.
    """
    try:
        return Manifest.model_validate(unseal(text))
    except ValidationError as error:
        faults = "; ".join(
            f"{'.'.join(str(part) for part in fault['loc']) or 'top level'}: {fault['msg']}" for fault in error.errors()
        )
    except ValueError as error:
        faults = str(error)
    raise DamagedFile(
        f"{where}: not a valid manifest ({faults}); a manifest must not be edited: "
        "restore the file, or remove this version"
    )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a version's folder.

    Raises:
        DamagedFile: it is missing or not valid.
    """
    path = folder / MANIFEST
    try:
        if (size := path.stat().st_size) <= MOST_BYTES:
            return parse_manifest(path.read_bytes().decode("utf-8"), str(path))
        found = f"{size} bytes, too long for a manifest:"
    except (FileNotFoundError, NotADirectoryError):
        found = "missing; every version has a manifest:"
    except IsADirectoryError:
        found = "a folder;"
    except UnicodeDecodeError:
        found = "not UTF-8;"
    raise DamagedFile(f"{path}: {found} restore the file, or remove this version")
