"""A labelling project of the home directory: made once, then opened again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf_pipeline.config.labelling import LabelConfig, differing
from rlhf_pipeline.errors import BadInput, ConfigError, Fault, RlhfError
from rlhf_pipeline.labelling.items import make_items
from rlhf_pipeline.labelling.store import LabelStore, database


@dataclass(frozen=True)
class Project:
    """What a labelling project has: its items, labelers, judgements without the skipped ones, and why it is damaged."""

    name: str
    path: Path
    items: int = 0
    labelers: int = 0
    judgements: int = 0
    skipped: int = 0
    kind: str = ""
    damaged: str = ""


def open_or_make(config: LabelConfig, home: Path, say: Callable[[str], None]) -> LabelStore:
    """Open the project that a config names; if there is none, sample or read its responses and make it.

    Raises:
        ConfigError: the project was made with another config; the faults name the keys that differ.
        BadInput: a model or a source cannot be used. RunFailed: memory ran out, or the disk is full.
    """
    path = database(home, config.name)
    if not path.is_file():
        made = make_items(config, home, say)
        store = LabelStore.create(path, config, made.items, made.uncertainty, made.origin)
        say(f"made the labelling project {config.name}: {len(made.items)} items")
        return store
    store = LabelStore.open(path)
    try:
        require_same(store.config, config)
    except ConfigError:
        store.close()
        raise
    say(f"opened the labelling project {config.name}, which is there already; nothing is sampled again")
    return store


def require_same(ours: LabelConfig, given: LabelConfig) -> None:
    """Check that a project that is there has the config that is given.

    Raises:
        ConfigError: keys differ.
    """
    faults = [
        Fault(
            key,
            f"found {_shown(getattr(given, key))}",
            f"{_shown(getattr(ours, key))}, with which the labelling project {ours.name} was made",
            "give a new project another name, or open this one: rlhf label serve " + ours.name,
            key,
        )
        for key in differing(ours, given)
    ]
    if faults:
        raise ConfigError(faults)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def projects(home: Path) -> Iterator[Project]:
    """Yield the labelling projects of a home, by name."""
    for path in sorted((home / "labels").glob("*/labels.sqlite")):
        name = path.parent.name
        try:
            with LabelStore.open(path) as store:
                judged = store.judgements()
                skipped = sum(one.skipped for one in judged)
                kind = "arena" if store.config.arena else store.config.mode
                counts = (len(store.items()), len(store.labelers()), len(judged) - skipped, skipped)
                yield Project(name, path, *counts, kind)
        except RlhfError as error:
            yield Project(name, path, damaged=str(error))


def named(home: Path, name: str) -> LabelStore:
    """Open a project by its name.

    Raises:
        BadInput: there is none of this name.
    """
    path = database(home, name)
    if not path.is_file():
        there = ", ".join(project.name for project in projects(home))
        expected = (
            f"one of {there}" if there else "a project; there is none yet: rlhf label --policies REF --prompts SOURCE"
        )
        raise BadInput(f"rlhf label: found no project {name!r} in {path.parent.parent}; expected {expected}")
    return LabelStore.open(path)
