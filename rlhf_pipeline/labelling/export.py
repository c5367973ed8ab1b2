"""Judgements as rows that stages train on: rankings, pairs, ratings and labels.

No row has a labeler's name or number, a note or a time, and the order of an item's rows does not depend on who labelled
it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from rlhf_pipeline.data.formats import SCHEMAS
from rlhf_pipeline.data.kinds import places_of, untied_pairs
from rlhf_pipeline.disk import storage
from rlhf_pipeline.errors import BadInput, did_you_mean
from rlhf_pipeline.labelling.kinds import Item, Judgement, Response
from rlhf_pipeline.registry.references import Version
from rlhf_pipeline.registry.store import Registry

Kind = Literal["rankings", "pairs", "ratings", "labels"]
Several = Literal["mean", "each"]
Row = dict[str, Any]

BAD = {
    "fails_instruction": True,
    "inappropriate": True,
    "hallucination": True,
    "sexual": True,
    "violent": True,
    "encourages_harm": True,
    "denigrates": True,
}
"""Answers to the project's own questions that make a response bad for KTO, unless others are named."""
_READ = {name for schema in SCHEMAS for name in (*schema.columns, *schema.also)} | {"label", "margin", "split"}
MEAN = (
    "their mean rank (Borda) is one row: it has less noise than one labeler's label, so a reward model's scores lie "
    "further apart, and its probabilities are not those of a single labeler"
)
EACH = (
    "one row for each: where they contradict each other, both rows stay, so a reward model's probabilities are those "
    "of a labeler drawn at random"
)


@dataclass
class Exported:
    """Rows of one kind, what was left out, by reason, and what a reader should know."""

    kind: Kind
    rows: list[Row] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def export(
    items: Sequence[Item],
    judgements: Sequence[Judgement],
    kind: Kind,
    *,
    several: Several = "mean",
    bad: Mapping[str, bool] | None = None,
) -> Exported:
    """Return the judgements as rows.

    * rankings: `prompt, completions, ranks, ended`, and token ids where prompt and all responses have them;
    * pairs: `prompt, chosen, rejected`, for each two responses that are not tied;
    * ratings: `prompt, response, rating`, and for each yes/no question the share of labelers who said yes;
    * labels: `prompt, completion, label`, true for a good response, as KTO reads it.

    Args:
        several: what several labelers of an item become: the mean, or a row for each of them. A mean rank is Borda's
            (tied responses share the mean of their places); a mean label is the majority's.
        bad: {question: the answer that makes a response bad}, for labels; default: those of `BAD` that were asked.

    Raises:
        BadInput: `bad` names a question that nobody answered, or ratings are wanted from each labeler.
    """
    found = Exported(kind)
    given = list(_by_item(items, judgements, found.left_out))
    shared = sum(len(judged) > 1 for _, judged in given)
    if shared:
        found.notes.append(f"{shared} items have several labelers: {MEAN if several == 'mean' else EACH}")
    if any(item.kind == "arena" for item, _ in given):
        found.notes.append("rows of an arena: do not compare models on these prompts once they have trained on them")
    if kind == "ratings":
        found.rows = list(_ratings(given, several, found))
    elif kind == "labels":
        found.rows = list(_labels(given, several, _answers(given, bad), found.left_out))
    else:
        ranked = [(item, ranks) for item, judged in given for ranks in _orders(judged, several)]
        make = _ranking if kind == "rankings" else _pairs
        found.rows = [row for item, ranks in ranked for row in make(item, ranks, found.left_out)]
    found.left_out = +found.left_out
    return found


def midranks(ranks: Sequence[int]) -> list[int]:
    """Return twice the place of each response in an order with ties, 2 for the best: tied ones share their mean place.

    Response k has the place 1 + #better + #tied others / 2, so that K + 1 - place is its Borda count with half a
    point for a tie, plus 1/2 (Emerson 2013, The original Borda count and partial voting).
    """
    return [1 + sum(2 * (other < rank) + (other == rank) for other in ranks) for rank in ranks]


def mean_ranks(orders: Sequence[Sequence[int]]) -> list[int]:
    """Return the ranks by the mean place over several orders of the same responses; equal means are ties."""
    totals = [sum(places) for places in zip(*map(midranks, orders), strict=True)]
    return places_of([-total for total in totals])


