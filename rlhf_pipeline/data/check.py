"""Describe and preview a source, for `rlhf data check` and `rlhf data preview`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline.data.borders import token_ids
from rlhf_pipeline.data.encode import BATCH, Counts
from rlhf_pipeline.data.formats import RecordSet, count_reasons
from rlhf_pipeline.data.kinds import as_kind
from rlhf_pipeline.data.load import NO_LIMITS, blank_prompts, read_records, records_digest
from rlhf_pipeline.data.marks import marked_rows
from rlhf_pipeline.data.overlap import duplicates, leaked_rows, repeats, shared_prompts
from rlhf_pipeline.data.preferences import MARGIN
from rlhf_pipeline.data.records import Record, plain, shared_length
from rlhf_pipeline.data.render import render
from rlhf_pipeline.data.shown import token_rows
from rlhf_pipeline.data.splits import FRACTIONS, assign_splits, carries_splits
from rlhf_pipeline.data.templates import template_of
from rlhf_pipeline.data.tokenize import Example, examples_from
from rlhf_pipeline.data.tokenizers import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_pipeline.config.lengths import Lengths

SHOWN_FAULTS = 20
QUANTILES = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


def describe(
    found: RecordSet, *, tokenizer: PreTrainedTokenizerBase | None = None, limits: Lengths | None = None
) -> dict[str, Any]:
    """Describe a source that was read with `skip_bad_rows`: its format, faults, splits, duplicates, lengths; no text.

    Lengths are in tokens if a tokenizer or the rows' own ids are available, else in characters. A tokenizer adds the
    texts that differ after encoding and decoding; `limits` add what the length policy cuts or drops.

    Raises:
        DataError: no row of the source can be used.
    """
    digest = records_digest(found.records)  # the digest of a stage that drops bad rows
    if tokenizer is None:
        faults = blank_prompts(found)
    else:
        limit, own = limits or NO_LIMITS, found.tokenizer_digest
        examples, counts = examples_from(found.records, tokenizer, limit, source_tokenizer_digest=own)
        faults = counts.faults
    found = found.without(faults)  # the rows that a stage refuses after reading: empty prompts, text without tokens
    records = found.records
    splits = assign_splits(records, FRACTIONS, found.source)
    unit, lengths = _lengths(records, tokenizer)
    by_split = leaked_rows(records, splits) if carries_splits(records, found.source) else {}
    leaked = [item for items in by_split.values() for item in items]
    measured: dict[str, Any] = {}
    if tokenizer is not None:
        measured["round_trip"] = _round_trip(records, tokenizer)
        named = {**counts.rows, "control_tokens_in_text": marked_rows(records, tokenizer)}
        measured["tokens"] = {
            reason: {"rows": len(rows), "first": rows[:SHOWN_FAULTS]} for reason, rows in named.items() if rows
        }
        if limits is not None:
            measured["length_policy"] = _length_policy(examples, counts, limits)
    return {
        "source": found.source,
        "format": found.format,
        "digest": digest,
        "rows": found.rows,
        "usable": len(records),
        "kinds": dict(Counter(record.kind for record in records)),
        "faulty_rows": len({item.fault.where for item in found.faults}),
        "faults": count_reasons(found.faults),
        "fault_list": [str(item.fault) for item in found.faults[:SHOWN_FAULTS]],
        "skipped": dict(found.skipped),
        "ties": _ties(found),
        "win_graphs": _win_graphs(records),
        "duplicate_prompts": len(records) - len({record.prompt_key for record in records}),
        **duplicates(records),
        "duplicate_list": repeats(records, SHOWN_FAULTS),
        "not_ended": sum(not flag for record in records for flag in record.ended),
        "splits_from": "source" if carries_splits(records, found.source) else "prompt hash",
        "splits": dict(Counter(splits)),
        "split_prompts": dict(Counter(split for _, split in {(r.prompt_key, s) for r, s in zip(records, splits)})),
        "unread_column": found.unread,
        "not_read": list(found.not_read),
        "contradicted": found.against["contradicted"],
        "notes": found.notes(template_of(tokenizer)),
        "labels": dict(Counter(str(record.extra["label"]).lower() for record in records if "label" in record.extra)),
        "margins": _margins([record.extra[MARGIN] for record in records if MARGIN in record.extra]),
        "prompt_overlap": shared_prompts(records, splits),
        "similar_prompt_overlap": shared_prompts(records, splits, near=True),
        "leaked_rows": len(leaked),
        "leaks": count_reasons(leaked),
        "leak_list": [str(item.fault) for item in leaked[:SHOWN_FAULTS]],
        "length_unit": unit,
        "lengths": {name: _quantiles(values) for name, values in lengths.items() if values},
        "longer_wins": _longer_wins(lengths),
        **measured,
    }


def preview(
    source: str,
    n: int = 3,
    *,
    config: str | None = None,
    columns: Sequence[tuple[str, str]] = (),
    home: Path | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_on: str = "all_assistant",
) -> list[dict[str, Any]]:
    """Return the first `n` usable records of a source as plain data, after parsing; arguments as for `read_records`.

    Args:
        tokenizer: adds `tokens` to each row: see `token_rows`. train_on: as in the config of SFT.

    Raises:
        DataError: the source cannot be read, or no row of it can be used.
    """
    found = read_records(source, config, columns=tuple(columns), home=home, skip_bad_rows=True)
    first = found.records[:n]
    tokens: list[dict[str, Any]] = [{} for _ in first]
    if tokenizer is not None:
        own = found.tokenizer_digest
        made = token_rows(first, tokenizer, NO_LIMITS, digest=own, train_on=train_on)
        tokens = [{"tokens": row} for row in made]
    return [
        {
            "where": record.where,
            "kind": record.kind,
            "split": record.split,
            "prompt": None if record.prompt is None else plain(record.prompt),
            "completions": [plain(completion) for completion in record.completions],
            "ended": list(record.ended),
            **record.extra,
            **row,
        }
        for record, row in zip(first, tokens)
    ]


def _margins(values: Sequence[float]) -> dict[str, float] | None:
    """Return the number, the mean and the ends of the pairs' margins; None without any."""
    if not values:
        return None
    return {"pairs": len(values), "min": min(values), "mean": sum(values) / len(values), "max": max(values)}


