"""The values of a config that name models and data, and which of them are local paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel

from rlhf_pipeline.config.base import CommandConfig, renames
from rlhf_pipeline.config.draft import Draft
from rlhf_pipeline.config.in_context import name_arm, split_arm
from rlhf_pipeline.config.names import DATA_SUFFIXES
from rlhf_pipeline.config.reward_names import is_function_name, names_a_model
from rlhf_pipeline.config.stages import SCHEMAS
from rlhf_pipeline.config.yaml import KeyPath

_READING = ("dataset_config", "column_mapping")


@dataclass(frozen=True)
class Mention:
    """A value of a config that names a model or data.

    role: policy, reward (a reward model or another reward source) or data. text: of an arm, the name of its policy.
    part, columns: the requested part of the data, and the columns to rename.
    """

    path: KeyPath
    role: str
    text: str
    part: str | None = None
    columns: tuple[tuple[str, str], ...] = ()


def mentions(config: CommandConfig) -> Iterator[Mention]:
    """Yield the models and data that a config names, without the built-in world and module:function."""
    return raw_mentions(config.model_dump(), type(config))


def raw_mentions(values: Mapping[str, Any], kind: type[BaseModel]) -> Iterator[Mention]:
    """Yield the mentions in values that are not yet checked; `kind` declares the keys."""
    return (found for found in _named(values, kind) if not _is_built_in(found))


def functions(config: CommandConfig) -> Iterator[str]:
    """Yield the reward functions that a config names, as module:function."""
    named = _named(config.model_dump(), type(config))
    return (found.text for found in named if found.role == "reward" and is_function_name(found.text))


def _named(values: Mapping[str, Any], kind: type[BaseModel]) -> Iterator[Mention]:
    for key, field in kind.model_fields.items():
        extra = field.json_schema_extra
        role = extra.get("names") if isinstance(extra, dict) else None
        if not isinstance(role, str):
            continue
        inner = _inner_class(field.annotation)
        for path, value in _entries((key,), values.get(key)):
            if isinstance(value, Mapping) and inner is not None:
                yield from (replace(found, path=(*path, *found.path)) for found in _named(value, inner))
            elif isinstance(value, str):
                part, columns = (values.get(name) if role == "data" else None for name in _READING)
                named = columns if isinstance(columns, dict) and all(map(_is_text, columns.items())) else None
                meant, text = ("policy", split_arm(value)[1]) if role == "arm" else (role, value)
                yield Mention(path, meant, text, part if isinstance(part, str) else None, renames(named))


def _is_text(item: tuple[Any, Any]) -> bool:
    return all(isinstance(value, str) for value in item)


def _is_built_in(found: Mention) -> bool:
    return found.text.startswith("world:") if found.role == "data" else not names_a_model(found.text)


def _entries(path: KeyPath, value: Any) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, list | tuple):
        yield from (((*path, index), entry) for index, entry in enumerate(value))
    else:
        yield path, value


def _inner_class(annotation: Any) -> type[BaseModel] | None:
    """The config class of a field's entries; None if they are plain values."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_inner_class, get_args(annotation))), None)


def set_value(values: Any, path: KeyPath, value: Any) -> None:
    """Set the value at `path` in nested dicts and lists; tuples on the path become lists."""
    for part in path[:-1]:
        if isinstance(values[part], tuple):
            values[part] = list(values[part])
        values = values[part]
    values[path[-1]] = value


def set_reference(values: Any, path: KeyPath, reference: str) -> None:
    """Replace a name at `path`, as a `Mention` has it, by another one; the method of an arm stays."""
    present = values
    for part in path:
        present = present[part]
    set_value(values, path, name_arm(split_arm(present)[0], reference))


def find_local_paths(draft: Draft) -> None:
    """Resolve paths that are relative to a config's folder; a path that does not exist is a fault.

    A path is searched first in the working directory, then in the folder of the file that names it.
    """
    for mention in list(raw_mentions(draft.values, SCHEMAS[draft.stage])):
        if not _looks_local(mention):
            continue
        folder = draft.folders.get(str(mention.path[0]))
        try:
            path = Path(mention.text).expanduser()
            candidates = [path] if path.is_absolute() or folder is None else [path, folder / path]
            found = next((candidate for candidate in candidates if candidate.exists()), None)
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, `~` of an unknown user, a NUL
            reason = getattr(error, "strerror", None) or error
            draft.fault(mention.path, f"not a path: {reason}", "a path that exists")
            continue
        if found is None:
            looked = " or ".join(str(candidate.absolute()) for candidate in candidates)
            what = "a file or directory" if mention.role == "data" else "a model directory"
            draft.fault(mention.path, f"there is no {mention.text!r}", what, f"looked for {looked}")
        elif str(found) != mention.text:
            set_reference(draft.values, mention.path, str(found))


def _looks_local(mention: Mention) -> bool:
    text = mention.text
    if text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        return True
    return mention.role == "data" and ":" not in text and text.lower().endswith(DATA_SUFFIXES)