def read_answer(text: str) -> tuple[str, bool]:
    """Read `question` or `question=no`: the answer that makes a response bad.

    Raises:
        BadInput: the answer is neither yes nor no.
    """
    name, _, answer = text.partition("=")
    if answer not in ("", "yes", "no"):
        raise BadInput(f"--bad {text}: found {answer!r}, expected QUESTION, QUESTION=yes or QUESTION=no")
    return name, answer != "no"


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSONL; the file appears whole or not at all.

    Raises:
        BadInput: the path is a folder or a device, which a file would replace.
    """
    if path.exists() and not path.is_file():
        raise BadInput(f"{path}: found a {'folder' if path.is_dir() else 'device'}; expected the path of a file")
    storage.replace_text(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def publish_rows(
    registry: Registry,
    name: str,
    exported: Exported,
    *,
    project: str,
    several: Several = "mean",
    bad: Mapping[str, bool] | None = None,
    **fields: Any,
) -> Version:
    """Publish rows as `collected:NAME`, which stages and rounds read.

    Args:
        project: the labelling project that they come from.
        fields: further fields of the manifest, such as parents, tokenizer_digest and seed.

    Raises:
        BadInput: there are no rows, or the name is not allowed.
    """
    if not exported.rows:
        raise BadInput(f"{project}: no {exported.kind} to publish ({_said(exported.left_out)}); label some items first")
    config: Row = {"judge": f"people:{project}", "as": exported.kind, "several": several}
    config |= {"bad": dict(bad)} if bad is not None else {}
    rows, options = (sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for part in (exported.rows, config))
    splits = Counter(row["split"] for row in exported.rows if "split" in row)
    left_out = dict(sorted(exported.left_out.items()))
    count = len(exported.rows)
    metrics = {"records": count, "dropped": left_out, "by_split": splits, "judge": config["judge"]}
    source = {"source": config["judge"], "digest": rows, "rows": count, "dropped": left_out}
    given = {"config": config, "config_digest": options, "data": [source], "metrics": metrics, "moves_optimum": {}}
    return registry.publish_data(name, exported.rows, **given | fields)


def _by_item(
    items: Sequence[Item], judgements: Sequence[Judgement], left_out: Counter[str]
) -> Iterator[tuple[Item, list[Judgement]]]:
    """Yield the items with the first finished judgement of each labeler; count the others."""
    first: dict[tuple[int, int], Judgement] = {}
    for judgement in sorted(judgements, key=lambda one: one.repeat):
        if judgement.skipped:
            left_out["skipped"] += 1
        elif (judgement.item, judgement.labeler) in first:
            left_out["repeated"] += 1
        else:
            first[judgement.item, judgement.labeler] = judgement
    judged: dict[int, list[Judgement]] = {}
    for judgement in first.values():
        judged.setdefault(judgement.item, []).append(judgement)
    for item in items:
        if item.number in judged:
            yield item, judged[item.number]
        else:
            left_out["unlabelled"] += 1


def _orders(judged: Sequence[Judgement], several: Several) -> list[list[int]]:
    """Return the ranks of an item: the mean's, or those of each labeler in an order of their own."""
    orders = [judgement.ranks for judgement in judged]
    return [mean_ranks(orders)] if several == "mean" else sorted(orders)


def _ranking(item: Item, ranks: Sequence[int], left_out: Counter[str]) -> Iterator[Row]:
    ids = _ids(item)
    kept = [k for k, response in enumerate(item.responses) if ids is not None or not _is_empty(response)]
    left_out["empty_response"] += len(item.responses) - len(kept)
    if len(kept) < 2:
        left_out["single_response"] += 1
        return
    row = _row(item, ids) | {"completions": [item.responses[k].text for k in kept]}
    if ids is not None:
        row["completion_ids"] = [ids[1][k] for k in kept]
    row["ended"] = [item.responses[k].ended for k in kept]
    yield row | {"ranks": places_of([-ranks[k] for k in kept])} | _rest(item)


def _pairs(item: Item, ranks: Sequence[int], left_out: Counter[str]) -> Iterator[Row]:
    ids = _ids(item)
    left_out["tied_pair"] += sum(ranks[i] == ranks[j] for i, j in combinations(range(len(ranks)), 2))
    for better, worse in untied_pairs([-rank for rank in ranks]):
        chosen, rejected = item.responses[better], item.responses[worse]
        if ids is None and (_is_empty(chosen) or _is_empty(rejected)):
            left_out["empty_response"] += 1
            continue
        if (chosen.text, chosen.ids, chosen.ended) == (rejected.text, rejected.ids, rejected.ended):
            left_out["identical_pair"] += 1
            continue
        row = _row(item, ids)
        for side, k in (("chosen", better), ("rejected", worse)):
            row[side] = item.responses[k].text
            if ids is not None:
                row[f"{side}_ids"] = ids[1][k]
            row[f"{side}_ended"] = item.responses[k].ended
        yield row | _rest(item)


