"""The configurations of a folder of data files that its README.md declares, as on the hub."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from rlhf_pipeline.config.yaml import parse_document
from rlhf_pipeline.errors import DataError, Fault, did_you_mean

_FRONT_MATTER = re.compile(r"(---[ \t]*\n.*?\n)---[ \t]*(\n|\Z)", re.DOTALL)
_MOST_CHARACTERS = 1_000_000
_WITHOUT_EFFECT = {"features", "version", "description", "drop_labels"}
FORM = "a glob pattern, a list of them, or a list of {split: NAME, path: PATTERN or PATTERNS}"


def declared_files(source: str, folder: Path, config: str | None) -> tuple[Path, list[tuple[Path, str]] | None] | None:
    """Return the folder of a configuration's files, and its files with their splits.

    The files are None if the configuration declares none: then their names tell the splits. None: README.md declares no
    configurations.

    Args:
        config: name of the configuration; None: the only one, `default`, or the one with `default: true`.

    Raises:
        DataError: the declaration is not that of the hub, there is no such configuration, or a pattern has no files.
    """
    card = folder / "README.md"
    configs = _declared(card)
    if configs is None:
        return None
    chosen = _choose(source, configs, config)
    where = f"{card}: {chosen['config_name']}"
    known = {"config_name", "default", "data_dir", "data_files", *_WITHOUT_EFFECT}
    if other := sorted(map(str, set(chosen) - known)):
        raise DataError(Fault(where, f"{', '.join(other)}, which is not read here", "data_files and data_dir"))
    inside = str(chosen.get("data_dir") or ".")
    _require_inside(where, inside)
    base, given = folder / inside, chosen.get("data_files")
    if given is None:
        return base, None
    splits = _splits(where, given)
    return base, [(path, split) for split, patterns in splits for path in _matches(where, base, patterns)]


def _declared(card: Path) -> list[dict[str, Any]] | None:
    """The list `configs` of the YAML at the head of a card; None if there is none."""
    if not card.is_file():
        return None
    with card.open(encoding="utf-8-sig", errors="replace") as file:
        head = _FRONT_MATTER.match(file.read(_MOST_CHARACTERS))
    if head is None or not re.search(r"^configs[ \t]*:", head[1], re.MULTILINE):
        return None
    document = parse_document(head[1], str(card))
    if document.faults:
        raise DataError(document.faults)
    found = document.values.get("configs")
    if not found:
        return None
    named = isinstance(found, list) and all(
        isinstance(one, dict) and isinstance(one.get("config_name"), str) for one in found
    )
    if not named:
        raise DataError(Fault(document.where(("configs",)), "not a list of configurations", "each with config_name"))
    return found


def _choose(source: str, configs: list[dict[str, Any]], name: str | None) -> dict[str, Any]:
    names = [config["config_name"] for config in configs]
    default = [one for one in configs if len(configs) == 1 or one["config_name"] == "default" or one.get("default")]
    found = default if name is None else [one for one in configs if one["config_name"] == name]
    if len(found) == 1:
        return found[0]
    given = "several configurations, none of them the default" if name is None else f"no configuration {name!r}"
    if len(found) > 1:
        given = "several default configurations" if name is None else f"several configurations {name!r}"
    near = did_you_mean(name, names) if name is not None else "set dataset_config"
    raise DataError(Fault(source, given, f"one of {', '.join(names)}", near))


def _splits(where: str, given: Any) -> list[tuple[str, list[str]]]:
    """`data_files` as split -> patterns; without split names, all files are of train."""
    entries = given if isinstance(given, list) else [given]
    if entries and all(isinstance(entry, str) for entry in entries):
        return [("train", entries)]
    found: list[tuple[str, list[str]]] = []
    for entry in entries:
        named = isinstance(entry, dict) and set(entry) == {"split", "path"}
        patterns = (entry["path"] if isinstance(entry["path"], list) else [entry["path"]]) if named else []
        texts = bool(patterns) and all(isinstance(pattern, str) for pattern in patterns)
        if not texts or not re.fullmatch(r"\w+(\.\w+)*", str(entry["split"])):
            raise DataError(Fault(f"{where}: data_files", f"found {entry!r}", FORM))
        found.append((str(entry["split"]), patterns))
    if len({split for split, _ in found}) != len(found) or not found:
        raise DataError(Fault(f"{where}: data_files", "a split given twice" if found else "nothing", FORM))
    return found


def _matches(where: str, base: Path, patterns: list[str]) -> Iterator[Path]:
    """The files of glob patterns; those in folders named __*, and hidden ones, only if a pattern says so."""
    for pattern in patterns:
        _require_inside(where, pattern)
        hidden = any(part.startswith("__") for part in PurePosixPath(pattern).parent.parts)
        paths = [
            base / name
            for name in sorted(glob.glob(pattern, root_dir=base, recursive=True))
            if hidden or not any(part.startswith("__") for part in PurePosixPath(name).parent.parts)
        ]
        files = [path for path in paths if path.is_file() and path.name != "README.md"]
        if not files:
            raise DataError(Fault(f"{where}: data_files", f"no file is called {pattern!r}", f"files in {base}"))
        yield from files


def _require_inside(where: str, path: str) -> None:
    """Refuse a path that leaves the folder: a downloaded card must not choose other files of this machine."""
    if "://" in path or PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise DataError(Fault(where, f"{path!r} leads out of the folder", "a path within it"))
