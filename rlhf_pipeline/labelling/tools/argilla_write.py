"""Write a labelling project as the folder that Argilla's `rg.Dataset.from_disk` opens.

A record is an item, with a field for the prompt and one for each response; a ranking question orders the responses
(ranks from 1, equal ones tie), a rating question and one with several choices belong to each response. The options of a
ranking question belong to the dataset, so items with another number of responses are another dataset.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.disk import storage
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.kinds import Item, Judgement, Text
from rlhf_pipeline.labelling.tools import form as forms
from rlhf_pipeline.labelling.tools.form import FACTS, NONE, Form
from rlhf_pipeline.registry.store import folder_for_copy

LOWEST, HIGHEST = 0, 10
"""The grades that Argilla allows."""


def write_argilla(
    folder: Path,
    items: Sequence[Item],
    judgements: Sequence[Judgement],
    form: Form,
    *,
    users: Sequence[str] = (),
    models: bool = False,
) -> Counter[str]:
    """Write a project, a folder for each number of responses; return what is lost, by reason.

    Args:
        users: Argilla's ids of users (UUIDs), for labelers 0, 1, ...: Argilla refuses answers of users that it does not
            have, so judgements of other labelers are left out.
        models: whether the records say which model gave each response; labelers can then find it out.

    Raises:
        BadInput: the folder is not free, there are no items, or the scale is beyond Argilla's.
    """
    if form.lowest < LOWEST or form.highest > HIGHEST:
        found = f"found a scale from {form.lowest} to {form.highest}"
        raise BadInput(f"{found}, expected {LOWEST} to {HIGHEST}: Argilla has no other grades")
    if not items:
        raise BadInput("found no items to export, expected one or more")
    target, lost = folder_for_copy(folder), Counter[str]()
    sizes = sorted({len(item.responses) for item in items})
    with storage.staging(target.parent, target.name) as staged:
        for size in sizes:
            within = staged if len(sizes) == 1 else staged / f"k{size}"
            chosen = [item for item in items if len(item.responses) == size]
            _write_dataset(within, chosen, judgements, form, users, models, size, lost)
        storage.sync_tree(staged)
        if target.exists():
            target.rmdir()
        if not storage.claim(staged, target):
            raise BadInput(f"{target}: was filled by another process; export into a new or empty folder")
    return lost


def _write_dataset(
    folder: Path,
    items: Sequence[Item],
    judgements: Sequence[Judgement],
    form: Form,
    users: Sequence[str],
    models: bool,
    size: int,
    lost: Counter[str],
) -> None:
    chats = (
        any(not isinstance(item.prompt, str) for item in items),
        any(not isinstance(response.text, str) for item in items for response in item.responses),
    )
    by_item: dict[int, list[Judgement]] = {}
    for judgement in judgements:
        by_item.setdefault(judgement.item, []).append(judgement)
    records = [_made(item, by_item.get(item.number, []), form, users, models, chats, lost) for item in items]
    labelers = max((len({one.labeler for one in by_item.get(item.number, [])}) for item in items), default=1)
    shared = {
        "guidelines": form.instructions or None,
        "allow_extra_metadata": True,
        "distribution": {"strategy": "overlap", "min_submitted": max(1, labelers)},
    }
    name = re.sub(r"[^A-Za-z0-9_-]", "-", form.name).strip("-_") or "labels"
    settings = {"questions": _questions(form, size), "fields": _fields(size, chats), "vectors": [], "metadata": []}
    (folder / ".argilla").mkdir(parents=True)
    files = {
        ".argilla/dataset.json": {"name": f"{name}-k{size}", **shared},
        ".argilla/settings.json": {**settings, "mapping": None, **shared},
        "records.json": records,
    }
    for place, content in files.items():
        (folder / place).write_text(json.dumps(content, ensure_ascii=False, allow_nan=False), encoding="utf-8")


def _fields(size: int, chats: tuple[bool, bool]) -> list[dict[str, Any]]:
    names = [("prompt", "Prompt", chats[0])]
    names += [(f"response_{place}", f"Response {place}", chats[1]) for place in range(1, size + 1)]
    kinds = {True: "chat", False: "text"}
    return [
        {"name": name, "title": title, "required": True, "settings": {"type": kinds[chat], "use_markdown": True}}
        for name, title, chat in names
    ]


def _questions(form: Form, size: int) -> list[dict[str, Any]]:
    """Return the questions: a ranking; for each response a grade and which of the yes/no questions apply; a note."""
    places = range(1, size + 1)
    options = [{"value": f"response_{place}", "text": f"Response {place}"} for place in places]
    ranking = {"type": "ranking", "options": options}
    asked: list[tuple[str, str, bool, Any]] = [("ranking", "Rank the responses, the best one first", True, ranking)]
    for place in places:
        title = f"Response {place}: overall quality, from {form.lowest} (worst) to {form.highest} (best)"
        grades = [{"value": grade} for grade in range(form.lowest, form.highest + 1)]
        asked.append((f"rating_{place}", title, False, {"type": "rating", "options": grades}))
        if form.flags:
            flags = [{"value": key, "text": text} for key, text in form.flags.items()]
            flags.append({"value": NONE, "text": "None of these"})
            settings: dict[str, Any] = {"type": "multi_label_selection", "options": flags, "options_order": "natural"}
            settings |= {"visible_options": len(flags)} if len(flags) > 2 else {}
            asked.append((f"flags_{place}", f"Response {place}: which of these apply?", False, settings))
    asked.append(("note", "Note", False, {"type": "text", "use_markdown": False}))
    return [
        {"name": name, "title": title, "required": required, "description": None, "settings": settings}
        for name, title, required, settings in asked
    ]


def _made(
    item: Item,
    judgements: Sequence[Judgement],
    form: Form,
    users: Sequence[str],
    models: bool,
    chats: tuple[bool, bool],
    lost: Counter[str],
) -> dict[str, Any]:
    """Return the record of an item, with the answers of labelers who are users."""
    order = forms.page_order(item)
    fields = {"prompt": _shown(item.prompt, "user", chats[0])}
    for place, k in enumerate(order, start=1):
        fields[f"response_{place}"] = _shown(item.responses[k].text, "assistant", chats[1])
    responses: dict[str, list[dict[str, Any]]] = {}
    for judgement in judgements:
        if judgement.repeat:
            lost["judgements of an item that was shown again"] += 1
        elif judgement.labeler >= len(users):
            lost["judgements of labelers who are no user of Argilla (give their ids)"] += 1
        else:
            status = "discarded" if judgement.skipped else "submitted"
            for name, value in _values(judgement, order, form, lost).items():
                answer = {"value": value, "user_id": users[judgement.labeler], "status": status}
                responses.setdefault(name, []).append(answer)
    lost["models of responses (they would unblind labelers)"] += sum(
        response.source is not None for response in item.responses if not models
    )
    return {
        "id": f"item-{item.number}",
        "fields": fields,
        "metadata": {FACTS: json.dumps(forms.facts_of(item, models), ensure_ascii=False)},
        "suggestions": {},
        "responses": responses,
        "vectors": {},
        "status": "completed" if responses else "pending",
        "_server_id": None,
    }


def _values(judgement: Judgement, order: Sequence[int], form: Form, lost: Counter[str]) -> dict[str, Any]:
    if judgement.skipped:
        return {"note": judgement.reason}
    ranks = [{"value": f"response_{place}", "rank": judgement.ranks[k]} for place, k in enumerate(order, start=1)]
    values: dict[str, Any] = {"ranking": ranks}
    for place, k in enumerate(order, start=1):
        if (rating := judgement.ratings[k]) is not None:
            values[f"rating_{place}"] = rating
        choices = forms.choices_of(judgement.flags[k], form)
        if choices is not None:
            values[f"flags_{place}"] = choices
        elif judgement.flags[k]:
            lost["yes/no answers to a part of the questions on a response"] += len(judgement.flags[k])
    return values | ({"note": judgement.note} if judgement.note else {})


def _shown(text: Text, role: str, chat: bool) -> Text:
    return [{"role": role, "content": text}] if chat and isinstance(text, str) else text
