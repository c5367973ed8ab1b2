"""SHA-256 digests of files and of whole models."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from rlhf_pipeline.disk.stamps import Stamp, stamp

MANIFEST = "manifest.json"
CARD = "README.md"
SNAPSHOTS = "snapshots"

# Folders that trainers leave beside a model; not part of it.
_TRAINER_FOLDER = re.compile(r"checkpoint-\d+|runs")
_SNAPSHOT = re.compile(rf"{SNAPSHOTS}/step-([0-9]+)/")
_CHUNK = 1 << 20


class FileEntry(BaseModel):
    """Size in bytes and SHA-256 of one file."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)

    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """Return the SHA-256 of a file; this process reads it again only if it has changed.

    Used before loading; `rlhf models verify` always reads every file (`file_sha256`).
    """
    seen = stamp([path])
    return file_sha256(path) if seen is None else _sha256_of(path, seen)


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, seen: Stamp) -> str:
    return file_sha256(path)


def file_entry(path: Path) -> FileEntry:
    """Return the size and SHA-256 of a file."""
    return FileEntry(size=path.stat().st_size, sha256=file_sha256(path))


def list_files(folder: Path, *, links: bool = False) -> dict[str, Path]:
    """Return every file below a folder by its relative path, without the manifest and hidden files.

    `links`: include every symbolic link, whatever its target.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or relative.as_posix() == MANIFEST:
            continue
        if path.is_file() or (links and path.is_symlink()):
            found[relative.as_posix()] = path
    return found


def files_digest(files: Mapping[str, FileEntry]) -> str:
    """Return the digest of a model: the SHA-256 over the sorted paths and digests of its files.

    The model card and snapshots are excluded, so the same weights, tokenizer and config always have the same digest.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        if path != CARD and not path.startswith(f"{SNAPSHOTS}/"):
            digest.update(f"{path}\0{files[path].sha256}\n".encode())
    return digest.hexdigest()


def snapshot_folder(step: int) -> str:
    """Return the folder of a version's snapshot at a step: a complete folder in Hugging Face's format."""
    return f"{SNAPSHOTS}/step-{step}"


def snapshot_files(files: Mapping[str, FileEntry], step: int) -> dict[str, FileEntry]:
    """Return the files of one snapshot by their path within its folder."""
    prefix = snapshot_folder(step) + "/"
    return {path[len(prefix) :]: entry for path, entry in files.items() if path.startswith(prefix)}


def snapshot_steps(files: Mapping[str, FileEntry]) -> list[int]:
    """Return the steps of the snapshots among these files, in order."""
    return sorted({int(match[1]) for path in files if (match := _SNAPSHOT.match(path))})


def folder_files(folder: Path) -> dict[str, FileEntry]:
    """Return the entries of a model folder without a manifest, except folders that trainers leave beside it."""
    return {
        relative: file_entry(path)
        for relative, path in list_files(folder).items()
        if not _TRAINER_FOLDER.fullmatch(relative.split("/")[0])
    }
