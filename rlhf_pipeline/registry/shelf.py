"""Versions of models or of collected data: `<base>/<name>/v<N>/`, numbered, immutable, whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline.config.names import NAME_RULE, is_name
from rlhf_pipeline.disk import storage
from rlhf_pipeline.errors import BadInput, DamagedFile, UnknownReference
from rlhf_pipeline.registry.card import license_of, model_card
from rlhf_pipeline.registry.digests import CARD, MANIFEST, file_entry, list_files
from rlhf_pipeline.registry.manifest import Manifest, Parent, build_manifest, read_manifest
from rlhf_pipeline.registry.provenance import code_state, environment
from rlhf_pipeline.registry.references import NAME, Resolved, Version
from rlhf_pipeline.registry.roles import read_json

ALIASES = "aliases.json"
REMOVED = "removed.json"
RESERVED = "reserved.json"
QUARANTINE = "quarantine"
_MEND = "restore it, or use rlhf models verify --repair"
_MEND_RESERVED = "remove it: unfinished runs then get new numbers"
_VERSION_FOLDER = re.compile(r"v([1-9][0-9]*)")


class Shelf:
    """The models or the collected data of a home."""

    def __init__(self, base: Path, kind: Literal["registry", "data"]):
        self.base = base
        self.kind = kind

    def names(self) -> list[str]:
        """Return the names that have a version."""
        if not self.base.is_dir():
            return []
        return sorted(path.name for path in self.base.iterdir() if self.numbers(path.name))

    def numbers(self, name: str) -> list[int]:
        """Return the versions of a name, oldest first; [] for an unknown name."""
        folder = self.base / name
        if NAME.fullmatch(name) is None or not folder.is_dir():
            return []
        matches = ((path, _VERSION_FOLDER.fullmatch(path.name)) for path in folder.iterdir())
        return sorted(int(match[1]) for path, match in matches if match and path.is_dir())

    def folder(self, name: str, version: int) -> Path:
        """Return the folder of a version."""
        return self.base / name / f"v{version}"

    def all(self) -> list[Version]:
        """Return every version by name and number; its manifest is None if unreadable."""
        return [item for name in self.names() for item in self.versions(name)]

    def versions(self, name: str) -> list[Version]:
        """Return every version of a name by number; its manifest is None if unreadable."""
        found = []
        for version in self.numbers(name):
            path = self.folder(name, version)
            try:
                manifest = read_manifest(path)
            except DamagedFile:
                manifest = None
            found.append(Version(self.kind, f"{name}@v{version}", path, name, version, manifest=manifest))
        return found

    def of_run(self, name: str, run: str) -> Version | None:
        """Return the version of a name that a run has published; None if there is none."""
        own = [item for item in self.versions(name) if item.manifest is not None and item.manifest.run == run]
        return own[-1] if own else None

    def publish(
        self,
        name: str,
        stage: str,
        write: Callable[[Path], None],
        *,
        parents: Mapping[str, Resolved | Parent] | None = None,
        number: int | None = None,
        **fields: Any,
    ) -> Version:
        """Let `write` fill a folder and publish it as the next version; if it fails, nothing is published.

        Args:
            number: the version number reserved for it; without one, or if it is taken, the next number is used.

        Raises:
            BadInput: the name is not allowed.
            RunFailed: the disk is full.
        """
        check_name(name, "name")
        fields = {"environment": environment(), **fields, "code": fields.get("code") or code_state()}
        fields["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        fields["parents"] = {
            role: parent.parent if isinstance(parent, Resolved) else parent for role, parent in (parents or {}).items()
        }
        fields["license"] = _license(parents or {})
        with storage.staging(self.base, name) as staged:
            write(staged)
            files = {path: file_entry(file) for path, file in list_files(staged).items() if path != CARD}
            if not files:
                raise ValueError(f"nothing was written for {name}")
            storage.sync_tree(staged)
            storage.sweep(self.base / name)
            # Without the lock a version could be published and removed between counting and claiming.
            with storage.locked(self.base / name):
                reserved = self.reserved(name)
                version = self._last(name, reserved) + 1
                if number is not None and number in reserved.values():
                    version = number
                while True:
                    manifest = build_manifest(name=name, version=version, stage=stage, files=files, **fields)
                    if self.kind == "registry":
                        manifest = _with_card(staged, manifest)
                    storage.replace_text(staged / MANIFEST, manifest.to_json())
                    target = self.folder(name, version)
                    if storage.claim(staged, target):
                        if (self.base / name / RESERVED).exists():
                            self._set_reserved(name, self.reserved(name))
                        return Version(self.kind, manifest.label, target, name, version, manifest=manifest)
                    version = max(version, self._last(name, reserved)) + 1

    def _last(self, name: str, reserved: Mapping[str, int]) -> int:
        """The highest number of a name that is or was used, or is reserved; 0 if there is none."""
        # The number of a removed version is not used again: references to it must not change meaning.
        return max([0, *self.numbers(name), *self.gone(name), *reserved.values()])

    def reserve(self, name: str, run: str) -> int:
        """Return the version number that is reserved for a run: from an earlier call, else the next number.

        A reservation ends when a version has its number.

        Args:
            run: identifies the run, also when it is started again.

        Raises:
            BadInput: the name is not allowed.
        """
        check_name(name, "name")
        with storage.locked(self.base / name):
            reserved = self.reserved(name)
            if run not in reserved:
                reserved[run] = self._last(name, reserved) + 1
                self._set_reserved(name, reserved)
        return reserved[run]

    def reserved(self, name: str) -> dict[str, int]:
        """Return the numbers that are reserved and not yet used, by the identifier of their run.

        Raises:
            DamagedFile: the file of reserved numbers cannot be read.
        """
        path = self.base / name / RESERVED
        found = read_json(path, _MEND_RESERVED)
        if any(type(number) is not int or number < 1 for number in found.values()):
            raise DamagedFile(f"{path}: expected the number of a version for each run; {_MEND_RESERVED}")
        used = {*self.numbers(name), *self.gone(name)} if found else set()
        return {run: number for run, number in found.items() if number not in used}

    def _set_reserved(self, name: str, reserved: Mapping[str, int]) -> None:
        """Replace the reserved numbers of a name; the caller holds the lock of its folder."""
        path = self.base / name / RESERVED
        if reserved:
            storage.replace_text(path, json.dumps(reserved, indent=2) + "\n")
        else:
            path.unlink(missing_ok=True)

    def aliases(self, name: str) -> dict[str, int]:
        """Return the aliases of a name, each with its version.

        Raises:
            DamagedFile: the file of aliases cannot be read.
        """
        path = self.base / name / ALIASES
        found = {}
        for alias, version in read_json(path, _MEND).items():
            match = _VERSION_FOLDER.fullmatch(version) if isinstance(version, str) else None
            if match is None or NAME.fullmatch(alias) is None:
                expected = 'an alias and a version such as "v1"'
                raise DamagedFile(f"{path}: {alias!r} names {version!r}; expected {expected}; {_MEND}")
            found[alias] = int(match[1])
        return found

    def set_aliases(self, name: str, aliases: Mapping[str, int]) -> None:
        """Replace the aliases of a name; the caller holds the lock of its folder."""
        content = {alias: f"v{version}" for alias, version in sorted(aliases.items())}
        storage.replace_text(self.base / name / ALIASES, json.dumps(content, indent=2) + "\n")

    def remove(self, name: str, version: int) -> None:
        """Remove a version permanently; the caller holds the lock of its folder."""
        self.set_gone(name, {*self.gone(name), version})
        hidden = self.base / f".{name}-{uuid.uuid4().hex[:12]}.tmp"
        os.rename(self.folder(name, version), hidden)
        for changed in (self.base / name, self.base):
            storage.sync(changed)
        shutil.rmtree(hidden, ignore_errors=True)

    def require(self, resolved: Version) -> None:
        """Check, under the lock of its name, that a version found earlier still exists.

        Raises:
            UnknownReference: it was removed meanwhile.
        """
        if resolved.version not in self.numbers(resolved.name):
            raise UnknownReference(f"{resolved.label} has just been removed")

    def gone(self, name: str) -> list[int]:
        """Return the versions of a name that were removed or quarantined.

        Raises:
            DamagedFile: the file of removed versions cannot be read.
        """
        path = self.base / name / REMOVED
        found = read_json(path, _MEND).get("versions", [])
        if not isinstance(found, list) or any(type(number) is not int or number < 1 for number in found):
            raise DamagedFile(f"{path}: expected a list of versions; {_MEND}")
        return found

    def set_gone(self, name: str, versions: Iterable[int]) -> None:
        """Replace the list of removed versions; the caller holds the lock of the name's folder."""
        content = {"versions": sorted(set(versions))}
        storage.replace_text(self.base / name / REMOVED, json.dumps(content) + "\n")


