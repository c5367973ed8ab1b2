"""Read a project of Label Studio (its export "JSON", and the labelling interface) as items and judgements.

The responses are the elements of a list that a `Ranker` orders, or two texts of a `Pairwise`, or texts of which a
choice names the better one; ratings and further choices belong to the response whose number they end with.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import BadInput, first_line
from rlhf_pipeline.labelling.kinds import MAX_NOTE, Item, Text
from rlhf_pipeline.labelling.tools import form as forms
from rlhf_pipeline.labelling.tools.form import FACTS, Form, Imported, read_json
from rlhf_pipeline.labelling.tools.label_studio_write import CONFIG, TASKS, UNRANKED

MOST_LABELERS = 1 << 16
LONGEST = 1e9
"""Seconds: what is more is no time of work."""
_GRADE = re.compile("[0-9]{1,4}")
_TEXTS = ("body", "text", "html", "title")


@dataclass
class Interface:
    """The labelling interface: which data its objects show, and the options of its controls.

    data: {object: key of the task's data}. about: {control: its objects}. choices: {control: {stored: shown}}.
    """

    data: dict[str, str] = field(default_factory=dict)
    about: dict[str, list[str]] = field(default_factory=dict)
    choices: dict[str, dict[str, str]] = field(default_factory=dict)
    listed: str | None = None  # the data of the list that is ranked
    first: int = 1  # the number of the first response in the names of controls; 0 for those that a Repeater makes
    lowest: int = 1
    highest: int = 5  # Label Studio's own default


@dataclass(frozen=True)
class Task:
    """A task: its item, the place of each response on the page, and the names by which answers call the responses."""

    item: Item
    order: list[int]
    names: list[str]
    listed: bool


def read_label_studio(path: Path, config: Path | None = None) -> Imported:
    """Read a project; users become numbers.

    Args:
        path: the folder with `tasks.json` and `label_config.xml`, a folder of such folders, or a file of tasks.
        config: the labelling interface; default: `label_config.xml` beside the tasks, if it is there.

    Raises:
        BadInput, DataError: it is no project of Label Studio.
    """
    files = [path / TASKS if path.is_dir() else path]
    if not files[0].exists() and path.is_dir():
        files = sorted(path.glob(f"*/{TASKS}")) or files
    found, numbers, moved = Imported(Form(name=path.stem)), forms.Numbers(), Counter[bool]()
    for file in files:
        _read_project(file, config, found, numbers, moved)
    if moved[True]:
        found.notes.append(
            f"{moved[True]} of {moved.total()} rankings are in the order of their task: a Ranker without buckets also "
            "writes this order where nobody has moved anything"
        )
    found.items.sort(key=lambda item: item.number)
    found.lost = +found.lost
    return found


def _read_project(
    file: Path, config: Path | None, found: Imported, numbers: forms.Numbers, moved: Counter[bool]
) -> None:
    """Add the tasks of a file; count the rankings without buckets, by whether they are in the order of their task."""
    config = config or (file.parent / CONFIG if (file.parent / CONFIG).is_file() else None)
    interface = Interface() if config is None else read_interface(config)
    tasks = read_json(file)
    if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
        raise BadInput(f"{file}: expected a list of tasks, as Label Studio's export 'JSON' has it")
    if any("data" not in task for task in tasks):
        raise BadInput(f"{file}: found tasks without 'data', expected the export 'JSON', not 'JSON-MIN' or 'CSV'")
    flags = {key: text for options in _flags(tasks, interface).values() for key, text in options.items()}
    asked = {"lowest": interface.lowest, "highest": interface.highest, "flags": found.form.flags | flags}
    found.form = found.form.model_copy(update=asked)
    if config is None:
        found.notes.append(f"{file}: no {CONFIG} beside it: the choices of questions are those that somebody took")
    given = [annotation for task in tasks for annotation in _annotations(task)]
    named = [*interface.about, *(result["from_name"] for annotation in given for result in _results(annotation))]
    interface.first = 0 if any(re.search(r"([^0-9]0|\}\})$", name) for name in named) else 1
    for number in range(1 + max((one[0] for annotation in given if (one := _ours(annotation))), default=-1)):
        numbers.of(("ours", number))
    taken = {item.number for item in found.items}
    for row in tasks:
        try:
            task = _task(row, interface, taken)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            found.lost[f"tasks that are no prompt with two responses or more ({forms.why(error)})"] += 1
            continue
        taken.add(task.item.number)
        found.items.append(task.item)
        found.lost["predictions"] += len(row.get("predictions") or [])
        for annotation in _annotations(row):
            if (plain := _read_annotation(annotation, task, interface, found, numbers)) is not None:
                moved[plain] += 1


def read_interface(path: Path) -> Interface:
    """Read a labelling interface.

    Raises:
        BadInput: it is not XML, or declares entities.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if "<!DOCTYPE" in text or "<!ENTITY" in text:
            raise BadInput(f"{path}: declares a document type, which no labelling interface has")
        root = ElementTree.fromstring(text)
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise BadInput(
            f"{path}: not a labelling interface ({first_line(error)}); expected Label Studio's XML"
        ) from None
    found = Interface()
    for tag in root.iter():
        name, value = tag.get("name"), (tag.get("value") or "").lstrip("$")
        if name is None:
            continue
        if tag.get("toName"):
            found.about[name] = tag.get("toName", "").split(",")
            options = [one for one in tag.iter("Choice") if one.get("value")]
            found.choices[name] = {str(one.get("alias") or one.get("value")): str(one.get("value")) for one in options}
        elif value:
            found.data[name] = value
        if tag.tag == "List":
            found.listed = value
        if tag.tag in ("Rating", "Number"):
            highest = tag.get("maxRating") or tag.get("max") or ""
            found.highest = int(highest) if _GRADE.fullmatch(highest) else found.highest
            lowest = tag.get("min") or ""
            found.lowest = int(lowest) if _GRADE.fullmatch(lowest) else found.lowest
    return found


def _annotations(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = task.get("annotations") or task.get("completions") or []
    return [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []


def _results(annotation: Mapping[str, Any]) -> list[dict[str, Any]]:
    given = annotation.get("result")
    kept = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    return [one for one in kept if isinstance(one.get("value"), dict) and isinstance(one.get("from_name"), str)]


def _ours(annotation: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the labeler and the repeat that we wrote into an annotation."""
    for result in _results(annotation):
        meta = result.get("meta")
        given = (meta.get("labeler"), meta.get("repeat")) if isinstance(meta, dict) else (None, None)
        if type(given[0]) is int and type(given[1]) is int and 0 <= given[0] < MOST_LABELERS:
            return given[0], given[1]
    return None


def _flags(tasks: Sequence[Mapping[str, Any]], interface: Interface) -> dict[str, dict[str, str]]:
    """Return the yes/no questions of each control: its choices, where it belongs to a numbered response."""
    found: dict[str, dict[str, str]] = {}
    for name, options in interface.choices.items():
        if re.search(r"(\{\{|[0-9]+$)", name) and options:
            found[_stem(name)] = {forms.key_of(key): text for key, text in options.items() if not forms.is_none(key)}
    for task in tasks:
        for annotation in _annotations(task):
            for result in _results(annotation):
                stem, chosen = _stem(result["from_name"]), result["value"].get("choices")
                if stem == result["from_name"] or stem in interface.choices or not isinstance(chosen, list):
                    continue
                known = found.setdefault(stem, {})
                if not any(_stem(name) == stem for name in interface.choices):
                    known.update({forms.key_of(str(one)): str(one) for one in chosen if not forms.is_none(str(one))})
    return found


def _stem(name: str) -> str:
    """Return the name of a control without the number of the response at its end."""
    return re.sub(r"(\{\{.*?\}\}|[0-9]+)$", "", name)


def _task(row: Mapping[str, Any], interface: Interface, taken: set[int]) -> Task:
    data = row["data"]
    meta = row.get("meta")
    facts = meta.get(FACTS) if isinstance(meta, dict) else None
    facts = facts if isinstance(facts, dict) else {}
    key = (
        interface.listed
        if interface.listed in data
        else next(
            (name for name, value in data.items() if isinstance(value, list) and value and _are_items(value)), None
        )
    )
    if key is not None:
        names = [str(one["id"]) for one in _in_page_order(data[key])]
        if len(set(names)) < len(names):
            raise ValueError("two responses with one id")
        by_id = {str(one["id"]): one for one in data[key]}
        texts = [_text_of(by_id[name]) for name in names]
    else:
        pair = next((objects for objects in interface.about.values() if len(objects) == 2), [])
        names = [interface.data.get(name, name) for name in pair] or forms.response_names([*data])
        texts = [str(data[name]) for name in names]
    prompt = forms.prompt_name([name for name in data if name != key], names)
    if prompt is None:
        raise ValueError("no prompt among the data")
    order = [int(name[1:]) for name in names] if facts and all(re.fullmatch("r[0-9]", name) for name in names) else []
    order = order if sorted(order) == list(range(len(names))) else list(range(len(names)))
    shown: Text = _text(data[prompt])
    whole: list[Text] = forms.by_number(texts, order)
    if isinstance(facts.get("texts"), dict):
        shown, whole = facts["texts"]["prompt"], facts["texts"]["responses"]
    item = forms.item_of(forms.free_number(facts, taken), shown, whole, facts)
    return Task(item, order, names, key is not None)


def _are_items(values: list[Any]) -> bool:
    return all(isinstance(one, dict) and "id" in one and any(part in one for part in _TEXTS) for one in values)


def _text_of(element: Mapping[str, Any]) -> str:
    for part in _TEXTS:
        if isinstance(element.get(part), str):
            return str(element[part])
    raise ValueError(f"an element of the list without {' or '.join(_TEXTS[:2])}")


def _in_page_order(values: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return a list in the order of the page: JavaScript puts ids that are whole numbers first, and sorts them."""
    whole = [one for one in values if re.fullmatch(r"0|[1-9][0-9]{0,8}", str(one["id"]))]
    return [*sorted(whole, key=lambda one: int(one["id"])), *(one for one in values if one not in whole)]


def _text(value: Any) -> Text:
    if isinstance(value, list):
        return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in value]
    return str(value)


def _read_annotation(
    annotation: Mapping[str, Any], task: Task, interface: Interface, found: Imported, numbers: forms.Numbers
) -> bool | None:
    """Add a judgement; return whether its ranking is the order of the task, None for one with buckets or none."""
    size = len(task.names)
    ranks: list[int] | None = None
    ratings: list[int | None] = [None] * size
    flags: list[dict[str, bool]] = [{} for _ in task.names]
    note, plain = "", None
    for result in _results(annotation):
        name, value = result["from_name"], result["value"]
        at = forms.place_of(name, task.names, first=interface.first if task.listed else None)
        if isinstance(value.get("ranker"), dict):
            ranks, plain = _ranks(value["ranker"], name, task.names)
            found.lost["rankings that leave out responses, or with buckets that are no ranks"] += ranks is None
        elif "selected" in value:
            ranks = forms.ranks_of_choice(str(value["selected"]), task.names)
        elif isinstance(value.get("text"), list) and value["text"]:
            note = "\n".join(map(str, value["text"]))[:MAX_NOTE]
        elif "choices" in value:
            chosen = [str(one) for one in value["choices"]] if isinstance(value["choices"], list) else []
            stem = _stem(name)
            if at is not None and stem != name:
                known = _own(interface).get(stem, [*found.form.flags])
                flags[at] |= {key: key in map(forms.key_of, chosen) for key in known}
            elif len(chosen) == 1 and (by_choice := forms.ranks_of_choice(chosen[0], task.names)) is not None:
                ranks = ranks or by_choice
            else:
                found.lost[f"choices of {name!r}, which name no response"] += 1
        elif at is not None and type(grade := value.get("rating", value.get("number"))) in (int, float):
            ratings[at] = round(grade)
        else:
            found.lost[f"results of {name!r}, which are of no use here"] += 1
    ranks = ranks or forms.ranks_of_ratings(ratings)
    reason = (note or "skipped") if annotation.get("was_cancelled") or annotation.get("skipped") else None
    if ranks is None and reason is None:
        found.lost["annotations without a ranking of all responses"] += 1
        return None
    labeler, repeat = _ours(annotation) or (None, 0)
    by = annotation.get("completed_by")
    user = str(by.get("id", by.get("email")) if isinstance(by, dict) else by)
    who = ("theirs", user) if labeler is None else ("ours", labeler)
    seconds = annotation.get("lead_time")
    judgement = forms.judgement_of(
        task.item.number,
        numbers.of(who),
        task.order,
        ranks=forms.by_number(ranks or [1] * size, task.order),
        ratings=forms.by_number(ratings, task.order),
        flags=forms.by_number(flags, task.order),
        note="" if reason is not None else note,
        reason=reason,
        seconds=float(seconds) if isinstance(seconds, int | float) and 0 <= seconds < LONGEST else 0.0,
    )
    found.judgements.append(judgement.model_copy(update={"repeat": repeat}))
    return plain


def _own(interface: Interface) -> dict[str, list[str]]:
    """Return the keys of the yes/no questions of each control of the interface."""
    return {
        _stem(name): [forms.key_of(key) for key in options if not forms.is_none(key)]
        for name, options in interface.choices.items()
        if options
    }


def _ranks(value: Mapping[str, Any], name: str, names: Sequence[str]) -> tuple[list[int] | None, bool | None]:
    """Return the ranks by place, and for a ranker without buckets whether they are the order of the task."""
    if not all(isinstance(ids, list) for ids in value.values()):
        return None, None
    if name in value and len([key for key in value if key != UNRANKED]) == 1:
        ids = [str(one) for one in value[name]]
        if sorted(ids) != sorted(names):
            return None, None
        return [ids.index(one) + 1 for one in names], ids == [*names]
    ranked: dict[str, int] = {}
    for bucket, ids in value.items():
        match = re.fullmatch(r"(?:[a-z]*[-_ ])?([0-9]+)", bucket.lower())
        if match is None:
            if bucket != UNRANKED and ids:
                return None, None
            continue
        ranked |= {str(one): int(match[1]) for one in ids}
    return ([ranked[one] for one in names] if sorted(ranked) == sorted(names) else None), None
