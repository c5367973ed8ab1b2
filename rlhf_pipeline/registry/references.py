"""References to models: `name`, `name@vN`, `name@alias`, `name@vN#step`, a folder, `org/name[@revision]`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline.config.in_context import Method, name_arm
from rlhf_pipeline.config.names import HUB_ID, NAME_PATTERN
from rlhf_pipeline.errors import UnknownReference
from rlhf_pipeline.registry.digests import FileEntry, files_digest, folder_files, snapshot_files
from rlhf_pipeline.registry.manifest import Manifest, Parent

NAME = re.compile(NAME_PATTERN.strip("^$"))
_VERSION = re.compile(r"v([0-9]{1,15})")
_REGISTRY = re.compile(rf"(?P<name>{NAME.pattern})(?:@(?P<pick>{NAME.pattern}))?(?:#(?P<step>[0-9]{{1,15}}))?")
_HUB = re.compile(rf"(?P<id>{HUB_ID})(?:@(?P<revision>[A-Za-z0-9][\w./-]*))?")


@dataclass(frozen=True)
class Reference:
    """A parsed reference before any look-up; a text can have several meanings.

    `name` is set if the text may name a model of the registry, `hub_id` if it may name a hub model. Any text may name a
    folder.
    """

    text: str
    name: str | None = None
    version: int | None = None
    alias: str | None = None
    step: int | None = None
    hub_id: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Resolved:
    """An existing model or data set: its location and manifest.

    `kind` is the meaning of the reference that was chosen; "data" is collected data of the registry. `find_base`
    resolves the base of an adapter. `method` makes it an arm of a comparison that answers with demonstrations in its
    context.
    """

    kind: Literal["registry", "directory", "hub", "data"]
    text: str
    path: Path | None
    name: str | None = None
    version: int | None = None
    step: int | None = None
    revision: str | None = None
    manifest: Manifest | None = None
    find_base: Callable[[Resolved], Resolved] | None = field(default=None, repr=False, compare=False)
    method: Method | None = None

    @property
    def policy(self) -> Resolved:
        """The model itself, without the method of an arm."""
        return self if self.method is None else replace(self, method=None)

    @cached_property
    def base(self) -> Resolved | None:
        """The model that an adapter stands on; None for a whole model.

        Raises:
            BadInput, MismatchError, UnknownReference: see `base_of` in registry/adapters.py.
        """
        return None if self.find_base is None else self.find_base(self)

    @property
    def label(self) -> str:
        """The reference in full: `name@vN[#step]`, the folder, or the hub id with its revision; an arm has METHOD:."""
        return name_arm(self.method, self._model_label)

    @property
    def _model_label(self) -> str:
        if self.kind in ("registry", "data"):
            step = "" if self.step is None else f"#{self.step}"
            return f"{self.name}@v{self.version}{step}"
        if self.kind == "directory":
            return str(self.path)
        return f"{self.name}@{self.revision}" if self.revision else str(self.name)

    @property
    def location(self) -> str:
        """The argument of `from_pretrained`: the folder or the hub id (without its revision)."""
        return str(self.name if self.path is None else self.path)

    @property
    def stage(self) -> str | None:
        """The stage that made it, if there is a manifest; of an arm with a method, the method."""
        if self.method is not None:
            return self.method
        return None if self.manifest is None else self.manifest.stage

    @property
    def config(self) -> dict[str, Any]:
        """The config that made it, by its manifest; empty where it has none."""
        return {} if self.manifest is None else self.manifest.config

    @property
    def files(self) -> Mapping[str, FileEntry]:
        """The files that the manifest lists below `path`."""
        if self.manifest is None:
            return {}
        if self.step is not None:
            return snapshot_files(self.manifest.files, self.step)
        return self.manifest.files

    @cached_property
    def digest(self) -> str | None:
        """The digest of its files (from the manifest, else computed from the folder) and method; None on the hub."""
        if self.method is not None:
            own = self.policy.digest
            return None if own is None else sha256(name_arm(self.method, own).encode()).hexdigest()
        if self.manifest is not None:
            return files_digest(self.files)
        return None if self.path is None else files_digest(folder_files(self.path))

    @property
    def identity(self) -> str | None:
        """The digest of all weights, those of an adapter's base included; None if one is on the hub."""
        if self.base is None:
            return self.digest
        below = self.base.identity
        return None if below is None else f"{self.digest} on {below}"

    @property
    def parent(self) -> Parent:
        """The entry for a child's manifest."""
        return Parent(ref=self.label, digest=self.digest)

    @property
    def taken(self) -> str:
        """One line for the log: the meaning of the reference that was chosen."""
        what = {"registry": "the registry's", "directory": "the folder", "hub": "the hub's"}
        return f"{self.text!r} is {what.get(self.kind, 'the data')} {self.label}"


@dataclass(frozen=True)
class Version(Resolved):
    """A version in a home, or a snapshot of it; its manifest is None if it cannot be read."""

    kind: Literal["registry", "data"]
    path: Path
    name: str
    version: int


def parse_reference(text: str) -> Reference:
    """Return the possible meanings of a text as a reference.

    Raises:
        UnknownReference: the text is empty.
    """
    text = text.strip(" ")
    if not text:
        raise UnknownReference("an empty reference; expected a registry name, a folder, or org/name")
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise UnknownReference(f"{text!r}: has control characters; expected a registry name or a folder")
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        raise UnknownReference(f"{text!r}: has half a surrogate pair, which no file name can have") from None
    if match := _REGISTRY.fullmatch(text):
        pick = match["pick"]
        version = _VERSION.fullmatch(pick) if pick else None
        return Reference(
            text,
            name=match["name"],
            version=int(version[1]) if version else None,
            alias=None if version else pick,
            step=int(match["step"]) if match["step"] else None,
        )
    if match := _HUB.fullmatch(text):
        return Reference(text, hub_id=match["id"], revision=match["revision"])
    return Reference(text)
