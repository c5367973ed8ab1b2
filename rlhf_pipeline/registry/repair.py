"""Find faults in a home and repair them: damaged items are quarantined unchanged, nothing is deleted."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from rlhf_pipeline.disk import storage
from rlhf_pipeline.errors import BadInput, DamagedFile, Fault, RunFailed, UnknownReference
from rlhf_pipeline.registry.card import model_card
from rlhf_pipeline.registry.digests import CARD, MANIFEST, file_entry, list_files
from rlhf_pipeline.registry.integrity import UNLISTED, problems
from rlhf_pipeline.registry.lineage import COLLECTED
from rlhf_pipeline.registry.manifest import read_manifest
from rlhf_pipeline.registry.references import Resolved, Version, parse_reference
from rlhf_pipeline.registry.shelf import ALIASES, QUARANTINE, REMOVED, RESERVED, Shelf, in_quarantine
from rlhf_pipeline.registry.store import Registry


@dataclass(frozen=True)
class Mended:
    """A repair: the damaged item (`what`), the action (`done`), and its path in the quarantine."""

    what: str
    done: str
    path: str | None = None

    def __str__(self) -> str:
        return f"{self.what}: {self.done}" + (f": {self.path}" if self.path else "")


def registry_faults(registry: Registry, reference: str | None = None) -> list[Fault]:
    """Return all faults of one model or data set, or of a whole home.

    Raises:
        UnknownReference: the reference does not exist.
    """
    if reference is not None:
        try:
            found = _find(registry, reference)
        except DamagedFile as error:
            return [Fault("", str(error))]
        if isinstance(found, Version) and found.step is None:
            return version_faults(found)
        return problems(found)
    faults: list[Fault] = []
    for shelf in (registry.models, registry.data):
        for name in shelf.names():
            for item in shelf.versions(name):
                wrong = version_faults(item)
                if wrong and item.path.is_dir():  # it may have been removed meanwhile
                    faults += wrong
            faults += _name_faults(shelf, name)
    return faults


def version_faults(item: Version) -> list[Fault]:
    """Return the faults of one version's folder: its manifest, location and files."""
    try:
        manifest = read_manifest(item.path)
    except DamagedFile as error:
        return [Fault(item.label, str(error))]
    faults = []
    if manifest.label != item.label:
        where = f"{item.label}: {MANIFEST}"
        faults.append(Fault(where, f"names {manifest.label}", item.label, "move the folder back"))
    return faults + problems(item)


def repair(registry: Registry, reference: str | None = None) -> list[Mended]:
    """Quarantine every damaged version and remove its aliases; returns the repairs.

    A damaged model card is written again if possible. If the only fault is a file that does not belong to the version,
    only that file is quarantined. The name then refers to the previous version, and the number of a quarantined version
    is not used again.

    Raises:
        BadInput: the reference is not a version in this home.
    """
    if reference is not None:
        found = _find(registry, reference, damaged=True)
        if not isinstance(found, Version) or found.step is not None:
            raise BadInput(f"{found.label}: --repair needs a version in this home: name, name@vN or name@alias")
        shelf = registry.data if found.kind == "data" else registry.models
        return list(_repair_version(registry, shelf, found)) if version_faults(found) else []
    done: list[Mended] = []
    for shelf in (registry.models, registry.data):
        for name in shelf.names():
            # First the files of the name: repairing its versions reads and writes them.
            if _name_faults(shelf, name):
                done += _repair_name(registry, shelf, name)
            for item in shelf.versions(name):
                if version_faults(item):
                    done += _repair_version(registry, shelf, item)
    return done


def _find(registry: Registry, text: str, *, damaged: bool = False) -> Resolved:
    """Resolve a reference; `damaged`: also to a version whose manifest cannot be read."""
    data = text.startswith(COLLECTED)
    try:
        return registry.resolve_data(text[len(COLLECTED) :]) if data else registry.resolve(text)
    except DamagedFile:
        if not damaged:
            raise
    reference = parse_reference(text.removeprefix(COLLECTED))
    shelf = registry.data if data else registry.models
    items = {item.version: item for item in shelf.versions(reference.name or "")}
    version = reference.version or max(items, default=0)
    if reference.alias is not None:
        version = shelf.aliases(reference.name or "").get(reference.alias, 0)
    if version not in items or reference.step is not None:
        raise UnknownReference(f"{text}: not a version in this home that can be repaired")
    return items[version]


def _name_faults(shelf: Shelf, name: str) -> list[Fault]:
    try:
        shelf.gone(name)
        shelf.reserved(name)
        aliases = shelf.aliases(name)  # before the versions: an alias may name one that has just appeared
    except DamagedFile as error:
        return [Fault(name, str(error))]
    numbers = shelf.numbers(name)
    lost = [alias for alias, version in aliases.items() if version not in numbers]
    if lost:  # or one that was removed after the aliases were read
        aliases = shelf.aliases(name)
        numbers = shelf.numbers(name)
    there = ", ".join(f"v{number}" for number in numbers)
    return [
        Fault(f"{name}@{alias}", f"names v{aliases[alias]}; there are {there}", "", "set the alias again")
        for alias in lost
        if alias in aliases and aliases[alias] not in numbers
    ]