def _ties(found: RecordSet) -> int:
    """Count pairs of responses without a preference."""
    ties = found.skipped["tied_pair"] + found.skipped["identical_pair"] + found.against["equal"]
    ties += count_reasons(found.faults).get("identical_pair", 0)
    for record in found.records:
        ties += record.extra.get("label_probability") == 0.5
        measures = record.extra.get("ranks", record.extra.get("scores", ()))
        ties += sum(a == b for a, b in combinations(measures, 2))
    return ties


def _win_graphs(records: Sequence[Record]) -> dict[str, int] | None:
    """Count the prompts with preferences, and those whose win graph is strongly connected; None without preferences.

    The graph of a prompt has its responses as nodes, and an edge from the better to the worse response of each labelled
    pair without a tie. The Bradley-Terry loss has a finite minimiser if and only if a path of wins leads from every
    response to every other (Ford 1957). One label per pair is never enough.
    """
    wins: dict[str, set[tuple[str, str]]] = {}
    for record in records:
        if record.kind in ("pair", "ranking"):
            pairs = as_kind([record], "pair")[0] if record.kind == "ranking" else [record]
            edges = wins.setdefault(record.prompt_key, set())
            edges.update((plain(pair.completions[0]), plain(pair.completions[1])) for pair in pairs)
    if not wins:
        return None
    return {"prompts": len(wins), "connected": sum(_strongly_connected(edges) for edges in wins.values())}


def _strongly_connected(edges: Collection[tuple[str, str]]) -> bool:
    """Whether a graph is strongly connected: one node reaches all others along the edges and against them."""
    nodes = {node for edge in edges for node in edge}
    for start, end in ((0, 1), (1, 0)):
        next_of: dict[str, set[str]] = {node: set() for node in nodes}
        for edge in edges:
            next_of[edge[start]].add(edge[end])
        seen: set[str] = set()
        waiting = [*nodes][:1]
        while waiting:
            new = next_of[waiting.pop()] - seen
            seen |= new
            waiting += new
        if seen != nodes:
            return False
    return len(nodes) > 1


