"""What `rlhf data check` and `rlhf data preview` say about a source, before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.data.formats import count_reasons
from rlhf_pipeline.data.kinds import as_kind
from rlhf_pipeline.data.load import RecordSet, read_records, records_digest
from rlhf_pipeline.data.records import Record, plain
from rlhf_pipeline.data.render import render
from rlhf_pipeline.data.splits import FRACTIONS, assign_splits, carries_splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_FAULTS = 20
QUANTILES = {"median": 0.5, "p95": 0.95, "max": 1.0}


def check_source(
    source: str,
    *,
    config: str | None = None,
    home: Path | None = None,
    base_dir: Path | None = None,
    fractions: Mapping[str, float] = FRACTIONS,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> dict[str, Any]:
    """Describe a source: its format, faults, splits, duplicates, lengths; never its text.

    Lengths are in tokens where a tokenizer or the rows' own ids are at hand, else in characters.

    Raises:
        DataError: the source cannot be read, or no row of it can be used.
    """
    found = read_records(source, config=config, home=home, base_dir=base_dir, skip_bad_rows=True)
    records = found.records
    splits = assign_splits(records, fractions, found.source)
    unit, lengths = _lengths(records, tokenizer)
    return {
        "source": found.source,
        "format": found.format,
        "digest": records_digest(records),
        "rows": found.rows,
        "usable": len(records),
        "kinds": dict(Counter(record.kind for record in records)),
        "faulty_rows": len({item.fault.where for item in found.faults}),
        "faults": count_reasons(found.faults),
        "fault_list": [str(item.fault) for item in found.faults[:SHOWN_FAULTS]],
        "skipped": dict(found.skipped),
        "ties": _ties(found),
        "duplicate_prompts": len(records) - len({record.prompt_key for record in records}),
        "duplicate_rows": len(records) - len({record.canonical() for record in records}),
        "not_ended": sum(not flag for record in records for flag in record.ended),
        "splits_from": "source" if carries_splits(records, found.source) else "prompt hash",
        "splits": dict(Counter(splits)),
        "prompt_overlap": _overlap(records, splits),
        "length_unit": unit,
        "lengths": {name: _quantiles(values) for name, values in lengths.items() if values},
        "longer_wins": _longer_wins(lengths),
    }


def preview(
    source: str,
    n: int = 3,
    *,
    config: str | None = None,
    home: Path | None = None,
    base_dir: Path | None = None,
) -> list[dict[str, Any]]:
    """Return the first `n` usable records of a source as plain data, as they were understood.

    Raises:
        DataError: the source cannot be read, or no row of it can be used.
    """
    found = read_records(source, config=config, home=home, base_dir=base_dir, skip_bad_rows=True)
    return [
        {
            "where": record.where,
            "kind": record.kind,
            "split": record.split,
            "prompt": None if record.prompt is None else plain(record.prompt),
            "completions": [plain(completion) for completion in record.completions],
            "ended": list(record.ended),
            **record.extra,
        }
        for record in found.records[:n]
    ]


def _ties(found: RecordSet) -> int:
    """Count pairs of responses between which the source has no preference."""
    ties = found.skipped["identical_pair"] + count_reasons(found.faults).get("identical_pair", 0)
    for record in found.records:
        ties += record.extra.get("label_probability") == 0.5
        measures = record.extra.get("ranks", record.extra.get("scores", ()))
        ties += sum(a == b for a, b in combinations(measures, 2))
    return ties


def _overlap(records: Sequence[Record], splits: Sequence[str]) -> dict[str, int]:
    """Count the prompts that two splits share."""
    prompts: dict[str, set[str]] = {}
    for record, split in zip(records, splits):
        prompts.setdefault(split, set()).add(record.prompt_key)
    return {f"{a}/{b}": len(prompts[a] & prompts[b]) for a, b in combinations(sorted(prompts), 2)}


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
    ids = tokenizer(
        [rendered.prompt, *rendered.completions],
        add_special_tokens=False,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return len(ids[0]), [len(tokens) for tokens in ids[1:]]


def _quantiles(values: list[int]) -> dict[str, int]:
    """Return quantiles by the nearest rank."""
    ordered = sorted(values)
    return {
        name: ordered[max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1)] for name, share in QUANTILES.items()
    }


def _longer_wins(lengths: Mapping[str, list[int]]) -> float | None:
    """Return how often the longer response is the preferred one; equal lengths count one half."""
    pairs = list(zip(lengths["chosen"], lengths["rejected"]))
    if not pairs:
        return None
    return sum((won > lost) + 0.5 * (won == lost) for won, lost in pairs) / len(pairs)
