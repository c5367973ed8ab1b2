"""Read an experiment and every config it names, and check all of them before the first stage runs."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rlhf_pipeline.config.collected import check_collected, check_context
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.draft import Draft, Override, parse_overrides
from rlhf_pipeline.config.grid import C, Experiment, StageSpec
from rlhf_pipeline.config.load import in_order, validate
from rlhf_pipeline.config.mentions import Mention, mentions, raw_mentions
from rlhf_pipeline.config.names import DATA_SUFFIXES
from rlhf_pipeline.config.plan import ExperimentConfig, drawn_by_seed
from rlhf_pipeline.config.rounds import Rounds, check_rounds, rounds_of
from rlhf_pipeline.config.stages import SCHEMAS, STAGES, TRAINING, StageConfig
from rlhf_pipeline.config.sweep import Axis, read_sweep, repeated, spelling, swept
from rlhf_pipeline.config.yaml import KeyPath, dotted, read_document
from rlhf_pipeline.errors import ConfigError, Fault, did_you_mean

_PRODUCERS = {"policy": ("sft", "ppo", "dpo"), "reward": ("train-rm",), "data": ("collect",)}
_MEANT = {"policy": "a policy", "reward": "a reward model", "data": "data"}


def load_experiment(
    path: Mapping[str, Any] | Path | str,
    overrides: Iterable[str] = (),
    *,
    known_models: Collection[str] = (),
) -> Experiment:
    """Return the experiment of a YAML file, with the configs of all its stages.

    Args:
        path: the experiment's file, or its content; the configs it names are relative to the file's folder, or to the
            working directory.
        overrides: `stage.key=value` for a stage, `compare.key=value`, or `key=value` for the experiment.
        known_models: the registry's model names; a bare name that is neither a stage nor one of these
            is a fault.

    Raises:
        ConfigError: the faults of the experiment and of all configs together.
    """
    file, content = (Path("experiment"), path) if isinstance(path, Mapping) else (Path(path), None)
    reader = _Reader(file, content, known_models)
    experiment = reader.read(overrides)
    if experiment is None or reader.plan.faults:
        raise ConfigError(in_order(dict.fromkeys(reader.plan.faults)))
    return experiment


class _Links:
    """Finds the values that name an earlier stage, and refuses names of no stage, a later one or a wrong one."""

    def __init__(self, commands: Mapping[str, str], known_models: Collection[str]):
        self._commands, self._known = commands, set(known_models)
        self._earlier: set[str] = set()

    def done(self, name: str) -> None:
        """Record that this stage comes before the stages that are read from now on."""
        self._earlier.add(name)

    def find(self, name: str, draft: Draft) -> set[str]:
        """Return the earlier stages that a draft names; names of other stages are faults."""
        links: set[str] = set()
        for mention in raw_mentions(draft.values, SCHEMAS[draft.stage]):
            if mention.text not in self._commands:
                self._check_outside(draft, mention)
            elif mention.text not in self._earlier:
                when = "this stage itself" if mention.text == name else "a later stage"
                expected, fix = self._expected(mention.role), "change the order of the stages"
                draft.fault(mention.path, f"{mention.text!r} is {when}", expected, fix)
            elif self._commands[mention.text] not in _PRODUCERS[mention.role]:
                command, meant = self._commands[mention.text], _MEANT[mention.role]
                found = f"the stage {mention.text!r} is a {command} stage, which does not make {meant}"
                draft.fault(mention.path, found, self._expected(mention.role))
            else:
                links.add(mention.text)
        return links

    def _expected(self, role: str) -> str:
        producers = _PRODUCERS[role]
        fitting = [name for name in self._commands if self._commands[name] in producers and name in self._earlier]
        text = f"an earlier stage of kind {' or '.join(producers)}"
        return f"{text} ({', '.join(fitting)})" if fitting else text

    def _check_outside(self, draft: Draft, mention: Mention) -> None:
        """Refuse a bare name that does not exist; paths and hub ids are checked when they are loaded."""
        text = mention.text
        bare = re.split("[@#]", text, maxsplit=1)[0]
        if "/" in text or text.startswith((".", "~")) or os.path.exists(text):
            return
        if mention.role == "data":
            near = did_you_mean(text, self._commands)
            if near and ":" not in text and not text.endswith(DATA_SUFFIXES):
                draft.fault(mention.path, f"{text!r} names no stage", self._expected("data"), near)
        elif bare not in self._known:
            near = did_you_mean(bare, [*self._commands, *sorted(self._known)])
            if bare in self._commands:
                near = f"write {bare} for the output of the stage"
            found = f"{text!r} names no stage of the experiment and no model of the registry"
            draft.fault(mention.path, found, self._expected(mention.role), near)


class _Reader:
    """Collects the drafts of one experiment, and their faults."""

    def __init__(self, path: Path, content: Mapping[str, Any] | None, known_models: Collection[str]):
        self.path, self.folder, self.content = path, path.parent, content
        self.plan = Draft("experiment", str(path))
        self.known_models = known_models

    def read(self, overrides: Iterable[str]) -> Experiment | None:
        """Return the experiment, or None if its own file has faults."""
        if self.content is None:
            self.plan.add_document(read_document(self.path), self.folder)
        else:
            self.plan.add(self.content, lambda key: f"experiment: {dotted(key)}", self.folder)
        parsed, faults = parse_overrides(overrides, on_file="only one experiment can be run: remove it")
        self.plan.faults.extend(faults)
        own, inner = self._share_out(parsed, self._entries())
        self.plan.override(own)
        config = cast("ExperimentConfig | None", validate(self.plan))
        entries = self._entries()
        commands = {name: str(entry.get("stage")) for name, entry in entries.items()}
        commands = {name: command for name, command in commands.items() if command in STAGES}
        axes = read_sweep(self.plan, commands, inner)

        seeds = (config.seeds or ()) if config is not None else ()
        shared = Counter(str(entry.get("config")) for entry in entries.values())  # such a file names no single model
        links = _Links(commands, self.known_models)
        stages: list[StageSpec[StageConfig]] = []
        every: dict[str, tuple[StageSpec[StageConfig], ...]] = {}
        for name, command in commands.items():
            path: KeyPath = ("stages", name)
            draft = self._draft(path, command, entries[name], {"output_name": name})
            if seeds:
                draft.add({"seed": seeds[0]}, lambda _: self.plan.where(("seeds",)))
            if shared[str(entries[name].get("config"))] > 1 and "output_name" in draft.values:
                self._name(draft, name)
            self._complete(draft, path, entries[name], inner.get(name, []))
            points = self._points(name, draft, [axis for axis in axes if axis.stage == name], links)
            stages += points[:1]
            every[name] = tuple(points)
            links.done(name)
        self.plan.faults += check_collected(every, self.plan.where)
        later = self._rounds(config, stages, axes)
        for spec in later.stages:
            stages.append(spec)
            every[spec.name], commands[spec.name] = (spec,), spec.stage
            links.done(spec.name)
        compare = self._compare(inner.get("compare", []), links, later)
        if compare is not None:
            self.plan.faults += check_context(compare, every, self.plan.where)
        self.plan.faults.extend(_across(stages, every, compare, self.path))
        if config is None:
            return None
        pinned = frozenset(
            name
            for name in entries
            if "seed" in entries[name] or any(override.path == ("seed",) for override in inner.get(name, ()))
        )
        pinned |= {name for name, first in later.copied.items() if first in pinned}
        return Experiment(
            config.name,
            self.path,
            seeds,
            tuple(stages),
            compare,
            tuple(dict.fromkeys(self.plan.notes)),
            {name: points for name, points in every.items() if any(axis.stage == name for axis in axes)},
            drawn_by_seed(config, commands, pinned),
            pinned,
        )

    def _rounds(self, config: ExperimentConfig | None, stages: Sequence[StageSpec], axes: Sequence[Axis]) -> Rounds:
        """Return the stages of later rounds; none if something is wrong with the experiment."""
        if config is None or self.plan.faults:
            return Rounds()
        swept = {axis.stage: axis.key for axis in axes}
        self.plan.faults += check_rounds(config, stages, swept, self.plan.where)
        return Rounds() if self.plan.faults or config.rounds == 1 else rounds_of(config, stages)

    def _entries(self) -> dict[str, dict[str, Any]]:
        stages = self.plan.values.get("stages")
        entries = stages.items() if isinstance(stages, dict) else ()
        return {str(name): entry for name, entry in entries if isinstance(entry, dict)}

    def _compare(self, overrides: list[Override], links: _Links, rounds: Rounds) -> StageSpec[CompareConfig] | None:
        entry = self.plan.values.get("compare")
        if not isinstance(entry, dict):
            for override in overrides:
                self.plan.faults.append(Fault(override.where, "the experiment has no compare section"))
            return None
        name = self.plan.values.get("name")
        draft = self._draft(("compare",), "compare", entry, {"name": name} if name else {})
        self._complete(draft, ("compare",), entry, overrides)
        rounds.enter(draft.values)
        return self._spec("compare", draft, links, CompareConfig)

    def _draft(self, path: KeyPath, command: str, entry: Mapping[str, Any], default: Mapping[str, Any]) -> Draft:
        draft = Draft(command, f"{self.plan.where(path)}")
        draft.add(default, lambda key: f"{self.plan.where(path)}.{dotted(key)}")
        name = entry.get("config")
        if name is None:
            return draft
        if not isinstance(name, str) or not name:
            where = self.plan.where((*path, "config"))
            self.plan.faults.append(Fault(where, f"found {name!r}", "a YAML file, relative to this one"))
            draft.unreadable = True
            return draft
        source = self.folder / name
        document = read_document(source)
        if not os.path.isfile(source):  # false also for a name that no file can have
            where = self.plan.where((*path, "config"))
            document.faults = [dataclasses.replace(fault, where=f"{where}: {fault.where}") for fault in document.faults]
        draft.label = str(source)
        draft.add_document(document, source.parent)
        return draft

    def _name(self, draft: Draft, name: str) -> None:
        """Give a stage its own name in the registry, in place of that of a file that other stages use too."""
        where = self.plan.where(("stages", name))
        draft.add({"output_name": name}, lambda key: f"{where}.{dotted(key)}")

    def _complete(self, draft: Draft, path: KeyPath, entry: Mapping[str, Any], overrides: Iterable[Override]) -> None:
        """Add the experiment's own values for a stage or the comparison."""
        spoken_for = ("config",) if draft.stage == "compare" else ("stage", "config")
        values = {key: value for key, value in entry.items() if key not in spoken_for}
        draft.add(values, lambda key: self.plan.where((*path, *key)), self.folder)
        draft.override(overrides)

    def _points(self, name: str, draft: Draft, axes: Sequence[Axis], links: _Links) -> list[StageSpec[StageConfig]]:
        """Return a stage at all points of its sweep; the values of the last key change fastest."""
        found: dict[tuple[int, ...], StageSpec[StageConfig]] = {}
        for point in itertools.product(*(range(len(axis.overrides)) for axis in axes)):
            here = copy.deepcopy(draft)
            before = len(here.notes)
            here.override(axis.overrides[number] for axis, number in zip(axes, point, strict=True))
            del here.notes[before:]  # the notes of all values are the same
            spec = self._spec(name, here, links, STAGES[here.stage])
            if spec is not None:
                setting = {axis.name: swept(axis, spec.config) for axis in axes}
                found[point] = dataclasses.replace(spec, setting=setting)
        self.plan.faults.extend(repeated(axes, {point: spec.config for point, spec in found.items()}))
        return list(found.values())

    def _spec(self, name: str, draft: Draft, links: _Links, kind: type[C]) -> StageSpec[C] | None:
        """Check and link a stage or the comparison; `kind` is the class of its config."""
        linked = links.find(name, draft)
        config = validate(draft)
        self.plan.faults.extend(draft.faults)
        self.plan.notes.extend(draft.notes)
        if not isinstance(config, kind):
            return None
        places = {found.path: found.text for found in mentions(config) if found.text in linked}
        return StageSpec(name, draft.stage, config, places)

    def _share_out(
        self, overrides: Iterable[Override], entries: Mapping[str, Any]
    ) -> tuple[list[Override], dict[str, list[Override]]]:
        """Return the experiment's own overrides, and those of each stage."""
        own: list[Override] = []
        inner: dict[str, list[Override]] = {}
        for override in overrides:
            top, rest = str(override.path[0]), override.path[1:]
            if rest and (top in entries or top == "compare"):
                if rest[0] in ("stage", "config"):
                    path = (top, *rest) if top == "compare" else ("stages", top, *rest)
                    own.append(dataclasses.replace(override, path=path))
                else:
                    inner.setdefault(top, []).append(dataclasses.replace(override, path=rest))
            elif top == "sweep" and len(rest) > 1:
                command = str(entries.get(str(rest[0]), {}).get("stage"))
                key = spelling(self.plan.values.get("sweep"), str(rest[0]), command, rest[1:])
                own.append(dataclasses.replace(override, path=("sweep", key)))
            elif top in ExperimentConfig.model_fields:
                own.append(override)
            else:
                self.plan.faults.append(_unknown_override(override, entries))
        return own, inner


