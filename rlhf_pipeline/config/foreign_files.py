"""Read the config of another tool: a YAML file, or the program and the flags in a shell script."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.yaml import parse_value, read_document
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.foreign.table import refuse

_PROGRAM = re.compile(r"\b((?:openrlhf\.cli|verl\.trainer)\.\w+)|\b(train_\w+)\.py\b|\btrl (sft|dpo|reward|kto)\b")
_ASSIGNED = re.compile(r"^\s*(?:export\s+)?(\w+)=(\"[^\"]*\"|'[^']*'|[^\s;]*)\s*$", re.MULTILINE)


def read_config(path: Path) -> dict[str, Any]:
    """Return the keys and values of a file, nested as there; a shell script's program is the key `program`.

    Raises:
        ConfigError: the file cannot be read, or starts no program of a known tool.
    """
    if path.suffix in (".sh", ".bash"):
        return _read_script(path)
    document = read_document(path)
    if document.faults:
        raise ConfigError(document.faults)
    if not document.values:
        raise refuse(str(path), "found no keys", "the config of another tool")
    return document.values


def _read_script(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(Fault(str(path), f"cannot be read: {error}", "a shell script")) from None
    text = "\n".join(re.sub(r"(^|\s)#(?!\{).*$", "", line) for line in text.splitlines())
    variables = {name: value.strip("\"'") for name, value in _ASSIGNED.findall(text)}
    text = re.sub(r"\\[ \t]*\n", " ", text)
    program = _PROGRAM.search(text)
    if program is None:
        raise refuse(str(path), "starts no known program", "a script of OpenRLHF or verl, or the YAML file of a tool")
    # The command ends with its line, or with the text between << EOF and EOF.
    command = text[program.end() :].partition("\nEOF")[0].partition("\n")[0]
    for _ in range(3):  # a variable may name others
        command = re.sub(r"\$\{?(\w+)\}?", lambda match: variables.get(match[1], match[0]), command)
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise refuse(str(path), f"cannot be split into words: {error}", "a command with closed quotes") from None
    return {"program": program[1] or program[2] or f"trl.{program[3]}", **_flags(words)}


def _flags(words: list[str]) -> dict[str, Any]:
    """Return the values of `--key value ...`, `--key=value`, `--key` (true) and `key=value`."""
    found: dict[str, Any] = {}
    key = ""
    for word in words:
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            found[key] = _value(value) if equals else True
        elif re.match(r"\+{0,2}[\w.]+=", word):
            name, _, value = word.lstrip("+").partition("=")
            found[name], key = _value(value), ""
        elif key and word != "$@":
            before = found[key]
            found[key] = (
                _value(word) if before is True else [*(before if isinstance(before, list) else [before]), _value(word)]
            )
    return found


def _value(text: str) -> Any:
    try:
        return parse_value(text)
    except ValueError:
        return text


def with_dataset_info(values: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the values of a LLaMA-Factory config with its dataset_info.json, if there is one; "" is its folder."""
    folder = str(values.get("dataset_dir") or "data")
    for base in (Path(), *path.absolute().parents):
        file = base / folder / "dataset_info.json"
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(known, dict):
            return {**values, "dataset_info": {**known, "": str(base / folder)}}
    return dict(values)
