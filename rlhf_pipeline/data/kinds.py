"""Convert records to the kind that a stage needs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import combinations

from rlhf_pipeline.data.files import RowFault, row_fault
from rlhf_pipeline.data.records import TEMPLATE_VALUES, Record, messages, plain
from rlhf_pipeline.errors import DataError, Fault

# The possible conversions. A preference is a whole pair or ranking; an order is a preference without ties.
MAKES = {
    "text": ("text", "demonstration"),
    "prompt": ("prompt",),
    "labelled": ("prompt", "labelled"),  # a completion that may be bad is not a demonstration
    "demonstration": ("text", "prompt", "demonstration"),
    "pair": ("text", "prompt", "demonstration", "pair", "preference", "order", "labelled"),
    "ranking": ("text", "prompt", "demonstration", "pair", "ranking", "preference", "order"),
}


def as_kind(records: list[Record], kind: str, source: str = "") -> tuple[list[Record], Counter[str]]:
    """Convert records to `kind`; also return how many were dropped, by reason.

    "demonstration" takes the best completion of pairs and rankings; a text stays a text and is trained on whole. "pair"
    takes all untied pairs of a ranking. "preference" keeps pairs and rankings whole, except rankings in which all are
    tied. "order" also drops rankings with any tie: see `tied_rows`. "prompt" gives each prompt once. "labelled" makes a
    good and a bad response of each pair.

    Raises:
        DataError: some records cannot be converted to `kind`.
    """
    require_kinds({record.kind for record in records}, kind, source or (records[0].where if records else ""))
    dropped: Counter[str] = Counter()
    if kind == "prompt":
        first: dict[str, Record] = {}
        for record in records:
            first.setdefault(record.prompt_key, record)
        dropped["duplicate_prompt"] = len(records) - len(first)
        return [_prompt(record) for record in first.values()], +dropped
    made: list[Record] = []
    for record in records:
        if record.kind == kind or record.kind == "text":
            made.append(record)
        elif kind in ("preference", "order"):
            prefers = _says(record, ties=kind == "preference")
            made += [record] if prefers else []
            dropped["tied_ranking"] += not prefers and kind == "preference"
        elif kind == "labelled":
            made += [_pick(record, kind, place) for place in (0, 1)]
        elif kind == "pair":
            pairs = _pairs(record)
            made += pairs
            dropped["tied_ranking"] += not pairs
        else:
            demonstration = record if record.kind == "demonstration" else _best(record)
            made.append(demonstration if kind == "demonstration" else _as_text(demonstration))
    return made, +dropped


def require_kinds(kinds: Iterable[str], kind: str, where: str) -> None:
    """Check that records of some kinds can be converted to `kind`.

    Raises:
        DataError: they cannot.
    """
    if wrong := sorted(name for name in set(kinds) if kind not in MAKES[name]):
        able = ", ".join(name for name, made in MAKES.items() if kind in made)
        fix = "keep only the rows whose label is true, without the column label, or use `rlhf dpo` with loss_type kto"
        fix = fix if "labelled" in wrong else ""
        found = f"{where} holds records of kind {', '.join(wrong)}"
        raise DataError(Fault("", found, f"for this stage: {able}", fix or "choose another source"))


def tied_rows(records: Sequence[Record]) -> list[RowFault]:
    """Return a fault for each ranking in which two completions are equally good: an order has no ties."""
    faults = []
    for record in records:
        if record.kind == "ranking" and not _says(record, ties=False):
            values, measure = goodness(record), "score" if "scores" in record.extra else "rank"
            i, j = next((i, j) for i, j in combinations(range(len(values)), 2) if values[i] == values[j])
            found = f"'completions[{i}]' and 'completions[{j}]' have the same {measure}"
            fix = "break the tie, drop the row, or use another loss_type, which ignores tied pairs"
            faults.append(row_fault(record.where, "tied_ranking", found, "an order: plackett_luce has no ties", fix))
    return faults


def _says(record: Record, ties: bool) -> bool:
    """Whether a record has a preference; without `ties`, whether it orders all completions."""
    return says(goodness(record), ties)


def says(values: Sequence[float], ties: bool) -> bool:
    """Whether some values differ; without `ties`, whether all do."""
    different = len(set(values))
    return different > 1 if ties else different == len(values)


def ranks_of(record: Record) -> list[int]:
    """Return the rank of each completion of a ranking: 1 for the best, equal ranks for ties."""
    return places_of(goodness(record))


def places_of(values: Sequence[float]) -> list[int]:
    """Return the rank of each value: 1 for the highest, equal ranks for equal values."""
    levels = sorted(set(values), reverse=True)
    places = {value: rank for rank, value in enumerate(levels, start=1)}
    return [places[value] for value in values]


def goodness(record: Record) -> list[float]:
    """Return one number per completion, higher is better: the score, or the negated rank."""
    if record.kind == "pair":
        return [1.0, 0.0]
    if record.kind == "labelled":
        return [float(record.extra["label"])]
    if record.kind != "ranking":
        return [0.0] * len(record.completions)
    if "scores" in record.extra:
        return list(record.extra["scores"])
    return [-rank for rank in record.extra["ranks"]]


def _pick(record: Record, kind: str, *indices: int) -> Record:
    ids = record.completion_ids
    label = {"label": indices == (0,)} if kind == "labelled" else {}  # of a pair, whose first response is preferred
    return replace(
        record,
        kind=kind,
        completions=tuple(record.completions[i] for i in indices),
        ended=tuple(record.ended[i] for i in indices),
        completion_ids=None if ids is None else tuple(ids[i] for i in indices),
        extra={name: record.extra[name] for name in TEMPLATE_VALUES if name in record.extra} | label,
    )


def picked(record: Record, kind: str, *completions: int) -> Record:
    """Return a record with some of its completions as a record of another kind; a prompt has none of them."""
    return _prompt(record) if kind == "prompt" else _pick(record, kind, *completions)


def _prompt(record: Record) -> Record:
    """Return the prompt of a record; of a pair, the two sides are kept as columns, as reward functions expect them."""
    sides = dict(zip(("chosen", "rejected"), record.completions)) if record.kind == "pair" else {}
    return replace(_pick(record, "prompt"), columns={**record.columns, **sides})


def _best(record: Record) -> Record:
    values = goodness(record)
    return _pick(record, "demonstration", values.index(max(values)))


def _pairs(record: Record) -> list[Record]:
    ordered = untied_pairs(goodness(record))
    return [_pick(record, "pair", winner, loser) for winner, loser in ordered]


def untied_pairs(values: Sequence[float]) -> list[tuple[int, int]]:
    """Return the pairs (i, j) with value i above value j."""
    pairs = combinations(range(len(values)), 2)
    return [(i, j) if values[i] > values[j] else (j, i) for i, j in pairs if values[i] != values[j]]


def _as_text(record: Record) -> Record:
    """Join prompt and completion; messages stay messages, so that the chat template renders them together."""
    prompt, completion = record.prompt, record.completions[0]
    joined = prompt + plain(completion) if isinstance(prompt, str) else (*messages(prompt), *messages(completion))
    ids = None
    if record.prompt_ids is not None and record.completion_ids is not None:
        ids = (record.prompt_ids + record.completion_ids[0],)
    return replace(record, kind="text", prompt=None, completions=(joined,), prompt_ids=None, completion_ids=ids)
