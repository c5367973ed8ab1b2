"""The registry: models and collected data of a home, by reference."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace as changed
from pathlib import Path
from typing import Any

from rlhf_pipeline.disk import storage
from rlhf_pipeline.errors import BadInput, DamagedFile, UnknownReference, did_you_mean
from rlhf_pipeline.registry.adapters import base_of, is_adapter
from rlhf_pipeline.registry.card import model_card
from rlhf_pipeline.registry.digests import (
    CARD,
    MANIFEST,
    SNAPSHOTS,
    FileEntry,
    file_entry,
    list_files,
    snapshot_files,
    snapshot_folder,
    snapshot_steps,
)
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.manifest import DATA_STAGE, MODEL_STAGES, plain, read_manifest, without_reach
from rlhf_pipeline.registry.references import Reference, Resolved, Version, parse_reference
from rlhf_pipeline.registry.shelf import Shelf, check_name, in_quarantine

RECORDS = "records.jsonl"
LOOKUPS = 20  # attempts to look up a reference while versions of its name are being removed

log = logging.getLogger(__name__)


def folder_for_copy(target: Path | str, name: str | None = None) -> Path:
    """Return the absolute path of a folder for a copy of a model: new, empty, or with an earlier copy of `name`.

    Raises:
        BadInput: the folder has other content, or is not a folder.
    """
    target = Path(target).expanduser().absolute()
    blocked = any(above.exists() and not above.is_dir() for above in target.parents)
    if not blocked and (not target.exists() or (target.is_dir() and not any(target.iterdir()))):
        return target
    if name is not None and target.is_dir():
        with suppress(DamagedFile):
            if read_manifest(target).name == name:
                return target
    free = "a new or empty folder" + (f", or one with a copy of {name}" if name is not None else "")
    raise BadInput(f"{target}: exists and is not empty; export into {free}")


class Registry:
    """Everything under a home's `models/` and `data/`."""

    def __init__(self, home: Path | str):
        self.home = Path(home)
        self.models = Shelf(self.home / "models", "registry")
        self.data = Shelf(self.home / "data", "data")

    def publish(self, name: str, stage: str, write: Callable[[Path], None], **fields: Any) -> Version:
        """Publish a model as the next version of `name`; `write` saves its files into the given folder.

        Snapshots go into `snapshots/step-<n>/` of that folder. `fields` are those of the manifest: config,
        config_digest, parents {role: Resolved or Parent}, data, tokenizer_digest, chat_template_digest,
        seed, metrics, cost. If `write` fails, nothing is published.

        Raises:
            BadInput: the name is not allowed.
            RunFailed: the disk is full.
        """
        if stage not in MODEL_STAGES:
            raise ValueError(f"stage {stage!r}; expected one of {', '.join(MODEL_STAGES)}")
        return self.models.publish(name, stage, write, **fields)

    def publish_data(self, name: str, rows: Iterable[Mapping[str, Any]], **fields: Any) -> Version:
        """Publish collected records as the next version of `name`; fields as for `publish`."""

        def write(folder: Path) -> None:
            with (folder / RECORDS).open("w", encoding="utf-8") as file:
                for row in rows:
                    file.write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")

        return self.data.publish(name, DATA_STAGE, write, **fields)

    def resolve(self, text: str | Path, *, revision: str | None = None) -> Resolved:
        """Resolve a reference: to a model of the registry, else a folder, else a hub model.

        `revision` applies to a hub model whose reference has none.

        Raises:
            UnknownReference: nothing was found; the message lists similar names, versions and aliases.
            DamagedFile: the version's manifest is missing or not valid.
        """
        reference = parse_reference(str(text))
        if reference.name is not None and self.models.numbers(reference.name):
            resolved: Resolved = self._version(reference, reference.name)
        elif os.path.isdir(folder := os.path.expanduser(reference.text)):
            resolved = _directory(reference, Path(folder))
        elif reference.hub_id is not None:
            revision = reference.revision or revision
            resolved = Resolved("hub", reference.text, None, reference.hub_id, revision=revision)
        else:
            raise self._unknown(reference)
        log.info("%s", resolved.taken)
        return self._on_base(resolved)

    def resolve_data(self, text: str) -> Version:
        """Return collected data by `NAME` (its latest version) or `NAME@vN`.

        Raises:
            UnknownReference: nothing was found; the message lists similar names and versions.
            DamagedFile: the version's manifest is missing or not valid.
        """
        reference = parse_reference(text)
        name = reference.name or ""
        numbers = self.data.numbers(name)
        if not numbers or reference.alias or reference.step is not None:
            hint = did_you_mean(name or text, self.data.names()) or "rlhf data list shows what there is"
            raise UnknownReference(f"no collected data {text!r} in {self.data.base}; expected NAME or NAME@vN; {hint}")
        version = numbers[-1] if reference.version is None else reference.version
        if version not in numbers:
            raise UnknownReference(f"{name} (collected data) has no version v{version}; {_said(numbers)}")
        path = self.data.folder(name, version)
        return Version("data", text, path, name, version, manifest=read_manifest(path))

    def find(
        self,
        stage: str,
        config_digest: str,
        parents: Mapping[str, str | None],
        data: Iterable[str],
        name: str | None = None,
    ) -> Version | None:
        """Return the latest version with this stage, config, parents' digests and data digests, if any."""
        wanted = (stage, config_digest, dict(parents), sorted(data))
        shelf = self.data if stage == DATA_STAGE else self.models
        for item in reversed(shelf.all()):
            made = item.manifest
            if made is None or (name is not None and item.name != name):
                continue
            digests = {role: parent.digest for role, parent in made.parents.items()}
            sources = sorted(entry.digest for entry in made.data)
            if wanted == (made.stage, made.config_digest, digests, sources):
                return item
        return None

    def alias(self, reference: str, alias: str) -> Version:
        """Set `name@alias` to a version of that name, replacing an earlier one.

        Raises:
            BadInput: the alias is not allowed, or the reference is not a version of the registry.
        """
        check_name(alias, "alias")
        if re.fullmatch(r"v[0-9]+", alias):
            raise BadInput(f"alias {alias!r} looks like a version; choose another word")
        resolved = self._own(reference, "an alias")
        with storage.locked(self.models.base / resolved.name):
            self.models.require(resolved)
            aliases = self.models.aliases(resolved.name)
            self.models.set_aliases(resolved.name, {**aliases, alias: resolved.version})
        return resolved

    def remove(self, reference: str, *, force: bool = False) -> Version:
        """Remove a version; its number is not used again.

        Raises:
            BadInput: the version has children or an alias (`force` removes it and its aliases anyway), or the
                reference is not a version of the registry.
        """
        resolved = self._own(reference, "removing")
        with storage.locked(self.models.base / resolved.name):
            self.models.require(resolved)
            aliases = self.models.aliases(resolved.name)
            pointing = sorted(alias for alias, version in aliases.items() if version == resolved.version)
            users = self._users(resolved)
            reasons = [f"it is a parent of {', '.join(users)}"] if users else []
            reasons += [f"the alias {', '.join(pointing)} names it"] if pointing else []
            if reasons and not force:
                found = f"{resolved.label} is in use: {' and '.join(reasons)}"
                raise BadInput(f"{found}; remove these first, or use --force")
            if pointing:
                rest = {alias: version for alias, version in aliases.items() if alias not in pointing}
                self.models.set_aliases(resolved.name, rest)
            self.models.remove(resolved.name, resolved.version)
        return resolved

    def export(
        self,
        reference: str | Resolved,
        target: Path | str,
        write: Callable[[Path], None] | None = None,
        *,
        replace: bool = False,
        **metrics: Any,
    ) -> Path:
        """Copy a model's files and manifest into a new or empty folder, for use with plain transformers.

        Args:
            write: writes other files for the same model: those of merged weights. metrics: further metrics for the
                manifest.
            replace: also into a folder with an earlier copy of a model of this name, which is removed.

        Raises:
            BadInput: the folder is not free, or the reference is not a model of the registry.
            DamagedFile: a file differs from the manifest.
        """
        resolved = reference if isinstance(reference, Resolved) else self.resolve(reference)
        if write is None and (not isinstance(resolved, Version) or resolved.kind != "registry"):
            raise BadInput(f"{resolved.label} is not in the registry; only models of the registry can be exported")
        target = folder_for_copy(target, resolved.name if replace else None)
        verify_files(resolved)
        manifest = resolved.manifest
        with storage.staging(target.parent, target.name) as staged:
            if write is not None:
                write(staged)
                if manifest is not None:
                    changes = {"adapter": {}, "metrics": {**manifest.metrics, **metrics}}
                    manifest = manifest.model_copy(update=changes)
                    storage.replace_text(staged / CARD, model_card(manifest))
                files = {path: file_entry(file) for path, file in list_files(staged).items()}
            else:
                assert resolved.path is not None  # models of the registry are folders
                files = {path: item for path, item in resolved.files.items() if not path.startswith(f"{SNAPSHOTS}/")}
                for path in files:
                    (staged / path).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(resolved.path / path, staged / path)
            if manifest is not None:
                storage.replace_text(staged / MANIFEST, manifest.model_copy(update={"files": files}).to_json())
            storage.sync_tree(staged)
            if replace and target.exists():
                shutil.rmtree(target)
            if not storage.claim(staged, target):
                raise BadInput(f"{target}: was filled by another process; export into a new or empty folder")
        return target

    def _users(self, resolved: Resolved) -> list[str]:
        return [
            item.label
            for item in [*self.models.all(), *self.data.all()]
            if item.manifest is not None
            and any(p.ref.partition("#")[0] == resolved.label for p in item.manifest.parents.values())
        ]

    def _own(self, reference: str, purpose: str) -> Version:
        resolved = self.resolve(reference)
        if not isinstance(resolved, Version) or resolved.kind != "registry" or resolved.step is not None:
            raise BadInput(f"{resolved.label}: {purpose} needs a version of the registry: name@vN")
        return resolved

    def _on_base(self, resolved: Resolved) -> Resolved:
        """The same model; an adapter also finds its base, when something asks for it."""
        if resolved.path is None or not is_adapter(resolved.path):
            return resolved
        return changed(resolved, find_base=lambda found: base_of(found, self.resolve))

    def _version(self, reference: Reference, name: str) -> Version:
        step = reference.step
        for _ in range(LOOKUPS):
            path = self.models.folder(name, version := self._number(reference, name))
            try:
                manifest = read_manifest(path)
                break
            except DamagedFile:
                if path.is_dir():
                    raise
                # It was removed meanwhile: the reference now names another version, or none.
        else:
            raise self._unknown(reference)
        if step is not None:
            if not snapshot_files(manifest.files, step):
                found = f"{name}@v{version} has no snapshot of step {step}"
                raise UnknownReference(f"{found}; {_steps(manifest.files)}")
            path = path / snapshot_folder(step)
        return Version("registry", reference.text, path, name, version, step, manifest=manifest)

    def _number(self, reference: Reference, name: str) -> int:
        alias, version = reference.alias, reference.version
        # Aliases are read only if needed: a damaged alias file stops nothing else. They are read before the versions,
        # because an alias may name a version that has just appeared.
        if alias is not None:
            version = self.models.aliases(name).get(alias)
        numbers = self.models.numbers(name)
        if alias is None and version is None and numbers:
            return numbers[-1]
        if version is not None and version in numbers:
            return version
        if not numbers:
            raise self._unknown(reference)
        aliases = self.models.aliases(name)
        what = f"version v{version}" if alias is None else f"alias {alias!r}"
        hint = "" if alias is None else did_you_mean(alias, aliases)
        if alias is None and f"v{version}" in in_quarantine(self.home, name):
            hint = f"v{version} was damaged and is in quarantine"
        raise UnknownReference("; ".join(filter(None, [f"{name} has no {what}", _said(numbers, aliases), hint])))

    def _unknown(self, reference: Reference) -> UnknownReference:
        names = self.models.names()
        hint = did_you_mean(reference.name or reference.text, names)
        if reference.name and (aside := in_quarantine(self.home, reference.name)):
            hint = f"damaged and in quarantine: {', '.join(aside)}"
        if not hint:
            hint = f"there are {', '.join(names[:10])}" if names else "the registry has no models yet"
        return UnknownReference(
            f"no model {reference.text!r}: not in {self.models.base}, not a folder, and not a hub id (org/name); {hint}"
        )