def _ratings(given: Sequence[tuple[Item, Sequence[Judgement]]], several: Several, found: Exported) -> Iterator[Row]:
    """Yield the mean grade of each response, over the labelers of its item who gave any.

    A response that one of them did not grade is left out: its mean would be of other labelers than those of the others.
    """
    if several == "each" and any(len(judged) > 1 for _, judged in given):
        raise BadInput(
            "ratings of each labeler: found several labelers of one item, expected their mean (--several mean): grades "
            "of different labelers to one prompt would be ranked against each other"
        )
    names = sorted({name for _, judged in given for judgement in judged for flags in judgement.flags for name in flags})
    for item, judged in given:
        graders = [judgement for judgement in judged if any(value is not None for value in judgement.ratings)]
        for k, response in enumerate(item.responses):
            values = [value for judgement in graders if (value := judgement.ratings[k]) is not None]
            if not values or len(values) < len(graders):
                found.left_out["not_rated"] += 1
                continue
            if _is_empty(response):
                found.left_out["empty_response"] += 1
                continue
            row: Row = {"prompt": item.prompt, "response": response.text, "rating": fmean(values)}
            row["ended"] = response.ended
            for name in names:
                answers = [judgement.flags[k][name] for judgement in judged if name in judgement.flags[k]]
                row[_column(name, names)] = fmean(answers) if answers else None
            # What labelers answered counts, whatever the source said under the same name.
            yield row | {name: value for name, value in _rest(item).items() if name not in row}


def _labels(
    given: Sequence[tuple[Item, Sequence[Judgement]]],
    several: Several,
    bad: Mapping[str, bool],
    left_out: Counter[str],
) -> Iterator[Row]:
    for item, judged in given:
        ids = _ids(item)
        for k, response in enumerate(item.responses):
            verdicts = [label for judgement in judged if (label := _is_good(judgement.flags[k], bad)) is not None]
            if not verdicts:
                left_out["flags_not_answered"] += 1
                continue
            if ids is None and _is_empty(response):
                left_out["empty_response"] += 1
                continue
            if several == "mean":
                good = 2 * sum(verdicts) - len(verdicts)
                if not good:
                    left_out["no_majority"] += 1
                verdicts = [good > 0] if good else []
            row = _row(item, ids) | {"completion": response.text, "ended": response.ended}
            if ids is not None:
                row["completion_ids"] = ids[1][k]
            for label in sorted(verdicts):
                yield row | {"label": label} | _rest(item)


def _is_good(flags: Mapping[str, bool], bad: Mapping[str, bool]) -> bool | None:
    """Whether a response is good: no answer is a bad one. None: none is, but a question was not answered."""
    if any(flags.get(name) is answer for name, answer in bad.items()):
        return False
    return True if all(name in flags for name in bad) else None


def _answers(given: Sequence[tuple[Item, Sequence[Judgement]]], bad: Mapping[str, bool] | None) -> Mapping[str, bool]:
    """Return the answers that make a response bad: those that are named, else those of `BAD` that were asked."""
    asked = {name for _, judged in given for judgement in judged for flags in judgement.flags for name in flags}
    there = f"answered: {', '.join(sorted(asked)) or 'none'}"
    if bad is None:
        bad = {name: answer for name, answer in BAD.items() if name in asked}
        if not bad and given:
            raise BadInput(f"labels: found no question that makes a response bad ({there}); name some with --bad")
    elif unknown := sorted(set(bad) - asked):
        hint = did_you_mean(unknown[0], asked)
        raise BadInput(f"--bad {unknown[0]}: nobody answered this question; {there}{'; ' + hint if hint else ''}")
    return bad


def _is_empty(response: Response) -> bool:
    text = response.text if isinstance(response.text, str) else response.text[-1]["content"]
    return not text.strip()


def _ids(item: Item) -> tuple[list[int], list[list[int]]] | None:
    """Return the token ids of the prompt and of all responses, if all are known."""
    prompt = item.columns.get("prompt_ids")
    ids = [response.ids for response in item.responses if response.ids is not None]
    return None if prompt is None or len(ids) < len(item.responses) else (prompt, ids)


def _row(item: Item, ids: tuple[list[int], list[list[int]]] | None) -> Row:
    return {"prompt": item.prompt} | ({} if ids is None else {"prompt_ids": ids[0]})


def _rest(item: Item) -> Row:
    """Return the split, and the columns of the item's source that no format reads as something else."""
    rest = {name: value for name, value in item.columns.items() if name not in _READ}
    return rest | ({} if item.split is None else {"split": item.split})


def _column(name: str, names: Collection[str]) -> str:
    """Return the column of a question: its key, or `question_KEY` if formats read a column of this name."""
    if name not in _READ | {"rating", "ended"}:
        return name
    column = f"question_{name}"
    while column in names:
        column = f"question_{column}"
    return column


def _said(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in sorted(counts.items()) if count) or "none left out"
