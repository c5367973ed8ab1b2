"""One kind of thing by name and version: `<base>/<name>/v<N>/`, numbered, immutable, whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline.errors import BadInput, DamagedFile
from rlhf_pipeline.registry import storage
from rlhf_pipeline.registry.card import model_card
from rlhf_pipeline.registry.digests import CARD, MANIFEST, file_entry, list_files
from rlhf_pipeline.registry.manifest import Manifest, Parent, build_manifest, read_manifest
from rlhf_pipeline.registry.provenance import code_state, environment
from rlhf_pipeline.registry.references import NAME, NAME_RULE, Resolved

_ALIASES = "aliases.json"
_REMOVED = "removed.json"
_VERSION_FOLDER = re.compile(r"v([1-9][0-9]*)")


class Shelf:
    """The models, or the collected data, of a home."""

    def __init__(self, base: Path, kind: Literal["registry", "data"]):
        self.base = base
        self.kind = kind

    def names(self) -> list[str]:
        """Return the names that have a version."""
        if not self.base.is_dir():
            return []
        return sorted(path.name for path in self.base.iterdir() if self.numbers(path.name))

    def numbers(self, name: str) -> list[int]:
        """Return the versions of a name, oldest first; none where there is no such name."""
        folder = self.base / name
        if NAME.fullmatch(name) is None or not folder.is_dir():
            return []
        matches = ((path, _VERSION_FOLDER.fullmatch(path.name)) for path in folder.iterdir())
        return sorted(int(match[1]) for path, match in matches if match and path.is_dir())

    def folder(self, name: str, version: int) -> Path:
        """Return where a version lies."""
        return self.base / name / f"v{version}"

    def all(self) -> list[Resolved]:
        """Return every version by name and number; one without a readable manifest has None there."""
        found = []
        for name in self.names():
            for version in self.numbers(name):
                path = self.folder(name, version)
                try:
                    manifest = read_manifest(path)
                except DamagedFile:
                    manifest = None
                label = f"{name}@v{version}"
                found.append(Resolved(self.kind, label, path, name, version, manifest=manifest))
        return found

    def publish(
        self,
        name: str,
        stage: str,
        write: Callable[[Path], None],
        *,
        parents: Mapping[str, Resolved | Parent] | None = None,
        **fields: Any,
    ) -> Resolved:
        """Let `write` fill a folder and publish it as the next version; nothing appears where it fails.

        Raises:
            BadInput: the name is not allowed.
            RunFailed: the disk is full.
        """
        check_name(name, "name")
        fields = {"code": code_state(), "environment": environment(), **fields}
        fields["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        fields["parents"] = {
            role: parent.parent if isinstance(parent, Resolved) else parent for role, parent in (parents or {}).items()
        }
        with storage.staging(self.base, name) as staged:
            write(staged)
            files = {path: file_entry(file) for path, file in list_files(staged).items() if path != CARD}
            if not files:
                raise ValueError(f"nothing was written for {name}")
            storage.sync_tree(staged)
            # A removed version's number is not given to another: references to it must not change meaning.
            version = max([0, *self.numbers(name), *self._removed(name)])
            while True:
                version += 1
                manifest = build_manifest(name=name, version=version, stage=stage, files=files, **fields)
                if self.kind == "registry":
                    manifest = _with_card(staged, manifest)
                storage.replace_text(staged / MANIFEST, manifest.to_json())
                target = self.folder(name, version)
                if storage.claim(staged, target):
                    return Resolved(self.kind, manifest.label, target, name, version, manifest=manifest)

    def aliases(self, name: str) -> dict[str, int]:
        """Return the aliases of a name with the version that each names.

        Raises:
            DamagedFile: the file of aliases cannot be read.
        """
        path = self.base / name / _ALIASES
        found = {}
        for alias, version in _read_json(path).items():
            match = _VERSION_FOLDER.fullmatch(str(version))
            if match is None:
                raise DamagedFile(f'{path}: {alias!r} names {version!r}; expected a version such as "v1"')
            found[alias] = int(match[1])
        return found

    def set_aliases(self, name: str, aliases: Mapping[str, int]) -> None:
        """Replace the aliases of a name; the caller holds the lock of its folder."""
        content = {alias: f"v{version}" for alias, version in sorted(aliases.items())}
        storage.replace_text(self.base / name / _ALIASES, json.dumps(content, indent=2) + "\n")

    def remove(self, name: str, version: int) -> None:
        """Remove a version at once and for good; the caller holds the lock of its folder."""
        versions = sorted({*self._removed(name), version})
        storage.replace_text(self.base / name / _REMOVED, json.dumps({"versions": versions}) + "\n")
        hidden = self.base / f".{name}-{uuid.uuid4().hex[:12]}.tmp"
        os.rename(self.folder(name, version), hidden)
        shutil.rmtree(hidden, ignore_errors=True)

    def _removed(self, name: str) -> list[int]:
        return _read_json(self.base / name / _REMOVED).get("versions", [])


def check_name(name: str, what: str) -> None:
    """Check a name or alias against the rule for names.

    Raises:
        BadInput: it is not allowed.
    """
    if NAME.fullmatch(name) is None:
        raise BadInput(f"{what} {name!r} is not allowed; expected {NAME_RULE}")


def _with_card(staged: Path, manifest: Manifest) -> Manifest:
    card = staged / CARD
    storage.replace_text(card, model_card(manifest))
    return manifest.model_copy(update={"files": {**manifest.files, CARD: file_entry(card)}})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise DamagedFile(f"{path}: not valid JSON ({error}); restore or delete it") from None
    if not isinstance(content, dict):
        raise DamagedFile(f"{path}: {type(content).__name__}, expected a JSON object; restore or delete it")
    return content
