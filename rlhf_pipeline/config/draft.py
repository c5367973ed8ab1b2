"""The raw values of one config before validation, with the place of each value."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pipeline.config import keys
from rlhf_pipeline.config.shorthands import SHORTHANDS, expand
from rlhf_pipeline.config.yaml import Document, KeyPath, as_index, dotted, parse_value
from rlhf_pipeline.errors import ConfigError, Fault

Place = Callable[[KeyPath], str]


@dataclass(frozen=True)
class Override:
    """One `key=value` of a command line."""

    path: KeyPath
    value: Any
    where: str

    def place(self, path: KeyPath) -> str:
        """Return the place of a value of this override."""
        return self.where


A_FILE = "a file, not an override"


def parse_overrides(overrides: Iterable[str], *, on_file: str) -> tuple[list[Override], list[Fault]]:
    """Return the overrides and the faults of those that are not `key=value`.

    Args:
        on_file: the advice if an override is the name of a file; `{}` stands for the name.
    """
    parsed: list[Override] = []
    faults: list[Fault] = []
    for text in overrides:
        key, equals, value = text.partition("=")
        where, path = f"override {text}", split_key(key.strip())
        if not equals and _is_file(text):
            faults.append(Fault(where, A_FILE, "key=value", on_file.replace("{}", text)))
            continue
        if not equals or "" in path:
            fix = f"write {text.lstrip('-')}=VALUE" if not equals and text.strip("-") else ""
            faults.append(Fault(where, "not an override", "key=value", fix))
            continue
        try:
            parsed.append(Override(path, parse_value(value), where))
        except ValueError as error:
            fix = f"quote it: '{key}=\"...\"'"
            faults.append(Fault(where, f"the value is not YAML: {error}", "key=value", fix))
    return parsed, faults


def _is_file(text: str) -> bool:
    return text.lower().endswith((".yaml", ".yml")) or os.path.isfile(text)


def split_key(key: str) -> KeyPath:
    """Return the path of a dotted key."""
    return tuple(as_index(part) if i else part for i, part in enumerate(key.split(".")))


@dataclass
class Draft:
    """Raw values of a config of `stage`; layers added later win."""

    stage: str
    label: str
    values: dict[str, Any] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folders: dict[str, Path | None] = field(default_factory=dict)
    unreadable: bool = False
    _places: dict[KeyPath, tuple[Place, KeyPath]] = field(default_factory=dict)

    def where(self, path: KeyPath) -> str:
        """Return the place of the value at `path`, and its key."""
        return self._origin(path)[0]

    def _origin(self, path: KeyPath) -> tuple[str, str]:
        """Return the place of the value at `path`, including its key, and the key as it is written there."""
        for length in range(len(path), 0, -1):
            if path[:length] in self._places:
                place, written = self._places[path[:length]]
                return place(written + path[length:]), dotted(written + path[length:])
        return f"{self.label}: {dotted(path)}", dotted(path)

    def apart(self, names: Sequence[str]) -> tuple[str, str] | None:
        """Return which of these keys was given last, and the place of each; None if all are in one file."""
        given = [name for name in (str(path[0]) for path in self._places) if name in names]  # in the order given
        given = [name for name in given if self.values.get(name) is not None]
        places = [self.where((name,)) for name in given]
        if len({place.partition(":")[0] for place in places}) < 2:
            return None
        return given[-1], ", ".join(places)

    def fault(self, path: KeyPath, found: str, expected: str = "", fix: str = "") -> None:
        """Record a fault in the value at `path`."""
        where, key = self._origin(path)
        self.faults.append(Fault(where, found, expected, fix, key))

    def add_document(self, document: Document, folder: Path) -> None:
        """Add the values of a YAML file, and its faults."""
        self.faults.extend(document.faults)
        self.unreadable = bool(document.faults) and not document.values
        self.add(document.values, document.where, folder)

    def add(self, values: Mapping[str, Any], place: Place, folder: Path | None = None) -> None:
        """Add a layer of values; `place` returns the place of a key, and paths are relative to `folder`."""
        given = self._canonical_names(values, place)
        for key, (written, value) in given.items():
            self._put(key, copy.deepcopy(value), place, written, folder)

    def override(self, overrides: Iterable[Override]) -> None:
        """Add overrides, including dotted keys into mappings."""
        written: dict[KeyPath, str] = {}
        for override in overrides:
            given = str(override.path[0])
            path = (keys.canonical(self.stage, given), *override.path[1:])
            if written.setdefault(path, given) != given:
                found = f"{written[path]} and {given} are the same key"
                self.faults.append(Fault(override.where, found, "one of the two", "remove one", given))
            elif len(path) == 1:
                self.add({given: override.value}, override.place)
            else:
                self._override_inside(path, override)

    def settle(self) -> None:
        """Expand shorthands; remove the keys that are not part of the config: refused, or without effect."""
        if self.stage in keys.TRAINING:
            self._expand()
        for key, value in list(self.values.items()):
            off = keys.later(self.stage, key)
            if key in keys.REFUSED:
                self.fault((key,), "this key is not used", fix=keys.REFUSED[key])
            elif off is not None and not keys.same(value, off):
                found = f"{keys.shown((value,))} is not available yet in this version"
                self.fault((key,), found, keys.shown(off), "remove it")
            elif note := keys.note_on_unused(self.stage, key, value):
                self.notes.append(f"{self.where((key,))}: {note}")
            elif off is None or key in keys.SCHEMAS[self.stage].model_fields:
                continue
            del self.values[key]

    def _expand(self) -> None:
        """Replace the shorthands of TRL and alignment-handbook; see shorthands.py."""
        try:
            expanded = list(expand(self.stage, self.values))
        except ConfigError as error:
            for fault in error.faults:
                self.fault((fault.where,), fault.found, fault.expected, fault.fix)
            for key in SHORTHANDS:
                self.values.pop(key, None)
            return
        for found in expanded:
            self.notes.append(f"{self.where((found.key,))}: {found.note}")
            place, written = self._places.get((found.key,), (lambda _: self.label, (found.key,)))
            for key in found.used:
                self.values.pop(key, None)
            for key, value in found.values.items():
                self._put(key, value, place, str(written[0]), self.folders.get(found.key))

    def _override_inside(self, path: KeyPath, override: Override) -> None:
        top, last = str(path[0]), path[-1]
        schema_field = keys.SCHEMAS[self.stage].model_fields.get(top)
        if schema_field is None:
            self.add({str(override.path[0]): {last: override.value}}, override.place)
            return
        if self.values.get(top) is None:
            default = schema_field.default
            start = copy.deepcopy(default) if isinstance(default, dict) else {}
            self._put(top, start, override.place, top, None)
        inner = self.values[top]
        for part in path[1:-1]:
            inner = inner.setdefault(part, {}) if isinstance(inner, dict) else _entry(inner, part)
        if isinstance(inner, dict) or _entry(inner, last) is not None:
            inner[last] = override.value
            self._places[path] = (override.place, path)
        else:
            found = f"{dotted(path[:-1])} has no {last!r}"
            expected = "the key of a mapping or the index of a list"
            self.faults.append(Fault(override.where, found, expected, key=dotted(path)))

    def _put(self, key: str, value: Any, place: Place, written: str, folder: Path | None) -> None:
        self._places = {path: origin for path, origin in self._places.items() if path[0] != key}
        self._places[(key,)] = (place, (written,))
        self.values[key] = value
        self.folders[key] = folder

    def _canonical_names(self, values: Mapping[str, Any], place: Place) -> dict[str, tuple[str, Any]]:
        """Return {canonical key: (key as written, value)}; a key given by two names is a fault."""
        given: dict[str, tuple[str, Any]] = {}
        for key, value in values.items():
            if not isinstance(key, str) or key != key.encode(errors="replace").decode():
                self.faults.append(Fault(place((key,)), f"{key!r} is not the name of a key", "a name"))
                continue
            canonical = keys.canonical(self.stage, key)
            if canonical == "judge" and isinstance(value, Mapping) and self.stage in keys.ASK_LLM:
                canonical = "llm_judge"  # an endpoint instead of the name of a reward source
            if canonical in given:
                found = f"the same key as {given[canonical][0]}, which is also given"
                self.faults.append(Fault(place((key,)), found, "one of the two", "remove one", key))
                continue
            if canonical != key:
                note = f"{place((key,))}: {keys.note_on_alias(key, canonical)}"
                if note not in self.notes:
                    self.notes.append(note)
                if key == "warmup_ratio" and not _is_ratio(value):
                    found = f"found {value!r}"
                    expected = "a fraction of all steps, 0 <= ratio < 1"
                    self.faults.append(Fault(place((key,)), found, expected, key=key))
                    continue
            given[canonical] = (key, value)
        return given


def _entry(inner: Any, part: str | int) -> Any:
    return inner[part] if isinstance(inner, list) and isinstance(part, int) and part < len(inner) else None


def _is_ratio(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1