def _lengths(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase | None) -> tuple[str, dict[str, list[int]]]:
    lengths: dict[str, list[int]] = {name: [] for name in ("prompt", "completion", "chosen", "rejected")}
    has_ids = all((record.prompt_ids or record.completion_ids) is not None for record in records)
    for record in records:
        pairs = as_kind([record], "pair")[0] if record.kind == "ranking" else [record]
        for item in pairs:
            names = ("chosen", "rejected") if item.kind == "pair" else ("completion",)
            prompt, completions = _measure(item, tokenizer, has_ids)
            if item.prompt is not None and item is pairs[0]:
                lengths["prompt"].append(prompt)
            for name, length in zip(names, completions):
                lengths[name].append(length)
    return "tokens" if has_ids or tokenizer else "characters", lengths


def _measure(record: Record, tokenizer: PreTrainedTokenizerBase | None, has_ids: bool) -> tuple[int, list[int]]:
    if has_ids:
        return len(record.prompt_ids or ()), [len(ids) for ids in record.completion_ids or ()]
    if tokenizer is None:
        return len(plain(record.prompt or "")), [len(plain(completion)) for completion in record.completions]
    rendered = render(record, tokenizer)
    prompt, *completions = (len(ids or ()) for ids in token_ids(tokenizer, [rendered.prompt, *rendered.completions]))
    return prompt, completions


def _round_trip(records: Sequence[Record], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Count the texts that decode(encode(text)) changes, and describe where the first of them differ."""
    count, different, spaces = 0, 0, 0
    faults: list[str] = []
    for start in range(0, len(records), BATCH):
        named = [
            (record, name, text)
            for record in records[start : start + BATCH]
            for name, text in _texts_of(record)
            if text
        ]
        count += len(named)
        for (record, name, text), ids in zip(named, token_ids(tokenizer, [text for *_, text in named])):
            if ids is None:
                place = "no token for part of it"
            else:
                back = text_of(tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                if back == text:
                    continue
                place = f"it differs after decoding from character {shared_length(text, back) + 1} on"
                if "".join(back.split()) == "".join(text.split()):  # as tokenizers by words have it
                    different, spaces = different + 1, spaces + 1
                    continue
            different += 1
            if len(faults) < SHOWN_FAULTS:
                faults.append(f"{record.where}: {name}: {place}")
    return {"texts": count, "different": different, "white_space_only": spaces, "first": faults}


def _texts_of(record: Record) -> Iterator[tuple[str, str]]:
    parts = [] if record.prompt is None else [("the prompt", record.prompt)]
    parts += [(f"completion {number}", text) for number, text in enumerate(record.completions, 1)]
    for name, part in parts:
        if isinstance(part, str):
            yield name, part
        else:
            yield from ((f"{name}, message {i}", message["content"]) for i, message in enumerate(part, 1))


def _length_policy(examples: Sequence[Example], counts: Counts, limits: Lengths) -> dict[str, Any]:
    """Return what `examples_from` drops or cuts at these limits, by reason, and the number of examples kept."""
    return {
        "max_prompt_length": limits.prompt,
        "response_length": limits.response,
        "max_length": limits.total,
        "examples": len(examples),
        "dropped": dict(sorted((+counts.dropped).items())),
        "faults": count_reasons(counts.faults),
        "cut": dict(sorted((+counts.truncated).items())),
    }


def _quantiles(values: list[int]) -> dict[str, int]:
    """Return the nearest-rank quantiles."""
    found = np.quantile(values, [*QUANTILES.values()], method="inverted_cdf")
    return dict(zip(QUANTILES, found.tolist()))


def _longer_wins(lengths: Mapping[str, list[int]]) -> float | None:
    """Return the share of pairs in which the longer response is preferred; equal lengths count one half."""
    pairs = list(zip(lengths["chosen"], lengths["rejected"]))
    if not pairs:
        return None
    return sum((won > lost) + 0.5 * (won == lost) for won, lost in pairs) / len(pairs)
