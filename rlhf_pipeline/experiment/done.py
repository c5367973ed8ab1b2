"""Which parts of an experiment are done.

A run is done where a version with the same config, parents and data exists; the comparison where its report was made of
the same config, models, data and source code. Nothing here imports torch.
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
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.grid import Node
from rlhf_pipeline.data.load import read_records, records_digest
from rlhf_pipeline.data.parsed import source_stamp
from rlhf_pipeline.data.sources import files_of, part_of
from rlhf_pipeline.data.splits import assign_splits, in_split
from rlhf_pipeline.data.stamps import Stamp
from rlhf_pipeline.errors import DamagedFile, UnknownReference
from rlhf_pipeline.registry.digests import file_sha256, known_sha256
from rlhf_pipeline.registry.lengths import with_lengths
from rlhf_pipeline.registry.provenance import source_digest
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.storage import replace_text
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report import Results, load
from rlhf_pipeline.rollout.reward_names import is_function_name, names_a_model

RESULTS, PAGE = "results.json", "index.html"
REGISTRY_STAGE = {"sft": "sft", "train-rm": "reward", "ppo": "ppo", "dpo": "dpo", "collect": "collect"}


def expected_parents(stage: str, config: Any, registry: Registry) -> dict[str, str | None]:
    """Digests of the models that a stage with this config would come from, by role."""

    def digest(text: str) -> str | None:
        return registry.resolve(text).digest

    if stage == "collect":
        parents = {"policy": digest(config.policy)}
        return parents | ({"judge": digest(config.judge)} if names_a_model(config.judge) else {})
    if config.model_name_or_path is None:
        return {}
    parents = {"base": digest(config.model_name_or_path)}
    if stage == "dpo":
        parents["reference"] = digest(config.ref_model or config.model_name_or_path)
    if stage == "ppo":
        parents["reference"] = parents["base"]
        for number, source in enumerate(r.source for r in config.rewards if names_a_model(r.source)):
            parents["reward_model" if number == 0 else f"reward_model_{number + 1}"] = digest(source)
        if config.judge is not None and names_a_model(config.judge):
            parents["judge"] = digest(config.judge)
    return parents


def expected_data(stage: str, config: Any, home: Path) -> list[str]:
    """Digests of the data that a stage with this config would train on (or take prompts from)."""
    if stage == "collect":
        part = part_of(config.prompts, config.dataset_config, "prompt")
        found = read_records(config.prompts, config=part, home=home, skip_bad_rows=config.skip_bad_rows)
        fractions = config.split_fractions
        splits: Sequence[str] = config.splits or sorted(set(assign_splits(found.records, fractions, found.source)))
        return [_split_digest(config, home, config.prompts, part, split) for split in splits]
    return [
        _split_digest(config, home, name, part, config.dataset_train_split) for name, part in _sources(stage, config)
    ]


def _split_digest(config: Any, home: Path, name: str, part: str | None, split: str) -> str:
    """The digest of one split's records, which are read and digested once as long as their files do not change."""
    what = (home.resolve(), name, part, split, tuple(config.split_fractions.items()), config.skip_bad_rows)
    seen = source_stamp(name, home=home)
    return _digest(*what) if seen is None else _known_digest(seen, *what)


@functools.lru_cache(maxsize=256)
def _known_digest(seen: Stamp, *what: Any) -> str:
    return _digest(*what)


def _digest(
    home: Path, name: str, part: str | None, split: str, fractions: tuple[tuple[str, float], ...], skip_bad_rows: bool
) -> str:
    found = read_records(name, config=part, home=home, skip_bad_rows=skip_bad_rows)
    return records_digest(in_split(found.records, split, dict(fractions), found.source))


def _sources(stage: str, config: Any) -> list[tuple[str, str | None]]:
    if config.datasets:
        return [(entry.dataset_name, entry.dataset_config) for entry in config.datasets]
    kind = "prompt" if config.reads_prompts else "row"
    return [(config.dataset_name, part_of(config.dataset_name, config.dataset_config, kind))]


