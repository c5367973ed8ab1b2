"""The lineage of a version: its ancestors by role, and the data of each."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from rlhf_pipeline.errors import DamagedFile, UnknownReference, visible
from rlhf_pipeline.registry.manifest import DataEntry, Parent
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry

if TYPE_CHECKING:
    from rich.tree import Tree

COLLECTED = "collected:"

Status = Literal["present", "missing", "changed", "damaged", "outside"]


@dataclass(frozen=True)
class Ancestor:
    """A model or data source in a lineage.

    `status`: present; missing; changed (its digest differs from the recorded one); damaged (its manifest cannot be
    read); outside (hub models and data sources, which are not looked up).
    """

    role: str
    ref: str
    digest: str | None
    status: Status
    stage: str | None = None
    split: str | None = None
    rows: int | None = None
    origins: list[Ancestor] = field(default_factory=list)


def lineage_of(registry: Registry, resolved: Resolved) -> Ancestor:
    """Return the tree of all ancestors and data of a model or data set."""
    return _node(registry, resolved, "model", resolved.digest, "present", ())


def stands_apart(registry: Registry, reference: Resolved, start: Resolved) -> bool:
    """Whether a model is neither `start` nor an ancestor of `start`, according to the manifests."""

    def identity(model: Resolved | Parent) -> str | None:
        named = model.label if isinstance(model, Resolved) else model.ref
        return model.digest or named  # a hub model has no digest

    sought, found, seen = identity(reference), start, set()
    while found.label not in seen:  # the manifest of a folder is not trusted: it may name itself
        seen.add(found.label)
        base = found.manifest.parents.get("base") if found.manifest is not None else None
        if sought in (identity(found), base and identity(base)):
            return False
        if base is None:
            break
        try:
            found = registry.resolve(base.ref)
        except (DamagedFile, UnknownReference):
            break
    return True


def render(node: Ancestor) -> Tree:
    """Return a lineage as a tree for the terminal."""
    from rich.text import Text
    from rich.tree import Tree

    def label(item: Ancestor) -> Text:
        text = Text(_shown(f"{item.role}: "), style="dim")
        text.append(_shown(item.ref), style="bold")
        details = [item.stage, item.split, None if item.rows is None else f"{item.rows} rows"]
        details.append((item.digest or "")[:12])
        details.append(None if item.status in ("present", "outside") else item.status)
        text.append(_shown("".join(f"  {detail}" for detail in details if detail)))
        return text

    def grow(tree: Tree, item: Ancestor) -> Tree:
        for origin in item.origins:
            grow(tree.add(label(origin)), origin)
        return tree

    return grow(Tree(label(node)), node)


def _shown(text: str) -> str:
    """Return a text of an untrusted manifest on one line of a terminal."""
    return visible(text).replace("\n", "\\n")


def _node(
    registry: Registry,
    resolved: Resolved,
    role: str,
    recorded: str | None,
    status: Status,
    above: tuple[str, ...],
) -> Ancestor:
    manifest = resolved.manifest
    origins: list[Ancestor] = []
    # The manifest of a folder is not trusted: it may name itself among its parents.
    if manifest is not None and resolved.label not in above:
        above = (*above, resolved.label)
        origins += [_parent(registry, name, parent, above) for name, parent in manifest.parents.items()]
        origins += [_data(registry, entry, above) for entry in manifest.data]
    return Ancestor(role, resolved.label, recorded, status, stage=resolved.stage, origins=origins)


def _parent(registry: Registry, role: str, parent: Parent, above: tuple[str, ...]) -> Ancestor:
    try:
        resolved = registry.resolve(parent.ref)
    except UnknownReference:
        return Ancestor(role, parent.ref, parent.digest, "missing")
    except DamagedFile:
        return Ancestor(role, parent.ref, parent.digest, "damaged")
    if resolved.kind == "hub":
        return Ancestor(role, parent.ref, parent.digest, "outside")
    changed = parent.digest is not None and parent.digest != resolved.digest
    return _node(registry, resolved, role, parent.digest, "changed" if changed else "present", above)


def _data(registry: Registry, entry: DataEntry, above: tuple[str, ...]) -> Ancestor:
    data = Ancestor("data", entry.source, entry.digest, "outside", split=entry.split, rows=entry.rows)
    if not entry.source.startswith(COLLECTED):
        return data
    try:
        resolved = registry.resolve_data(entry.source.removeprefix(COLLECTED))
    except UnknownReference:
        return replace(data, status="missing")
    except DamagedFile:
        return replace(data, status="damaged")
    found = _node(registry, resolved, "data", entry.digest, "present", above)
    return replace(data, stage=found.stage, status=found.status, origins=found.origins)
