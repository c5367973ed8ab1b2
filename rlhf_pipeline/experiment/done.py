"""Find the parts of an experiment that are done.

A run is done if a version with the same config, parents and data exists; the comparison is done if its report was made
from the same config, models, data and source code. This module does not import torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.config.base import DataInput
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.grid import Node
from rlhf_pipeline.config.in_context import split_arm
from rlhf_pipeline.config.reward_names import is_function_name, names_a_model
from rlhf_pipeline.config.stages import PpoConfig, StageConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.data.load import read_records, records_digest, rows_of
from rlhf_pipeline.data.parsed import source_stamp
from rlhf_pipeline.data.sources import files_of
from rlhf_pipeline.data.splits import assign_splits
from rlhf_pipeline.disk.stamps import Stamp
from rlhf_pipeline.disk.storage import replace_text
from rlhf_pipeline.errors import DamagedFile, UnknownReference
from rlhf_pipeline.registry.digests import file_sha256, known_sha256
from rlhf_pipeline.registry.lengths import with_lengths
from rlhf_pipeline.registry.parents import parents_of
from rlhf_pipeline.registry.provenance import source_digest
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report import Results, load

RESULTS, PAGE = "results.json", "index.html"
REGISTRY_STAGE = {"sft": "sft", "train-rm": "reward", "ppo": "ppo", "dpo": "dpo", "collect": "collect"}


def expected_data(config: StageConfig, home: Path) -> list[str]:
    """Digests of the data that a stage with this config would train on (or take prompts from)."""
    streams = config.streams() if isinstance(config, PpoConfig) else []
    return [
        _split_digest(config, home, data, split)
        for data in [*config.sources(), *streams]
        for split in ([data.split] if data.split else _splits(config, home, data))
    ]


def _splits(config: StageConfig, home: Path, data: DataInput) -> Sequence[str]:
    """The splits of a source that a stage uses."""
    if isinstance(config, TrainingConfig):
        return [config.dataset_train_split]
    if config.splits:
        return config.splits
    found = read_records(*data, home=home, skip_bad_rows=config.skip_bad_rows)
    return sorted(set(assign_splits(found.records, config.split_fractions, found.source)))


def _split_digest(config: StageConfig, home: Path, data: DataInput, split: str) -> str:
    """The digest of one split's records; it is computed once as long as the files do not change."""
    what = (home.resolve(), data, split, tuple(config.split_fractions.items()), config.skip_bad_rows)
    seen = [source_stamp(name, home=home) for name in (data.source, data.test) if name is not None]
    return _digest(*what) if None in seen else _known_digest(tuple(seen), *what)


@functools.lru_cache(maxsize=256)
def _known_digest(seen: tuple[Stamp | None, ...], *what: Any) -> str:
    return _digest(*what)


def _digest(
    home: Path, data: DataInput, split: str, fractions: tuple[tuple[str, float], ...], skip_bad_rows: bool
) -> str:
    found = read_records(*data, home=home, skip_bad_rows=skip_bad_rows, splits={split})
    return records_digest(rows_of(found, split, dict(fractions)))


def find_done(config: StageConfig, registry: Registry) -> Resolved | None:
    """The latest version that was made from the same config, parents and data; None if there is none."""
    # Earlier releases computed the digest before the parent's lengths were filled in.
    digests = list(dict.fromkeys(map(config_digest, (with_lengths(config, registry)[0], config))))
    shelf = registry.data if config.stage == "collect" else registry.models
    made = {item.manifest.config_digest for item in shelf.all() if item.manifest is not None}
    if not made & set(digests):
        return None  # the cheap check first: reading the data is slow
    parents = {role: parent.digest for role, parent in parents_of(registry, config).items()}
    made_by, data = REGISTRY_STAGE[config.stage], expected_data(config, registry.home)
    found = (registry.find(made_by, digest, parents, data, name=config.output_name) for digest in digests)
    return next((version for version in found if version is not None), None)


