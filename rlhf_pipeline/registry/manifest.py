"""What a version says about itself: `manifest.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.registry.digests import MANIFEST, FileEntry, files_digest

MODEL_STAGES = ("sft", "reward", "ppo", "dpo")
DATA_STAGE = "collect"


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
    files: dict[str, FileEntry]

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, FileEntry]) -> dict[str, FileEntry]:
        for path in files:
            parts = PurePosixPath(path).parts
            if not parts or path.startswith("/") or ".." in parts:
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
        """Return strict JSON; numbers that JSON cannot hold (nan, inf) become null."""
        return json.dumps(plain(self.model_dump()), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


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


def build_manifest(**fields: Any) -> Manifest:
    """Return a validated manifest of values that need not be plain JSON yet."""
    return Manifest.model_validate(plain(fields))


def parse_manifest(text: str, where: str) -> Manifest:
    """Return the manifest in a text.

    Raises:
        DamagedFile: the text is not strict JSON or misses what a manifest must have.
    """
    try:
        fields = json.loads(text, parse_constant=_refuse_constant)
        return Manifest.model_validate(fields)
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
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise DamagedFile(
            f"{path}: missing; every version has a manifest: restore the file, or remove this version"
        ) from None
    except UnicodeDecodeError:
        raise DamagedFile(f"{path}: not UTF-8; restore the file, or remove this version") from None
    return parse_manifest(text, str(path))


def _refuse_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")
