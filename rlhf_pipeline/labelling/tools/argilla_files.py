"""Read the files that Argilla writes: settings, and records in four forms.

* `Dataset.to_disk` of argilla 2.x: `.argilla/settings.json` and `records.json`. Its answers have no status, and those
  of a ranking question no ranks: a list of options, which for Argilla's page is always in the order of the settings.
* `Dataset.to_hub` of argilla 2.x: `.argilla/settings.json` and rows with `QUESTION.responses`, `.users` and `.status`.
* `FeedbackDataset.push_to_huggingface` of argilla 1.x: `argilla.yaml` and rows with lists of answers by question.
* the server's own answer to `GET /api/v1/datasets/ID/records?include=responses`, as `records.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.yaml import read_document
from rlhf_pipeline.errors import BadInput, ConfigError
from rlhf_pipeline.labelling.tools.form import FACTS, read_json, read_rows

SETTINGS = (".argilla/settings.json", "settings.json")
OLD_SETTINGS = ("argilla.yaml", "argilla.cfg")


@dataclass(frozen=True)
class Question:
    """A question of the settings; options are {value: text}, of a rating the grades."""

    name: str
    title: str
    kind: str
    options: dict[Any, str]


@dataclass(frozen=True)
class Answers:
    """What one user answered about a record: {question: value}. status: None where the file does not say."""

    user: str
    status: str | None
    values: dict[str, Any]


@dataclass
class Record:
    """A record: its fields, what we keep in its metadata, and the answers to it."""

    fields: dict[str, Any]
    facts: dict[str, Any]
    answers: list[Answers]


@dataclass
class Project:
    """The settings and records of one dataset."""

    guidelines: str
    fields: list[str]
    questions: list[Question]
    records: list[Record] = field(default_factory=list)


def read_projects(path: Path) -> list[Project]:
    """Return the datasets at a path: a folder of one, a folder of such folders, or its file of records.

    Raises:
        BadInput: there is no dataset of Argilla, or a file of it cannot be used.
    """
    folder = path if path.is_dir() else path.parent
    if _settings_file(folder) is None and path.is_dir():
        inner = sorted(one for one in path.iterdir() if one.is_dir() and _settings_file(one) is not None)
        if inner:
            return [project for one in inner for project in read_projects(one)]
    file = _settings_file(folder)
    if file is None:
        names = " or ".join((*SETTINGS[:1], *OLD_SETTINGS[:1]))
        raise BadInput(f"{path}: found no {names}, expected the folder that Argilla's to_disk or to_hub writes")
    project = _settings(file)
    project.records = [_record(row, project, path) for row in _rows(path)]
    return [project]


def is_project(path: Path) -> bool:
    """Whether a path looks like a dataset of Argilla."""
    folders = [path, *(one for one in path.iterdir() if one.is_dir())] if path.is_dir() else [path.parent]
    return any(_settings_file(folder) is not None for folder in folders)


def _settings_file(folder: Path) -> Path | None:
    return next((folder / name for name in (*SETTINGS, *OLD_SETTINGS) if (folder / name).is_file()), None)


def _settings(file: Path) -> Project:
    if file.name == OLD_SETTINGS[0]:
        document = read_document(file)
        if document.faults:
            raise ConfigError(document.faults)
        found = document.values
    else:
        found = read_json(file)
    try:
        fields = [str(one["name"]) for one in found["fields"]]
        questions = [_question(one) for one in found["questions"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(
            f"{file}: found no fields and questions with names and types, expected Argilla's settings"
        ) from None
    return Project(str(found.get("guidelines") or ""), fields, questions)


def _question(found: Mapping[str, Any]) -> Question:
    inner = found.get("settings") or found
    given = inner.get("options") or inner.get("values") or inner.get("labels") or []
    if isinstance(given, Mapping):
        options = dict(given)
    else:
        pairs = [(one["value"], one.get("text")) if isinstance(one, Mapping) else (one, None) for one in given]
        options = {value: str(value if text is None else text) for value, text in pairs}
    name = str(found["name"])
    return Question(name, str(found.get("title") or name), str(inner.get("type") or found["type"]), options)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        files = [path]
    elif (path / "records.json").is_file():
        files = [path / "records.json"]
    else:
        files = sorted(one for one in path.rglob("*") if one.suffix in (".parquet", ".jsonl") and one.is_file())
    for file in files:
        if file.suffix != ".json":
            yield from read_rows(file)
            continue
        found = read_json(file)
        found = found.get("items") if isinstance(found, dict) else found
        if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
            raise BadInput(f"{file}: expected a list of records, or an object with the list 'items'")
        yield from found
    if not files:
        raise BadInput(f"{path}: found settings and no records, expected records.json or .parquet files")


def _record(row: Mapping[str, Any], project: Project, path: Path) -> Record:
    nested = row.get("fields")
    fields = nested if isinstance(nested, dict) else {name: row.get(name) for name in project.fields}
    metadata = row.get("metadata")
    metadata = _decoded(metadata) if isinstance(metadata, str) else metadata
    facts = metadata.get(FACTS) if isinstance(metadata, dict) else row.get(FACTS)
    facts = _decoded(facts) if isinstance(facts, str) else facts
    try:
        answers = list(_answers(row, project))
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput(f"{path}: record {row.get('id')!r}: answers in a form that Argilla does not write") from None
    return Record(dict(fields), facts if isinstance(facts, dict) else {}, answers)


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _answers(row: Mapping[str, Any], project: Project) -> Iterator[Answers]:
    """Yield the answers of each user, gathered from those to each question."""
    given = row.get("responses")
    if isinstance(given, list):  # as the server has them
        for one in given:
            values = {name: value["value"] for name, value in (one.get("values") or {}).items()}
            yield Answers(str(one.get("user_id")), one.get("status"), values)
        return
    gathered: dict[str, Answers] = {}
    for question in project.questions:
        for user, status, value in _of_question(row, given, question.name):
            known = gathered.setdefault(user, Answers(user, status, {}))
            if value is not None:
                known.values[question.name] = value
    yield from gathered.values()


def _of_question(row: Mapping[str, Any], nested: Any, name: str) -> Iterator[tuple[str, str | None, Any]]:
    if isinstance(nested, dict):
        answers: Any = nested.get(name) or []
    elif f"{name}.responses" in row:
        values = row[f"{name}.responses"] or []
        users = row.get(f"{name}.responses.users") or list(range(len(values)))
        statuses = row.get(f"{name}.responses.status") or [None] * len(values)
        yield from ((str(user), status, value) for value, user, status in zip(values, users, statuses, strict=True))
        return
    else:
        answers = row.get(name) or []
    if isinstance(answers, dict):  # a list of objects, as `datasets` stores it
        answers = [dict(zip(answers, cells, strict=True)) for cells in zip(*answers.values(), strict=True)]
    for one in answers:
        yield str(one.get("user_id")), one.get("status"), one.get("value")