def _unknown_override(override: Override, entries: Mapping[str, Any]) -> Fault:
    top, rest = str(override.path[0]), override.path[1:]
    if top in entries:
        return Fault(override.where, f"{top} is a stage", f"{top}.key=value")
    if top == "seed" and not rest:
        return Fault(override.where, "an experiment has seeds", "seeds=[N]")
    owners = [
        name
        for name, entry in entries.items()
        if top in getattr(STAGES.get(str(entry.get("stage"))), "model_fields", ())
    ]
    near = did_you_mean(top, [*entries, *ExperimentConfig.model_fields])
    if owners and not rest:
        near = f"write {owners[0]}.{top}=VALUE for the stage {owners[0]}"
    return Fault(override.where, f"the experiment has no {top!r}", "stage.key=value", near)


def _across(
    stages: Sequence[StageSpec[StageConfig]],
    points: Mapping[str, Sequence[StageSpec[StageConfig]]],
    compare: StageSpec[CompareConfig] | None,
    path: Path,
) -> Iterator[Fault]:
    """Yield the faults of stages that are valid alone but not together."""
    published: dict[tuple[bool, str], str] = {}
    for spec in stages:
        key = (spec.stage in TRAINING, spec.config.output_name)
        if key in published:
            found = f"the stages {published[key]} and {spec.name} both publish {spec.config.output_name!r}"
            yield Fault(f"{path}: stages.{spec.name}", found, "another output_name")
        published.setdefault(key, spec.name)
    fractions = [(spec.name, spec.config.split_fractions) for one in stages for spec in points[one.name]]
    fractions += [(compare.name, compare.config.split_fractions)] if compare else []
    for name, values in fractions[1:]:
        if values != fractions[0][1]:
            found = f"split_fractions differ from those of {fractions[0][0]}: prompts would change their split"
            yield Fault(f"{path}: {name}", found, "the same split_fractions in every stage")