def _repair_name(registry: Registry, shelf: Shelf, name: str) -> Iterator[Mended]:
    folder = shelf.base / name
    with storage.locked(folder):
        try:
            shelf.gone(name)
        except DamagedFile:
            place = _put_aside(registry.home, folder / REMOVED, f"{name}-removed", ".json")
            known = {int(word[1:]) for word in in_quarantine(registry.home, name)} | _named(registry, name)
            shelf.set_gone(name, known - set(shelf.numbers(name)))
            yield Mended(f"{name}: {REMOVED}", "quarantined; written again from the known versions", place)
        try:
            shelf.reserved(name)
        except DamagedFile:
            place = _put_aside(registry.home, folder / RESERVED, f"{name}-reserved", ".json")
            yield Mended(f"{name}: {RESERVED}", "quarantined; unfinished runs get new numbers", place)
        try:
            aliases = shelf.aliases(name)
        except DamagedFile:
            place = _put_aside(registry.home, folder / ALIASES, f"{name}-aliases", ".json")
            yield Mended(f"{name}: {ALIASES}", "quarantined; set the aliases again", place)
            return
        numbers = shelf.numbers(name)
        lost = sorted(alias for alias, version in aliases.items() if version not in numbers)
        if lost:
            shelf.set_aliases(name, {alias: version for alias, version in aliases.items() if alias not in lost})
        for alias in lost:
            yield Mended(f"{name}@{alias}", f"removed: it named v{aliases[alias]}, which does not exist")


def _named(registry: Registry, name: str) -> set[int]:
    """Return the versions of a name that other versions refer to, existing or not: their numbers are used."""
    found = set()
    for item in [*registry.models.all(), *registry.data.all()]:
        manifest = item.manifest
        texts = [] if manifest is None else [parent.ref for parent in manifest.parents.values()]
        texts += [] if manifest is None else [entry.source.removeprefix(COLLECTED) for entry in manifest.data]
        for text in filter(None, texts):
            reference = parse_reference(text)
            if reference.name == name and reference.version:
                found.add(reference.version)
    return found


def _repair_version(registry: Registry, shelf: Shelf, item: Version) -> Iterator[Mended]:
    name, version = item.name, item.version
    with storage.locked(shelf.base / name):
        if not item.path.is_dir() or not (faults := version_faults(item)):  # removed or repaired meanwhile
            return
        _require_one_disk(registry.home, item.path)
        if all(fault.found == UNLISTED or fault.where == f"{item.label}: {CARD}" for fault in faults):
            yield from _light_repairs(registry.home, item)
            if not version_faults(item):
                return
        # In this order the next repair can finish the work of a process that is killed here.
        shelf.set_gone(name, {*shelf.gone(name), version})
        aliases = shelf.aliases(name)
        pointing = sorted(alias for alias, number in aliases.items() if number == version)
        if pointing:
            shelf.set_aliases(name, {alias: number for alias, number in aliases.items() if alias not in pointing})
        try:
            place = _put_aside(registry.home, item.path, f"{name}-v{version}")
        except RunFailed:
            if pointing:
                shelf.set_aliases(name, aliases)
            raise
    yield Mended(item.label, "quarantined", place)
    for alias in pointing:
        yield Mended(f"{name}@{alias}", f"removed: it named v{version}")
    left = shelf.numbers(name)
    if not left:
        yield Mended(name, "has no version left")
    elif left[-1] < version:  # it was the latest
        yield Mended(name, f"is now {name}@v{left[-1]}")


def _light_repairs(home: Path, item: Version) -> Iterator[Mended]:
    """Repair what does not affect the model: files that do not belong to the version, and the model card."""
    try:
        manifest = read_manifest(item.path)
    except DamagedFile:
        return
    for relative, path in list_files(item.path, links=True).items():
        if relative not in manifest.files:
            place = _put_aside(home, path, f"{item.name}-v{item.version}-{path.name}")
            yield Mended(f"{item.label}: {relative}", "not part of this version: quarantined", place)
    entry, card = manifest.files.get(CARD), item.path / CARD
    if entry is None or (card.is_file() and not card.is_symlink() and file_entry(card) == entry):
        return
    text = model_card(manifest)
    before = card.is_symlink() or card.exists()
    aside = _put_aside(home, card, f"{item.name}-v{item.version}-{CARD}") if before else None
    storage.replace_text(card, text)
    if file_entry(card) == entry:
        yield Mended(f"{item.label}: {CARD}", "written again", None)
    if aside:
        yield Mended(f"{item.label}: {CARD}", "the earlier file is in quarantine", aside)


def _require_one_disk(home: Path, path: Path) -> None:
    """Check before any change that a damaged item can be moved into the quarantine.

    Raises:
        RunFailed: they are on different disks.
    """
    folder = home / QUARANTINE
    with storage.writing(folder, "the quarantine"):
        folder.mkdir(parents=True, exist_ok=True)
    if path.lstat().st_dev != folder.stat().st_dev:
        raise _two_disks(path, folder)


def _two_disks(path: Path, folder: Path) -> RunFailed:
    return RunFailed(
        f"{path}: damaged, and cannot be moved to {folder}, which is on another disk; its aliases are unchanged; "
        f"put {folder.name} on the same disk, or move {path.name} out of the registry by hand"
    )


def _put_aside(home: Path, path: Path, name: str, ending: str = "") -> str:
    """Move a file or folder into the quarantine under an unused name."""
    folder = home / QUARANTINE
    with storage.locked(folder):
        stem = f"{name}-{datetime.now(timezone.utc).strftime('%Y%m%dT%H%M%SZ')}"
        target, number = folder / f"{stem}{ending}", 1
        while target.exists() or target.is_symlink():
            number += 1
            target = folder / f"{stem}-{number}{ending}"
        try:
            os.rename(path, target)
        except OSError as error:
            if error.errno == errno.EXDEV:  # also for two mounts of one disk
                raise _two_disks(path, folder) from error
            raise
        storage.sync(folder)
    return str(target)