def find_done(stage: str, config: Any, registry: Registry) -> Resolved | None:
    """The latest version that this very config has made from the same parents and data, if there is one."""
    # Earlier releases digested the config as it was given, before its parent's lengths were filled in.
    digests = list(dict.fromkeys(map(config_digest, (with_lengths(config, registry)[0], config))))
    shelf = registry.data if stage == "collect" else registry.models
    made = {item.manifest.config_digest for item in shelf.all() if item.manifest is not None}
    if not made & set(digests):
        return None  # the cheap answer first: reading the data takes a moment
    parents, data = expected_parents(stage, config, registry), expected_data(stage, config, registry.home)
    found = (registry.find(REGISTRY_STAGE[stage], digest, parents, data, name=config.output_name) for digest in digests)
    return next((version for version in found if version is not None), None)


def survey(nodes: Sequence[Node], registry: Registry) -> list[Resolved | None]:
    """The version that each node has made already; None where there is none, or where an input is still to be made."""
    found: list[Resolved | None] = []
    outputs: dict[int, str] = {}
    for place, node in enumerate(nodes):
        ready = set(node.inputs.values()) <= set(outputs)
        done = find_done(node.spec.stage, node.resolved(outputs), registry) if ready else None
        found.append(done)
        if done is not None:
            outputs[place] = output_of(node, done.label)
    return found


def output_of(node: Node, label: str) -> str:
    """How a config names what a node has made."""
    return f"collected:{label}" if node.spec.stage == "collect" else label


INPUTS = "inputs.json"
"""Beside results.json: the digests of what a comparison was made of and of what came out."""


def comparison_inputs(
    config: CompareConfig, points: Sequence[Point], resampled: Sequence[str], registry: Registry
) -> str | None:
    """The digest of everything that a comparison is made of; None where it cannot be told: functions, hub data."""
    named = [config.reward_model, config.judge, config.true_reward]
    if any(source is not None and is_function_name(source) for source in named):
        return None
    texts = [point.model for point in points] + [text for text in (config.baseline, config.reference) if text]
    texts += [source for source in named if source is not None and names_a_model(source)]
    models = _with_ancestors([registry.resolve(text) for text in texts], registry)
    sources = {config.prompts} if config.prompts else set()
    for model in models.values():
        values = model.manifest.config if model.manifest is not None else {}
        parts = values.get("datasets") or [values]
        sources |= {part[key] for part in parts for key in ("dataset_name", "prompts") if part.get(key)}
        # What `collected:NAME` was then is a version with its number: what is read now may be another one.
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
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def _with_ancestors(models: Sequence[Resolved], registry: Registry) -> dict[str, Resolved]:
    """Models and all that they come from, by label, as far as they are there."""
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
    """The digests of a source's files; none where it is not there, None where it lies on the hub."""
    try:
        files = files_of(source, home=home)
        return None if files is None else [known_sha256(path) for path in files]
    except (UnknownReference, OSError):
        return []


def note_comparison(report: Path, inputs: str) -> None:
    """Write beside results.json what it was made of."""
    content = {"inputs": inputs, "results": file_sha256(report / RESULTS)}
    replace_text(report / INPUTS, json.dumps(content) + "\n")


def compared_already(report: Path, inputs: str) -> Results | None:
    """The results of a comparison that was made of these inputs and lies there as it was written; else None."""
    try:
        known = json.loads((report / INPUTS).read_text(encoding="utf-8"))
        if known != {"inputs": inputs, "results": file_sha256(report / RESULTS)} or not (report / PAGE).is_file():
            return None
        results = load(report / RESULTS)
    except (OSError, ValueError, DamagedFile):
        return None
    return results if results.path == str(report / RESULTS) else None  # a home that has moved names old places
