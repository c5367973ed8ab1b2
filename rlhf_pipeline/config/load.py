"""Read, complete and check a config, and report all faults in one error."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rlhf_pipeline.config.base import CommandConfig
from rlhf_pipeline.config.draft import A_FILE, Draft, parse_overrides
from rlhf_pipeline.config.keys import advice_on_unknown, advice_on_unknown_inside
from rlhf_pipeline.config.lengths import LENGTHS, check_lengths
from rlhf_pipeline.config.mentions import find_local_paths
from rlhf_pipeline.config.stages import SCHEMAS, schema_class
from rlhf_pipeline.config.yaml import KeyPath, as_index, dotted, read_document
from rlhf_pipeline.errors import ConfigError, Fault, did_you_mean

C = TypeVar("C", bound=CommandConfig)


@dataclass(frozen=True)
class Loaded:
    """A valid config, and notes on values that were interpreted differently from the text."""

    config: CommandConfig
    notes: tuple[str, ...] = ()

    def of(self, kind: type[C]) -> C:
        """Return the config of a command whose config class is known."""
        assert isinstance(self.config, kind)
        return self.config


def load_config(
    stage: str,
    path: Mapping[str, Any] | str | os.PathLike[str] | None,
    overrides: Iterable[str] = (),
    *,
    extra: Mapping[str, Any] | None = None,
) -> Loaded:
    """Return the config of a stage command from a YAML file, extra values, and `key=value` overrides.

    Args:
        stage: sft, train-rm, ppo, dpo, collect, evaluate, compare, exact or label.
        path: the YAML file, or its content, or None.
        overrides: `key=value` texts; they win over everything.
        extra: values from the caller; they win over the file.

    Raises:
        ConfigError: one or more faults, all of them listed.
    """
    schema_class(stage)
    draft = Draft(stage, stage if path is None or isinstance(path, Mapping) else str(path))
    if isinstance(path, Mapping):
        draft.add(path, lambda key: f"{stage}: {dotted(key)}")
    elif path is not None:
        draft.add_document(read_document(Path(path)), Path(path).parent)
    if extra:
        draft.add(extra, lambda key: f"{stage}: {dotted(key)}")
    other = "did you mean --config {}?" if path is None else f"only one config is read, {path}: remove it"
    parsed, faults = parse_overrides(overrides, on_file=other)
    # A missing key belongs in that file.
    draft.unreadable |= path is None and any(fault.found == A_FILE for fault in faults)
    draft.faults.extend(faults)
    draft.override(parsed)
    config = validate(draft)
    if config is None or draft.faults:
        raise ConfigError(in_order(draft.faults))
    return Loaded(config, tuple(draft.notes))


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """Return the faults by file in the order of their lines, then those without a line."""
    order: dict[str, int] = {}
    places = []
    for fault in faults:
        match = re.match(r"(.+?):(?:([0-9]{1,9}):?)? ", fault.where + " ")
        source, line = (match[1], match[2]) if match else (fault.where, None)
        rank = order.setdefault(source, len(order))
        places.append((line is None, rank, int(line or 0), fault))
    return [fault for *_, fault in sorted(places, key=lambda place: place[:3])]


def validate(draft: Draft) -> CommandConfig | None:
    """Return the config of a draft, or None; its faults are added to the draft's."""
    draft.settle()
    find_local_paths(draft)
    schema = SCHEMAS[draft.stage]
    try:
        config, faulty = schema.model_validate(draft.values), set()
    except ValidationError as error:
        faulty = _translate(error, draft, report_missing=not draft.unreadable)
        config = _valid_part(schema, draft.values, faulty)
    for check in schema.checks:
        try:
            for fault in check(_Part(config, faulty) if faulty else config):
                if check is check_lengths and (apart := draft.apart(LENGTHS)):
                    # Report the value given last and the one it contradicts, which may be in a file.
                    fault = replace(fault, where=apart[0], found=f"{fault.found} (given: {apart[1]})")
                path = tuple(map(as_index, fault.where.split(".")))
                if not (draft.unreadable and fault.found == "missing"):
                    draft.fault(path, fault.found, fault.expected, fault.fix)
        except _FaultyFieldError:
            continue
    if not faulty and not draft.faults:
        draft.notes.extend(text for remark in schema.remarks for text in remark(config))
    return None if faulty else config


class _FaultyFieldError(Exception):
    """A check has read a field that is itself faulty."""


class _Part:
    """The valid fields of a config, for the checks between fields."""

    def __init__(self, config: BaseModel, faulty: set[str]):
        self._config, self._faulty = config, faulty

    def __getattr__(self, name: str) -> Any:
        if name in self._faulty:
            raise _FaultyFieldError(name)
        return getattr(self._config, name)


def _valid_part(schema: type[CommandConfig], values: Mapping[str, Any], faulty: set[str]) -> CommandConfig:
    """Return a config with placeholder values for the faulty fields, which checks cannot read."""
    fields = schema.model_fields.items()
    stand_ins = {name: field.examples[0] for name, field in fields if field.is_required() and field.examples}
    valid = {key: value for key, value in values.items() if key not in faulty}
    return schema.model_validate(stand_ins | valid)


def _translate(error: ValidationError, draft: Draft, report_missing: bool) -> set[str]:
    """Add pydantic's errors to the draft's faults; return their top-level keys."""
    errors = error.errors(include_url=False)
    faulty = {str(entry["loc"][0]) for entry in errors}
    for entry in errors:
        path: KeyPath = entry["loc"]
        # pydantic also reports a list with one faulty entry as "too short"; the entry's fault is enough.
        nested = any(other["loc"][: len(path)] == path != other["loc"] for other in errors)
        if (entry["type"] == "too_short" and nested) or (entry["type"] == "missing" and not report_missing):
            continue
        found, expected, fix = _say(entry, draft.stage)
        draft.fault(path, found, expected, fix)
    return faulty


_EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "dict": "a mapping",
    "model": "a mapping",
}


def _say(entry: Mapping[str, Any], stage: str) -> tuple[str, str, str]:
    """Return what was found, what was expected, and what to do."""
    kind, value, context = entry["type"], entry["input"], entry.get("ctx", {})
    if kind == "extra_forbidden":
        if len(entry["loc"]) > 1:
            advice = advice_on_unknown_inside(str(entry["loc"][0]), str(entry["loc"][-1]))
            return "there is no such key", "", advice
        return f"{stage} has no such key", "", advice_on_unknown(stage, str(entry["loc"][0]))
    if kind == "missing":
        field = SCHEMAS[stage].model_fields.get(str(entry["loc"][-1]))
        return "missing", (field.description if field else None) or "a value", ""
    found = f"found {_shown(value)}"
    if kind == "wrong_value":
        return found, context["expected"], context["fix"]
    if kind == "literal_error":
        choices = context["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        return found, f"one of {', '.join(choices)}", did_you_mean(str(value), choices)
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    for name, sign in signs.items():
        if name in context:
            return found, f"a number {sign} {context[name]:g}", ""
    if kind == "string_pattern_mismatch":
        return found, "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit", ""
    if kind.endswith("too_short"):
        return found, "at least one entry" if kind == "too_short" else "text that is not empty", ""
    expected = _EXPECTED.get(kind.split("_")[0], entry["msg"])
    quote = kind == "string_type" and isinstance(value, int | float)
    return found, expected, f'quote it: "{value}"' if quote else ""


def _shown(value: Any) -> str:
    if value is None:
        return "no value"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
