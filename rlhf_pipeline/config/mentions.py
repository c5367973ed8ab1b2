"""Which values of a config name models and data, and which of these are local paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from rlhf_pipeline.config.draft import Draft
from rlhf_pipeline.config.yaml import KeyPath

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".gz")

# Role of each key that names something: a policy, a reward model or reward function, or data.
ROLES = {
    "model_name_or_path": "policy",
    "policy": "policy",
    "ref_model": "policy",
    "reference": "policy",
    "baseline": "policy",
    "arms": "policy",
    "reward_model_path": "reward",
    "reward_model": "reward",
    "reward_functions": "reward",
    "judge": "reward",
    "true_reward": "reward",
    "dataset_name": "data",
    "prompts": "data",
    "datasets": "data",
}
_INNER = {"reward_functions": "source", "datasets": "dataset_name"}


@dataclass(frozen=True)
class Mention:
    """A value of a config that names a model or data; `role` is policy, reward or data."""

    path: KeyPath
    role: str
    text: str


def mentions(config: BaseModel | Mapping[str, Any]) -> Iterator[Mention]:
    """Yield what a config, or its raw values, names: the built-in world and module:function left out."""
    values = config.model_dump() if isinstance(config, BaseModel) else config
    for key, role in ROLES.items():
        for path, text in _texts((key,), values.get(key), _INNER.get(key)):
            built_in = text.startswith("world:") if role == "data" else text == "world" or ":" in text
            if not built_in:
                yield Mention(path, role, text)


def _texts(path: KeyPath, value: Any, inner: str | None) -> Iterator[tuple[KeyPath, str]]:
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from _texts((*path, index), entry, inner)
    elif isinstance(value, dict) and inner is not None:
        yield from _texts((*path, inner), value.get(inner), None)


def set_value(values: Any, path: KeyPath, value: Any) -> None:
    """Set the value at `path` of nested dicts and lists; tuples on the way become lists."""
    for part in path[:-1]:
        if isinstance(values[part], tuple):
            values[part] = list(values[part])
        values = values[part]
    values[path[-1]] = value


def find_local_paths(draft: Draft) -> None:
    """Replace the paths that are relative to a config's folder; a path that does not exist is a fault.

    A path is looked for in the working directory first, then beside the file that names it.
    """
    for mention in list(mentions(draft.values)):
        if not _looks_local(mention):
            continue
        folder = draft.folders.get(str(mention.path[0]))
        try:
            path = Path(mention.text).expanduser()
            candidates = [path] if path.is_absolute() or folder is None else [path, folder / path]
            found = next((candidate for candidate in candidates if candidate.exists()), None)
        except (OSError, RuntimeError, ValueError) as error:  # a name too long, `~` of a user that is not there, a NUL
            reason = getattr(error, "strerror", None) or error
            draft.fault(mention.path, f"not a path: {reason}", "a path that exists")
            continue
        if found is None:
            looked = " or ".join(str(candidate.absolute()) for candidate in candidates)
            what = "a file or directory" if mention.role == "data" else "a model directory"
            draft.fault(mention.path, f"there is no {mention.text!r}", what, f"looked for {looked}")
        elif str(found) != mention.text:
            set_value(draft.values, mention.path, str(found))


def _looks_local(mention: Mention) -> bool:
    text = mention.text
    if text.startswith(("./", "../", "/", "~")) or text in (".", ".."):
        return True
    return mention.role == "data" and ":" not in text and text.lower().endswith(DATA_SUFFIXES)
