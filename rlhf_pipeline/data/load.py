"""Load the examples of a stage from a source, with a report on its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline.config.lengths import Lengths
from rlhf_pipeline.config.training import DatasetEntry
from rlhf_pipeline.data.choices import choose, ties
from rlhf_pipeline.data.encode import NEEDED, Counts
from rlhf_pipeline.data.examples import Example, join, pick, prompt_keys
from rlhf_pipeline.data.files import RowFault, by_line, row_fault
from rlhf_pipeline.data.formats import RecordSet, count_reasons
from rlhf_pipeline.data.kinds import as_kind, tied_rows
from rlhf_pipeline.data.parsed import Columns, parsed_once
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.rows import Records, blank_records, in_one_split, join_records, keep, own_splits, splits_of
from rlhf_pipeline.data.samples import lowest_examples, lowest_hashes, lowest_of
from rlhf_pipeline.data.splits import ALL, FRACTIONS, carries_splits, in_split
from rlhf_pipeline.data.stored import encodings_of
from rlhf_pipeline.data.styles import PLAIN, Style
from rlhf_pipeline.data.tokenize import examples_from, fit, tokenize
from rlhf_pipeline.errors import DataError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMITS = Lengths(2**31, 2**31, 2**32)


@dataclass(frozen=True)
class SourceReport:
    """How many rows of a source were used, dropped or cut. A row with two faults counts twice in `dropped`."""

    source: str
    format: str
    split: str
    digest: str  # SHA-256 of the split's records: their content and order, not the file's name
    source_rows: int  # in the whole source
    rows: int  # usable ones in the split
    kept: int  # examples
    dropped: dict[str, int]  # faulty or skipped rows of the whole source, and what was dropped from the split
    truncated: dict[str, int]
    role: str | None = None  # "stream": the data of a pretraining stream, not those of the stage

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for a manifest."""
        return {name: value for name, value in asdict(self).items() if name != "role" or value}

    def summary(self) -> str:
        """Return one line for the log."""
        parts = [f"{self.source} ({self.format}), split {self.split}: {self.kept} examples of {self.rows} rows"]
        named = [(name, counts) for name, counts in (("dropped", self.dropped), ("cut", self.truncated)) if counts]
        parts += [f"{name}: " + ", ".join(f"{reason} {n}" for reason, n in counts.items()) for name, counts in named]
        return "; ".join(parts)