def _directory(reference: Reference, folder: Path) -> Resolved:
    packed = sorted(folder.glob("*.gguf"))
    if packed and not any(folder.glob("*.safetensors")):
        raise BadInput(
            f"{folder}: found GGUF weights ({packed[0].name}), which cannot be trained; expected safetensors; convert "
            f"them once (pip install gguf): AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file={packed[0].name!r}, "
            "quantization_config=GgufConfig(dequantize=True)).save_pretrained(NEW), and put the tokenizer of the "
            "original model beside them (the one that transformers makes from GGUF may split text in another way)"
        )
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UnknownReference(f"{folder}: a folder without config.json; expected a model in Hugging Face's format")
    path = folder.resolve()
    manifest = without_reach(read_manifest(path)) if (path / MANIFEST).is_file() else None
    return Resolved("directory", reference.text, path, manifest=manifest)


def _said(numbers: Iterable[int], aliases: Mapping[str, int] | None = None) -> str:
    words = [f"v{number}" for number in numbers]
    words += [f"{alias} (v{number})" for alias, number in (aliases or {}).items()]
    return f"there are {', '.join(words)}"


def _steps(files: Mapping[str, FileEntry]) -> str:
    steps = snapshot_steps(files)
    return f"there are steps {', '.join(map(str, steps))}" if steps else "it has no snapshots"