def check_name(name: str, what: str) -> None:
    """Check a name or alias against the rule for names.

    Raises:
        BadInput: it is not allowed.
    """
    if not is_name(name):
        raise BadInput(f"{what} {name!r} is not allowed; expected {NAME_RULE}")


def in_quarantine(home: Path, name: str) -> list[str]:
    """Return the versions of a name that are in quarantine, as `v3`."""
    found = (path.name[len(name) + 1 :].split("-")[0] for path in (home / QUARANTINE).glob(f"{name}-v*-*"))
    return sorted({word for word in found if word[1:].isdigit()}, key=lambda word: int(word[1:]))


def _with_card(staged: Path, manifest: Manifest) -> Manifest:
    card = staged / CARD
    storage.replace_text(card, model_card(manifest))
    return manifest.model_copy(update={"files": {**manifest.files, CARD: file_entry(card)}})


def _license(parents: Mapping[str, Resolved | Parent]) -> str | None:
    """The licence of the parents, from their manifests or cards; None if it is not known or not the same for all."""
    found = set()
    for parent in parents.values():
        if isinstance(parent, Resolved):
            known = parent.manifest.license if parent.manifest is not None else None
            found.add(known or (license_of(parent.path) if parent.path is not None else None))
    return found.pop() if len(found) == 1 else None