def survey(nodes: Sequence[Node], registry: Registry) -> list[Resolved | None]:
    """The version that each node has already made; None if there is none, or if an input does not exist yet."""
    found: list[Resolved | None] = []
    outputs: dict[int, str] = {}
    for place, node in enumerate(nodes):
        ready = set(node.inputs.values()) <= set(outputs)
        done = find_done(node.resolved(outputs), registry) if ready else None
        found.append(done)
        if done is not None:
            outputs[place] = output_of(node, done.label)
    return found


def output_of(node: Node, label: str) -> str:
    """The name by which a config refers to the output of a node."""
    return f"collected:{label}" if node.spec.stage == "collect" else label


INPUTS = "inputs.json"
"""File beside results.json with the digests of a comparison's inputs and results."""


def comparison_inputs(
    config: CompareConfig, points: Sequence[Point], resampled: Sequence[str], registry: Registry
) -> str | None:
    """The digest of all inputs of a comparison; None if it is not known (functions, a language model, hub data)."""
    named = [config.reward_model, config.judge, config.true_reward]
    if config.llm_judge is not None or any(source is not None and is_function_name(source) for source in named):
        return None
    texts = [point.model for point in points] + [text for text in (config.baseline, config.reference) if text]
    texts = [split_arm(text)[1] for text in texts]
    texts += [source for source in named if source is not None and names_a_model(source)]
    models = _with_ancestors([registry.resolve(text) for text in texts], registry)
    demonstrations = None if config.in_context is None else config.in_context.source
    sources = {source for source in (config.prompts, demonstrations) if source}
    for model in models.values():
        values = model.manifest.config if model.manifest is not None else {}
        parts = values.get("datasets") or [values]
        keys = ("dataset_name", "dataset_test_name", "prompts")
        sources |= {part[key] for part in parts for key in keys if part.get(key)}
        # `collected:NAME` is replaced by its numbered version: it may name another version now.
        sources |= {entry.source for entry in model.manifest.data} if model.manifest is not None else set()
    data = {source: _file_digests(source, registry.home) for source in sorted(sources)}
    if None in data.values() or any(model.digest is None for model in models.values()):
        return None
    content = {
        "config": config_digest(config),
        "points": [asdict(point) for point in points],
        "resampled": list(resampled),
        "models": {label: model.digest for label, model in models.items()},
        "data": data,
        "code": source_digest(),
    }
    if config.human is not None:
        from rlhf_pipeline.labelling.arena import arena_digest

        content["people"] = arena_digest(registry.home, config.human)
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _with_ancestors(models: Sequence[Resolved], registry: Registry) -> dict[str, Resolved]:
    """Models and all their ancestors that exist, by label."""
    found: dict[str, Resolved] = {}
    waiting = list(models)
    while waiting:
        model = waiting.pop()
        if model.label not in found:
            found[model.label] = model
            for parent in model.manifest.parents.values() if model.manifest is not None else ():
                with suppress(UnknownReference, DamagedFile):
                    waiting.append(registry.resolve(parent.ref))
    return found


def _file_digests(source: str, home: Path) -> list[str] | None:
    """The digests of a source's files; empty if the source is missing, None if it is on the hub."""
    try:
        files = files_of(source, home=home)
        return None if files is None else [known_sha256(path) for path in files]
    except (UnknownReference, OSError):
        return []


def note_comparison(report: Path, inputs: str) -> None:
    """Write the digests of the inputs beside results.json."""
    content = {"inputs": inputs, "results": file_sha256(report / RESULTS)}
    replace_text(report / INPUTS, json.dumps(content) + "\n")


def compared_already(report: Path, inputs: str) -> Results | None:
    """The results of a comparison that was made from these inputs and is unchanged on disk; else None."""
    try:
        known = json.loads((report / INPUTS).read_text(encoding="utf-8"))
        if known != {"inputs": inputs, "results": file_sha256(report / RESULTS)} or not (report / PAGE).is_file():
            return None
        results = load(report / RESULTS)
    except (OSError, ValueError, DamagedFile):
        return None
    return results if results.path == str(report / RESULTS) else None  # a home that was moved has old paths
