"""Read datasets of Argilla, 1.x or 2.x, as items and judgements.

The prompt and the responses are fields; a ranking question orders the responses, or one with a single choice names the
best; rating questions, and those with several choices, belong to the response that they name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.kinds import MAX_NOTE, Item, Text
from rlhf_pipeline.labelling.tools import form as forms
from rlhf_pipeline.labelling.tools.argilla_files import Answers, Project, Question, read_projects
from rlhf_pipeline.labelling.tools.form import Form, Imported

RANKLESS = (
    "argilla 2.x writes the answers of a ranking question without their ranks, in the order of its options: who was "
    "ranked first is not in this file"
)
NO_STATUS = "the file does not say which answers were submitted: drafts and discarded ones count as submitted"


def read_argilla(path: Path) -> Imported:
    """Read the datasets at a path as items and judgements; labelers become numbers.

    Raises:
        BadInput, DataError: there is no dataset, it has no prompt and responses, or its rankings have no ranks.
    """
    projects = read_projects(path)
    found = Imported(Form(name=path.name if path.is_dir() else path.stem, instructions=projects[0].guidelines))
    numbers = forms.Numbers()
    for project in projects:
        _read_project(project, found, numbers, path)
    return found


def _read_project(project: Project, found: Imported, numbers: forms.Numbers, path: Path) -> None:
    ranking = next((question for question in project.questions if question.kind == "ranking"), None)
    names = forms.response_names(project.fields)
    if not names and ranking is not None:
        names = [name for name in project.fields if forms.place_of(name, [*map(str, ranking.options)]) is not None]
    prompt = forms.prompt_name(project.fields, names)
    if len(names) < 2 or prompt is None:
        raise BadInput(
            f"{path}: found the fields {', '.join(project.fields)}, expected a prompt and two responses or more, such "
            "as prompt, response_1, response_2; rename the fields"
        )
    roles = _roles(project, names, ranking, found)
    if ranking is not None:
        _require_ranks(project, ranking, found, path)
    taken = {item.number for item in found.items}
    for record in project.records:
        size = sum(record.fields.get(name) is not None for name in names)
        number = forms.free_number(record.facts, taken)
        try:
            if any(record.fields.get(name) is None for name in names[:size]):
                raise ValueError("a response is missing before others")
            texts = [_text(record.fields.get(name)) for name in names[:size]]
            order = forms.order_in(record.facts, size)
            item = forms.item_of(number, _text(record.fields.get(prompt)), forms.by_number(texts, order), record.facts)
        except (KeyError, TypeError, ValueError) as error:
            found.lost[f"records that are no prompt with two responses or more ({forms.why(error)})"] += 1
            continue
        taken.add(number)
        found.items.append(item)
        for answers in record.answers:
            _read_answers(answers, item, order, roles, names[:size], found, numbers.of(answers.user))


def _roles(
    project: Project, names: Sequence[str], ranking: Question | None, found: Imported
) -> dict[str, tuple[str, int, Question]]:
    """Return what each question is: ranking, choice, rating or flags of a response, or note."""
    roles: dict[str, tuple[str, int, Question]] = {}
    first = int(match[0]) if (match := re.search(r"[0-9]+$", names[0])) else None
    for question in project.questions:
        place = forms.place_of(question.name, names, first=first)
        place = forms.place_of(question.title, names, first=first) if place is None else place
        taken = {(role, at) for role, at, _ in roles.values()}
        if question is ranking:
            roles[question.name] = ("ranking", 0, question)
        elif question.kind == "rating" and place is not None and ("rating", place) not in taken:
            roles[question.name] = ("rating", place, question)
            grades = [grade for grade in question.options if type(grade) is int]
            if grades:
                found.form = found.form.model_copy(update={"lowest": min(grades), "highest": max(grades)})
        elif question.kind == "multi_label_selection" and place is not None and ("flags", place) not in taken:
            roles[question.name] = ("flags", place, question)
            flags = {
                forms.key_of(str(key)): text for key, text in question.options.items() if not forms.is_none(str(key))
            }
            found.form = found.form.model_copy(update={"flags": found.form.flags | flags})
        elif question.kind == "label_selection" and all(
            forms.ranks_of_choice(str(option), names) is not None for option in question.options
        ):
            roles[question.name] = ("choice", 0, question)
        elif question.kind == "text" and ("note", 0) not in taken:
            roles[question.name] = ("note", 0, question)
        else:
            found.lost[f"answers to the question {question.name!r}, which is of no use here"] += sum(
                question.name in answers.values for record in project.records for answers in record.answers
            )
    return roles


def _require_ranks(project: Project, ranking: Question, found: Imported, path: Path) -> None:
    """Refuse rankings that are lists in the order of the options: they do not say who was ranked first."""
    options = [str(option) for option in ranking.options]
    given = [answers.values.get(ranking.name) for record in project.records for answers in record.answers]
    listed = [
        value for value in given if isinstance(value, list) and value and all(isinstance(one, str) for one in value)
    ]
    same = sum(value == [option for option in options if option in value] for value in listed)
    if listed and same == len(listed) and len(options) > 1:
        fix = f"give the answer of GET /api/v1/datasets/ID/records?include=responses as {path.name}, or a 1.x export"
        raise BadInput(f"{path}: {RANKLESS} ({same} answers); {fix}")
    if listed:
        found.notes.append(f"{len(listed)} rankings are lists, read as the best first: ties are not in them")


def _read_answers(
    answers: Answers,
    item: Item,
    order: Sequence[int],
    roles: dict[str, tuple[str, int, Question]],
    names: Sequence[str],
    found: Imported,
    labeler: int,
) -> None:
    size = len(names)
    ranks: list[int] | None = None
    choice: list[int] | None = None
    ratings: list[int | None] = [None] * size
    flags: list[dict[str, bool]] = [{} for _ in names]
    note = ""
    for name, value in answers.values.items():
        role, place, question = roles.get(name, ("", 0, None))
        if question is None or place >= size:
            continue
        if role == "ranking":
            ranks = _ranks(value, [*question.options], names)
        elif role == "choice":
            choice = forms.ranks_of_choice(str(value), names)
        elif role == "rating" and type(value) is int:
            ratings[place] = value
        elif role == "flags" and isinstance(value, list):
            known = [str(key) for key in question.options if not forms.is_none(str(key))]
            chosen = {forms.key_of(key) for key in known if key in value}
            flags[place] = {key: key in chosen for key in map(forms.key_of, known)}
        elif role == "note":
            note = str(value)[:MAX_NOTE]
    ranks = ranks or choice or forms.ranks_of_ratings(ratings)
    reason = (note or "discarded") if answers.status == "discarded" else None
    if answers.status == "draft":
        found.lost["drafts"] += 1
        return
    if ranks is None and reason is None:
        found.lost["answers without a ranking of all responses"] += 1
        return
    if answers.status is None and (said := NO_STATUS) not in found.notes:
        found.notes.append(said)
    found.judgements.append(
        forms.judgement_of(
            item.number,
            labeler,
            order,
            ranks=forms.by_number(ranks or [1] * size, order),
            ratings=forms.by_number(ratings, order),
            flags=forms.by_number(flags, order),
            note="" if reason is not None else note,
            reason=reason,
        )
    )


def _ranks(value: Any, options: Sequence[Any], names: Sequence[str]) -> list[int] | None:
    """Return the ranks by place, from {value, rank} of all options, or from a list with the best first."""
    if isinstance(value, dict) and all(isinstance(cells, list) for cells in value.values()):  # as `datasets` stores it
        value = [dict(zip(value, cells, strict=False)) for cells in zip(*value.values(), strict=False)]
    if not isinstance(value, list):
        return None
    ranked: dict[int, int] = {}
    for number, one in enumerate(value, start=1):
        name, rank = (one.get("value"), one.get("rank")) if isinstance(one, dict) else (one, number)
        place = forms.place_of(str(name), names)
        if place is None and name in options and len(options) == len(names):
            place = options.index(name)
        if place is None or type(rank) is not int:
            return None
        ranked[place] = rank
    return [ranked[place] for place in range(len(names))] if len(ranked) == len(names) else None


def _text(value: Any) -> Text:
    """Return a field's text, or its turns as messages."""
    if isinstance(value, list):
        return [
            {"role": str(turn["role"]), "content": str(turn["content"])} for turn in value if isinstance(turn, dict)
        ]
    return "" if value is None else str(value)
