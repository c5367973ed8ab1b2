"""What `rlhf label` would do: its dry run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.splits import assign_splits
from rlhf_pipeline.labelling.items import given_items
from rlhf_pipeline.labelling.project import require_same
from rlhf_pipeline.labelling.store import LabelStore, database
from rlhf_pipeline.registry.roles import check_role
from rlhf_pipeline.registry.store import Registry


def outlook(config: LabelConfig, home: Path) -> dict[str, Any]:
    """Return what a project is or would be; nothing is sampled or written.

    Raises:
        ConfigError: the project was made with another config. UnknownReference, MismatchError, DataError: a model or
        the source is missing or cannot be used.
    """
    path = database(home, config.name)
    found: dict[str, Any] = {"project": config.name, "path": str(path.parent)}
    if path.is_file():
        with LabelStore.open(path) as store:
            require_same(store.config, config)
            return found | {"items": len(store.items()), "notes": ["the project is there; nothing would be sampled"]}
    models = []
    for named in config.parents().values():
        resolved = Registry(home).resolve(named.reference, revision=named.revision)
        check_role(resolved, named.role)
        models.append(resolved.label)
    if config.responses is not None:
        notes: list[str] = []
        items, _ = given_items(config, home, notes.append)
        return found | {"items": len(items), "overlap": config.overlap, "notes": notes}
    (data,) = config.sources()
    read = read_records(*data, home=home, skip_bad_rows=config.skip_bad_rows, splits=config.splits)
    splits = assign_splits(read.records, config.split_fractions, read.source)
    usable = sum(config.splits is None or split in config.splits for split in splits)
    k = 2 if config.arena else config.k
    return found | {
        "items": config.num,
        "models": models,
        "prompts": usable,
        "responses": config.num * k,
        "overlap": config.overlap,
    }
