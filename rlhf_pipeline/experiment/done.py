"""Which runs of an experiment are done: a version with the same config, parents and data exists."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.grid import Node
from rlhf_pipeline.data.load import read_records, records_digest, source_stamp
from rlhf_pipeline.data.sources import part_of
from rlhf_pipeline.data.splits import assign_splits, in_split
from rlhf_pipeline.data.stamps import Stamp
from rlhf_pipeline.registry.lengths import with_lengths
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.rewards import names_a_model

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