def read_records(
    source: str,
    config: str | None = None,
    split: str | None = None,
    columns: Columns = (),
    test: str | None = None,
    *,
    home: Path | None = None,
    skip_bad_rows: bool = False,
    splits: Collection[str] | None = None,
    kind: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> RecordSet:
    """Read a source and turn its rows into records.

    Args:
        source, config, home: as for `read_source`.
        split: read this split, or all rows (all), and use them whole; None: the stage chooses among the splits.
        columns: (ours, theirs) for each column to rename.
        test: another source, whose rows are the evaluation splits.
        skip_bad_rows: drop and count faulty rows instead of refusing the source.
        splits: faults in other splits of the source's own are not reported; None: all are.
        kind, tokenizer: those of the stage, if known; empty prompts are then reported with the other faults.
        say: writes a line on the making of a store (`stored.py`).

    Raises:
        DataError: rows have faults (all are listed), or no row is usable.
    """
    found = parsed_once(str(source), config, None if split == ALL else split, columns, home, say)
    found.whole = split
    if test is not None:
        found = with_test_rows(found, parsed_once(str(test), config, None, columns, home, say))
    if not skip_bad_rows:
        blank = [] if tokenizer is None else blank_prompts(found, tokenizer, kind)
        refuse_faults(_of_splits(found, [*found.faults, *blank], splits), found.source, found.rows)
    if not found.records:
        reasons = {**count_reasons(found.faults), **found.skipped}
        none = Fault(found.source, f"no rows left of {found.rows} ({_list(reasons)})", "at least one usable row")
        raise DataError([none, *(item.fault for item in found.faults)])
    return found


def with_test_rows(found: RecordSet, test: RecordSet) -> RecordSet:
    """Return the records of a source with those of another one as its evaluation splits.

    Without splits of their own, the rows of the first are the split train, and those of the second the split test. Else
    they keep their splits, except that the second gives no training rows and replaces the splits that both have.

    Raises:
        DataError: the token ids of the two are of different tokenizers, or the second has training rows only.
    """
    if found.tokenizer_digest != test.tokenizer_digest:
        kinds = "token ids of another tokenizer, or none"
        raise DataError(Fault(test.source, f"{kinds}, unlike {found.source}", "test rows of the same tokenizer"))

    def named(one: RecordSet, split: str) -> RecordSet:
        if carries_splits(one.records, one.source):
            return one
        records = in_one_split(one.records, split)
        return replace(one, records=records, faults=[replace(item, split=split) for item in one.faults])

    first, second = named(found, "train"), named(test, "test")
    tested = {split for split in own_splits(second.records) if not str(split).startswith("train")}
    if not tested:
        raise DataError(Fault(test.source, "all of its rows are of training splits", "rows of a split for evaluation"))
    kept = keep(first.records, [split not in tested for split in splits_of(first.records)])
    added = keep(second.records, [split in tested for split in splits_of(second.records)])
    return replace(
        first,
        rows=first.rows + second.rows,
        records=join_records([kept, added]),
        faults=[item for item in first.faults if item.split not in tested]
        + [item for item in second.faults if item.split is None or item.split in tested],
        skipped=first.skipped + second.skipped,
        against=first.against + second.against,
        not_read=tuple(sorted({*first.not_read, *second.not_read})),
        template_values=first.template_names() | second.template_names(),
    )


def _of_splits(found: RecordSet, faults: Sequence[RowFault], splits: Collection[str] | None) -> Sequence[RowFault]:
    """Return the faults that concern some of a source's own splits."""
    if splits is None or ALL in splits or found.whole or not carries_splits(found.records, found.source):
        return faults
    return [item for item in faults if item.split is None or item.split in splits]


def refuse_faults(faults: Sequence[RowFault], source: str, rows: int) -> None:
    """Raise all faults of a source at once, after a count of each reason.

    Raises:
        DataError: there are faults.
    """
    faults = by_line(list(dict.fromkeys(faults)))
    if faults:
        wrong = len({item.fault.where for item in faults})
        found = f"{wrong} of {rows} rows cannot be used ({_list(count_reasons(faults))})"
        summary = Fault(source, found, fix="fix them, or set `skip_bad_rows: true` to drop them")
        raise DataError([summary, *(item.fault for item in faults)])


def blank_prompts(
    found: RecordSet, tokenizer: PreTrainedTokenizerBase | None = None, kind: str | None = None
) -> list[RowFault]:
    """Return a fault for each record of a whole source whose prompt is empty or white space.

    Args:
        tokenizer: decides which prompts are empty: one with a BOS token accepts an empty prompt, and some have tokens
            for white space. Without a tokenizer, every empty or white-space prompt is a fault, unless it has token ids
            from the source's own tokenizer.
        kind: kind of record that the stage needs; "text" needs no prompt.
    """
    blank = blank_records(found.records)
    if not blank or kind == "text":
        return []
    digest = found.tokenizer_digest
    if tokenizer is None:
        fix = "add a prompt or drop the row (a tokenizer with a BOS token may accept it: check with --tokenizer MODEL)"
        said = {True: "the prompt is white space", False: "the prompt is empty"}
        return [
            row_fault(record.where, "empty_prompt", said[bool(record.prompt)], "a prompt", fix)
            for record in blank
            if digest is None or not record.prompt_ids
        ]
    # One at a time: a prompt that occurs twice is a fault of both rows.
    made = blank if kind is None else [item for record in blank for item in as_kind([record], kind)[0]]
    _, counts = tokenize(made, tokenizer, NO_LIMITS, source_tokenizer_digest=digest)
    splits = {record.where: record.split for record in blank}
    named = {item.fault.where: item for item in counts.faults if item.reason == "empty_prompt"}
    return [replace(item, split=splits[where]) for where, item in named.items()]


def rows_of(found: RecordSet, split: str, fractions: Mapping[str, float]) -> Sequence[Record]:
    """Return the records of a split; of a source that is used whole, all.

    Raises:
        DataError: the split does not exist or is empty.
    """
    return found.records if found.whole else in_split(found.records, split, fractions, found.source)


def examples_of(
    found: RecordSet,
    *,
    kind: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    skip_bad_rows: bool = False,
    fractions: Mapping[str, float] = FRACTIONS,
    max_samples: int | None = None,
    style: Style = PLAIN,
    all_replies: bool = False,
    processes: int = 1,
) -> tuple[Sequence[Example], SourceReport]:
    """Tokenise one split of given records; also report on its rows.

    Args:
        kind: the kind that the stage needs: text, prompt, demonstration, labelled, pair, preference or order.
        split: name of a split, or "all".
        tokenizer, lengths, all_replies: as for `examples_from`.
        skip_bad_rows: drop and count faulty rows instead of refusing the source.
        fractions: share of each split, if the source has no splits.
        max_samples: maximum number of records, in hash order.
        style: how text becomes a prompt. processes: how many encode a source that is stored.

    Raises:
        DataError: rows have faults, the split does not exist, its records are of the wrong kind, or none is usable.
    """
    in_it = rows_of(found, split, fractions)
    options: dict[str, Any] = {"source_tokenizer_digest": found.tokenizer_digest, "all_replies": all_replies}
    counts = Counts()
    examples: Sequence[Example]
    if isinstance(in_it, Records) and kind != "text":  # from the arrays of the store
        encodings = encodings_of(in_it, tokenizer, style=style, processes=processes, **options)
        tied = tied_rows([encodings.record(row) for row in ties(encodings, in_it.rows)]) if kind == "order" else []
        chosen = choose(encodings, in_it.rows, kind, counts.dropped, found.source)
        if max_samples is not None and len(chosen.record) > max_samples:
            chosen = chosen.select(np.array(lowest_of(chosen.prompt_keys(encodings), max_samples), np.int64))
        examples = fit(encodings, chosen, tokenizer, lengths, counts, all_replies)
        encodings.table.release()
        in_it.table.release()
    else:
        tied = tied_rows(in_it) if kind == "order" else []
        records, left_out = as_kind([style.apply(record) for record in in_it], kind, found.source)
        examples, counts = examples_from(lowest_hashes(records, max_samples), tokenizer, lengths, **options)
        counts.dropped += left_out
    if not skip_bad_rows:
        refuse_faults(tied, found.source, len(in_it))
        # Of the whole source, unless it has splits of its own.
        others = _of_splits(found, [*found.faults, *blank_prompts(found, tokenizer, kind)], {split})
        refuse_faults([*counts.faults, *others], found.source, found.rows)
    dropped = Counter(count_reasons(found.faults)) + found.skipped + counts.dropped
    dropped += Counter(count_reasons([*tied, *counts.faults]))
    if not examples:
        none = f"split {split!r}: no example left of {len(in_it)} rows ({_list(dropped)})"
        most = max(dropped, key=dropped.__getitem__, default="")
        expected = NEEDED.get(most, f"responses of at most {lengths.response} tokens")
        raise DataError(Fault(found.source, none, expected))
    return examples, SourceReport(
        source=found.source,
        format=found.format,
        split=found.whole or split,
        digest=records_digest(in_it),
        source_rows=found.rows,
        rows=len(in_it),
        kept=len(examples),
        dropped=dict(sorted(dropped.items())),
        truncated=dict(sorted((+counts.truncated).items())),
    )


def load_mixture(
    found: Sequence[RecordSet], entries: Sequence[DatasetEntry], *, max_samples: int | None = None, **options: Any
) -> tuple[Sequence[Example], tuple[SourceReport, ...]]:
    """Tokenise several sources in the proportion of their weights, or a fraction of each; also report on each.

    By weights, the mixture is the largest one without repeated examples: a source with more than its share contributes
    the examples with the lowest hashes.

    Args:
        found, entries: the records of each source, and its entry in the config.
        max_samples: maximum size of the mixture.
        options: as for `examples_of`.
    """
    sets, counted = zip(
        *(examples_of(item, max_samples=entry.max_samples, **options) for item, entry in zip(found, entries))
    )
    every, source_of = mix(sets, entries, max_samples=max_samples, kind=options.get("kind"))
    used = Counter(source_of)
    reports = tuple(_mixed(report, used[number]) for number, report in enumerate(counted))
    if not every:
        where = f"datasets: {', '.join(item.source for item in found)}"
        raise DataError(Fault(where, "no example is left at these weights", "at least one", "more samples"))
    return every, reports


def mix(
    sets: Sequence[Sequence[Example]],
    entries: Sequence[DatasetEntry],
    *,
    max_samples: int | None = None,
    kind: str | None = None,
) -> tuple[Sequence[Example], list[int]]:
    """The examples that a mixture has of each source's, and for each of them the number of its source.

    Args:
        sets: the examples of each source. The other arguments: as for `load_mixture`.
    """
    # The small addition keeps rounding errors from reducing a whole share by one.
    if any(entry.fraction is not None for entry in entries):
        fractions = [1.0 if entry.fraction is None else entry.fraction for entry in entries]
        shares = [int(len(examples) * fraction + 1e-9) for examples, fraction in zip(sets, fractions)]
    else:
        weights = [entry.weight for entry in entries]
        total = min(len(examples) * sum(weights) / weight for examples, weight in zip(sets, weights))
        total = total if max_samples is None else min(total, max_samples)
        shares = [int(total * weight / sum(weights) + 1e-9) for weight in weights]
    chosen = [lowest_examples(item, share) for item, share in zip(sets, shares)]
    every, source_of = join(chosen), [number for number, part in enumerate(chosen) for _ in range(len(part))]
    kept = list(range(len(every))) if max_samples is None else lowest_of(prompt_keys(every), max_samples)
    if kind == "prompt":  # a prompt of two sources is used once
        keys = prompt_keys(every)
        kept = list({keys[index]: index for index in kept}.values())
    return pick(every, kept), [source_of[index] for index in kept]


def _mixed(report: SourceReport, used: int) -> SourceReport:
    """Return the report of a source of which a mixture uses only its share."""
    left = {"beyond_its_share": report.kept - used} if used < report.kept else {}
    return replace(report, kept=used, dropped=dict(sorted({**report.dropped, **left}.items())))


def records_digest(records: Sequence[Record]) -> str:
    """Return the SHA-256 of the content and order of records."""
    if isinstance(records, Records):
        return records.digest()
    digest = sha256()
    for record in records:
        digest.update(record.canonical().encode() + b"\n")
    return digest.hexdigest()


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "none"
