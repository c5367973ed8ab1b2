"""What a project asks, and what project files of other tools have in common."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from rlhf_pipeline.data.files import rows_in
from rlhf_pipeline.data.kinds import places_of
from rlhf_pipeline.disk.decoding import decode_json
from rlhf_pipeline.errors import BadInput, DataError, first_line
from rlhf_pipeline.labelling.kinds import Item, Judgement, Part, Response, Text

Value = TypeVar("Value")

NONE = "none_of_these"
"""The choice beside the yes/no questions that answers all of them with no."""
FACTS = "rlhf"
"""Where a record or a task keeps what the tool has no place for."""
MOST_BYTES = 1 << 30
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9 _.,:;'\"/()-]*[.!?]*")
"""Names whose other characters say nothing, unlike those of `+1` and `-1`, `C` and `C++`."""
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "conversation", "chat", "task")
_RESPONSES = (
    "response",
    "completion",
    "answer",
    "generation",
    "candidate",
    "output",
    "reply",
    "text",
    "model",
    "option",
)
_TIES = (
    "tie",
    "tied",
    "same",
    "equal",
    "equallygood",
    "both",
    "draw",
    "neither",
    "bothgood",
    "bothbad",
    "nopreference",
)


class Form(Part):
    """What labelers are asked: a grade from lowest to highest, and yes/no questions {key: text}."""

    name: str = "imported"
    lowest: int = 1
    highest: int = 7
    flags: dict[str, str] = Field(default_factory=dict)
    instructions: str = ""


@dataclass
class Imported:
    """The items and judgements of a project file, what it asks, and how much was lost, by reason."""

    form: Form
    items: list[Item] = field(default_factory=list)
    judgements: list[Judgement] = field(default_factory=list)
    lost: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


class Numbers:
    """A number for each labeler, in the order in which they are first met; who they are is not kept."""

    def __init__(self) -> None:
        self._given: dict[Hashable, int] = {}

    def of(self, who: Hashable) -> int:
        """Return the labeler's number."""
        return self._given.setdefault(who, len(self._given))


def page_order(item: Item) -> list[int]:
    """Return the numbers k of the responses in the tool's order, so that no model is always first."""
    order = list(range(len(item.responses)))
    random.Random(f"page of item {item.number}").shuffle(order)
    return order


def by_number(by_place: Sequence[Value], order: Sequence[int]) -> list[Value]:
    """Return values by the number k of their response, from values by its place on the page: order[place] = k."""
    values = dict(zip(order, by_place, strict=True))
    return [values[k] for k in range(len(order))]


def order_in(facts: Mapping[str, Any], size: int) -> list[int]:
    """Return the order that `facts_of` has kept; for a project of someone else's, that of the file."""
    order = facts.get("order")
    if isinstance(order, list) and all(type(one) is int for one in order) and sorted(order) == list(range(size)):
        return order
    return list(range(size))


def facts_of(item: Item, models: bool) -> dict[str, Any]:
    """Return what an item has besides its texts; `models`: also which model gave each response."""
    facts: dict[str, Any] = {"item": item.number, "kind": item.kind, "split": item.split, "columns": item.columns}
    facts["order"] = page_order(item)
    facts["ids"] = [response.ids for response in item.responses]
    facts["ended"] = [response.ended for response in item.responses]
    return facts | ({"models": [response.source for response in item.responses]} if models else {})


def item_of(number: int, prompt: Text, texts: Sequence[Text], facts: Mapping[str, Any]) -> Item:
    """Return an item of another tool's project; what `facts_of` has kept is restored.

    Raises:
        ValueError: the values do not make an item.
    """
    size = len(texts)

    def each(name: str, default: Any) -> list[Any]:
        values = facts.get(name)
        return values if isinstance(values, list) and len(values) == size else [default] * size

    rows = zip(texts, each("models", None), each("ids", None), each("ended", True), strict=True)
    responses = [Response(text=text, source=source, ids=ids, ended=ended) for text, source, ids, ended in rows]
    kept = {name: facts[name] for name in ("kind", "split", "columns") if facts.get(name) is not None}
    return Item(number=number, prompt=prompt, responses=responses, **kept)


def judgement_of(
    item: int,
    labeler: int,
    shown: Sequence[int],
    *,
    ranks: Sequence[float] = (),
    ratings: Sequence[int | None] = (),
    flags: Sequence[Mapping[str, bool]] = (),
    note: str = "",
    reason: str | None = None,
    seconds: float = 0.0,
) -> Judgement:
    """Return a judgement; ranks become dense, a `reason` makes it a skip. The time of the tool's answer is not kept."""
    size = len(shown)
    return Judgement(
        labeler=labeler,
        item=item,
        repeat=0,
        shown=list(shown),
        ranks=[] if reason is not None else places_of([-rank for rank in ranks]),
        ratings=list(ratings) or [None] * size,
        flags=[dict(one) for one in flags] or [{}] * size,
        note=note,
        skipped=reason is not None,
        reason=reason or "",
        seconds=seconds,
        at=0.0,
    )


