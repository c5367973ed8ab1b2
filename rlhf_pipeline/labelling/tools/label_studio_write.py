"""Write a labelling project for Label Studio: `label_config.xml`, its labelling interface, and `tasks.json` to import.

A task is an item: the prompt, and a list of responses that a `Ranker` sorts into one bucket for each rank (a bucket
holds ties); a grade and the yes/no questions belong to each response. Responses in no bucket are not ranked: a `Ranker`
without buckets writes the order of the task where nobody has moved anything.
"""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.records import plain
from rlhf_pipeline.disk import storage
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.kinds import Item, Judgement, Text
from rlhf_pipeline.labelling.tools import form as forms
from rlhf_pipeline.labelling.tools.form import FACTS, NONE, Form
from rlhf_pipeline.registry.store import folder_for_copy

CONFIG, TASKS = "label_config.xml", "tasks.json"
UNRANKED = "_"
"""The bucket of what has no rank yet, as Label Studio names it."""


def write_label_studio(
    folder: Path, items: Sequence[Item], judgements: Sequence[Judgement], form: Form, *, models: bool = False
) -> Counter[str]:
    """Write a project into a free folder, with one for each number of responses; return what is lost, by reason.

    Annotations name no user, so Label Studio gives them to the user who imports them; which of them are one labeler's
    is kept in the `meta` of their results.

    Args:
        models: whether the tasks say which model gave each response; labelers can then find it out.

    Raises:
        BadInput: the folder is not free, or there are no items.
    """
    if not items:
        raise BadInput("found no items to export, expected one or more")
    target, lost = folder_for_copy(folder), Counter[str]()
    by_item: dict[int, list[Judgement]] = {}
    for judgement in judgements:
        by_item.setdefault(judgement.item, []).append(judgement)
    sizes = sorted({len(item.responses) for item in items})
    with storage.staging(target.parent, target.name) as staged:
        for size in sizes:
            within = staged if len(sizes) == 1 else staged / f"k{size}"
            chosen = [item for item in items if len(item.responses) == size]
            tasks = [_task(item, by_item.get(item.number, []), form, models, lost) for item in chosen]
            within.mkdir(exist_ok=True)
            (within / CONFIG).write_text(label_config(form, size), encoding="utf-8")
            (within / TASKS).write_text(json.dumps(tasks, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        storage.sync_tree(staged)
        if target.exists():
            target.rmdir()
        if not storage.claim(staged, target):
            raise BadInput(f"{target}: was filled by another process; export into a new or empty folder")
    return lost


def label_config(form: Form, size: int) -> str:
    """Return the labelling interface for items of `size` responses.

    Each response has controls of its own: label-studio-sdk does not know those that a `Repeater` makes.
    """
    view = ElementTree.Element("View")

    def add(within: ElementTree.Element, tag: str, **attributes: str) -> ElementTree.Element:
        return ElementTree.SubElement(within, tag, attributes)

    add(view, "Header", value="Prompt")
    add(view, "Text", name="prompt", value="$prompt")
    add(view, "List", name="responses", value="$responses", title="Not ranked yet")
    ranker = add(view, "Ranker", name="rank", toName="responses")
    for rank in range(1, size + 1):
        add(ranker, "Bucket", name=str(rank), title=f"Rank {rank}{' (best)' if rank == 1 else ''}")
    for place in range(1, size + 1):
        name = f"response_{place}"
        add(view, "Header", value=f"Response {place}")
        add(view, "Text", name=name, value=f"${name}")
        if form.lowest == 1:
            add(view, "Rating", name=f"rating_{place}", toName=name, maxRating=str(form.highest))
        else:
            limits = {"min": str(form.lowest), "max": str(form.highest), "step": "1"}
            add(view, "Number", name=f"rating_{place}", toName=name, **limits)
        if form.flags:
            choices = add(view, "Choices", name=f"flags_{place}", toName=name, choice="multiple")
            for key, text in {**form.flags, NONE: "None of these"}.items():
                add(choices, "Choice", value=text, alias=key)
    add(view, "Header", value="Note")
    add(view, "TextArea", name="note", toName="prompt", maxSubmissions="1", editable="true")
    ElementTree.indent(view)
    return ElementTree.tostring(view, encoding="unicode") + "\n"


def _task(item: Item, judgements: Sequence[Judgement], form: Form, models: bool, lost: Counter[str]) -> dict[str, Any]:
    order = forms.page_order(item)
    listed = [
        {"id": f"r{k}", "title": f"Response {place}", "body": _shown(item.responses[k].text)}
        for place, k in enumerate(order, start=1)
    ]
    facts = forms.facts_of(item, models)
    texts = [response.text for response in item.responses]
    if any(not isinstance(text, str) for text in (item.prompt, *texts)):
        facts["texts"] = {"prompt": item.prompt, "responses": texts}  # the page shows messages as text
    lost["models of responses (they would unblind labelers)"] += sum(
        response.source is not None for response in item.responses if not models
    )
    return {
        "data": {"prompt": _shown(item.prompt), "responses": listed}
        | {f"response_{place}": one["body"] for place, one in enumerate(listed, start=1)},
        "meta": {FACTS: facts},
        "annotations": [_annotation(judgement, order, form, lost) for judgement in judgements],
    }


def _annotation(judgement: Judgement, order: Sequence[int], form: Form, lost: Counter[str]) -> dict[str, Any]:
    """Return a judgement as an annotation; without `ground_truth: false` Label Studio takes it for the right answer."""
    results: list[dict[str, Any]] = []
    meta = {"labeler": judgement.labeler, "repeat": judgement.repeat}

    def add(name: str, about: str, kind: str, value: Any) -> None:
        result = {"id": f"{name}-{judgement.labeler}-{judgement.repeat}", "from_name": name, "to_name": about}
        results.append({**result, "type": kind, "value": value, "origin": "manual", "meta": meta})

    if judgement.skipped:
        add("note", "prompt", "textarea", {"text": [judgement.reason]})
        return {"result": results, "was_cancelled": True, "ground_truth": False}
    buckets: dict[str, list[str]] = {UNRANKED: []}
    for rank in range(1, len(order) + 1):
        buckets[str(rank)] = [f"r{k}" for k in order if judgement.ranks[k] == rank]
    add("rank", "responses", "ranker", {"ranker": buckets})
    for place, k in enumerate(order, start=1):
        if (rating := judgement.ratings[k]) is not None:
            kind = "rating" if form.lowest == 1 else "number"
            add(f"rating_{place}", f"response_{place}", kind, {kind: rating})
        choices = forms.choices_of(judgement.flags[k], form)
        if choices is not None:
            add(f"flags_{place}", f"response_{place}", "choices", {"choices": choices})
        elif judgement.flags[k]:
            lost["yes/no answers to a part of the questions on a response"] += len(judgement.flags[k])
    if judgement.note:
        add("note", "prompt", "textarea", {"text": [judgement.note]})
    return {"result": results, "was_cancelled": False, "ground_truth": False}


def _shown(text: Text) -> str:
    if isinstance(text, str):
        return text
    return text[0]["content"] if len(text) == 1 else plain(tuple(text))
