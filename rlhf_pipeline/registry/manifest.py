"""What a version says about itself: `manifest.json`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rlhf_pipeline.data.sealed import seal, unseal
from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.registry.digests import MANIFEST, FileEntry, files_digest

MODEL_STAGES = ("sft", "reward", "ppo", "dpo")
DATA_STAGE = "collect"
MOST_BYTES = 64 << 20  # a manifest has kilobytes


class Parent(BaseModel):
    """A model that went into a version, by reference and digest (none for a model on the hub)."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    ref: str
    digest: str | None = None


class DataEntry(BaseModel):
    """A data source that went into a version; what else is said about it is kept."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True)

    source: str
    split: str | None = None
    digest: str
    rows: int = Field(ge=0)
    dropped: dict[str, int] = {}


class Manifest(BaseModel):
    """Name, origin and files of one version; fields that a newer release added are passed over."""

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
    cost: dict[str, Any] = {}
    created: str = ""
    run: str = ""  # the folder of runs/ that it comes from, and a mark of that very run
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
        """Return strict JSON with a digest of its own text; numbers that JSON cannot hold (nan, inf) become null."""
        return seal(plain(self.model_dump()))


def plain(value: Any) -> Any:
    """Return a value as JSON has it: lists, string keys, no nan, scalars of numpy and torch as numbers."""
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
    """Return the manifest of a folder, which anybody may have written, without what would reach beyond the machine.

    Its config keeps no data source that is not at hand, no leave to run a model's code, and no lengths that are not
    numbers.
    """

    def given(source: str) -> bool:
        return source.startswith(("world:", "collected:")) or os.path.exists(os.path.expanduser(source))

    def kept(key: str, value: Any) -> bool:
        if key in ("trust_remote_code", "attn_implementation"):
            return False
        if key in ("max_prompt_length", "response_length", "max_length"):
            return value is None or (type(value) is int and value > 0)
        if key in ("dataset_name", "prompts"):
            return isinstance(value, str) and given(value)
        if key == "datasets":
            parts = value if isinstance(value, list) else []
            return all(isinstance(part, dict) and given(str(part.get("dataset_name"))) for part in parts)
        return True

    config = {key: value for key, value in manifest.config.items() if kept(key, value)}
    return manifest.model_copy(update={"config": config})


def build_manifest(**fields: Any) -> Manifest:
    """Return a validated manifest of values that need not be plain JSON yet."""
    return Manifest.model_validate(plain(fields))


def parse_manifest(text: str, where: str) -> Manifest:
    """Return the manifest in a text.

    Raises:
        DamagedFile: the text is not strict JSON, not what was written, or misses what a manifest must have.
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
        f"{where}: not a valid manifest ({faults}); a manifest is written once and never edited: "
        "restore the file, or remove this version"
    )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a version's folder.

    Raises:
        DamagedFile: it is missing or not valid.
    """
    path = folder / MANIFEST
    try:
        if (size := path.stat().st_size) > MOST_BYTES:
            raise DamagedFile(
                f"{path}: {size} bytes; no manifest is that long: restore the file, or remove this version"
            )
        text = path.read_bytes().decode("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedFile(
            f"{path}: missing; every version has a manifest: restore the file, or remove this version"
        ) from None
    except (UnicodeDecodeError, IsADirectoryError) as error:
        found = "a folder" if isinstance(error, IsADirectoryError) else "not UTF-8"
        raise DamagedFile(f"{path}: {found}; restore the file, or remove this version") from None
    return parse_manifest(text, str(path))