def choices_of(flags: Mapping[str, bool], form: Form) -> list[str] | None:
    """Return the choices of a question "which of these apply": the flags that are yes, or `NONE`.

    None: some flags are not answered, which such a question cannot say.
    """
    if not form.flags or any(key not in flags for key in form.flags):
        return None
    return [key for key in form.flags if flags[key]] or [NONE]


def flags_of(choices: Sequence[str], form: Form) -> dict[str, bool]:
    """Return the answers behind the choices that a labeler has submitted."""
    return {key: key in choices for key in form.flags}


def squeezed(name: str) -> str:
    """Return a name in small letters and digits alone, so that `Response 1` is `response_1`."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def is_none(choice: str) -> bool:
    """Whether a choice says that no other one applies."""
    return squeezed(choice) in (squeezed(NONE), "none", "noneofabove", "noneoftheabove", "nothing", "ok", "noissues")


def key_of(name: str) -> str:
    """Return a name as the key of a yes/no question; names that differ in more than case and spaces differ in keys."""
    key = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    key = key if key[:1].isalpha() else f"flag_{key}".strip("_")
    if _PLAIN.fullmatch(name) and len(key) <= 64:
        return key
    return f"{key[:55]}_{sha256(name.encode(errors='replace')).hexdigest()[:8]}"


def response_names(names: Sequence[str]) -> list[str]:
    """Return which of some names are those of responses: two or more that differ in a number or letter at the end."""
    stems: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(.*?[a-z])[-_ .]*(?:([0-9]+)|[-_ .]([a-i]))", name.lower())
        if match and any(word in match[1] for word in _RESPONSES):
            stems.setdefault(squeezed(match[1]), []).append(name)
    found = next((group for group in stems.values() if len(group) > 1), [])
    if not found and {"chosen", "rejected"} <= {*names}:
        return ["chosen", "rejected"]
    return found


def prompt_name(names: Sequence[str], responses: Sequence[str]) -> str | None:
    """Return which name is that of the prompt: one with such a word, else the only one that is no response's."""
    others = [name for name in names if name not in responses]
    for word in _PROMPTS:
        if found := next((name for name in others if word in squeezed(name)), None):
            return found
    return others[0] if len(others) == 1 else None


def place_of(name: str, responses: Sequence[str], *, first: int | None = None) -> int | None:
    """Return the place of the response that a question or choice is about, by its name; None if it names none.

    Args:
        responses: the names of the responses. first: the number of the first one, where numbers stand for them.
    """
    short = squeezed(name)
    for place, response in enumerate(responses):
        if short == squeezed(response):
            return place
    inside = [place for place, response in enumerate(responses) if squeezed(response) in short]
    if len(inside) == 1:
        return inside[0]
    match = re.search(r"(?:([0-9]+)|(?:^|[-_ ])([a-i]))$", name.strip().lower())
    if match is None:
        return None
    place = int(match[1]) - (1 if first is None else first) if match[1] else ord(match[2]) - ord("a")
    return place if 0 <= place < len(responses) else None


def ranks_of_choice(choice: str, responses: Sequence[str]) -> list[int] | None:
    """Return the ranks behind one choice: the response that it names is the best, the others tie; or all tie."""
    if squeezed(choice) in _TIES:
        return [1] * len(responses)
    if len(responses) == 2 and squeezed(choice) in ("left", "right"):
        place: int | None = int(squeezed(choice) == "right")
    else:
        place = place_of(choice, responses)
    return None if place is None else [1 if k == place else 2 for k in range(len(responses))]


def free_number(facts: Mapping[str, Any], taken: Collection[int]) -> int:
    """Return the number of an item: the one that it had before, if it is free, else the next one."""
    number = facts.get("item")
    if type(number) is int and number >= 0 and number not in taken:
        return number
    return max(taken, default=-1) + 1


def ranks_of_ratings(ratings: Sequence[int | None]) -> list[int] | None:
    """Return the ranks by grades, if all responses have one."""
    grades = [grade for grade in ratings if grade is not None]
    return places_of(grades) if grades and len(grades) == len(ratings) else None


def read_json(path: Path) -> Any:
    """Return the JSON value of a file.

    Raises:
        DataError, BadInput: it cannot be read, or is no JSON.
    """
    try:
        if path.stat().st_size > MOST_BYTES:
            raise BadInput(f"{path}: {path.stat().st_size} bytes, expected at most {MOST_BYTES}; split the file")
        found = decode_json(path.read_bytes().decode("utf-8-sig"))
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair could not be written again
        return found
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); expected a file of the project") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not JSON in UTF-8 ({first_line(error)}); export the project again") from None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .json, .jsonl or .parquet file.

    Raises:
        DataError: some cannot be read.
    """
    faults: list[Any] = []
    rows = [row for _, row in rows_in(path, str(path), faults)]
    if faults:
        raise DataError([item.fault for item in faults])
    try:
        json.dumps(rows, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise BadInput(f"{path}: {first_line(error)}; expected text in UTF-8") from None
    return rows


def why(error: Exception) -> str:
    """Return in a few words why values made no item."""
    if isinstance(error, ValidationError):
        fault = error.errors()[0]
        return f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
    return f"no {error}" if isinstance(error, KeyError) else first_line(error)
