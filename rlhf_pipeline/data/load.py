"""Load the examples of a stage from a source, with a report on its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.data.blank import blank_prompts
from rlhf_pipeline.data.files import RowFault, by_line
from rlhf_pipeline.data.formats import count_reasons
from rlhf_pipeline.data.kinds import as_kind, tied_rows
from rlhf_pipeline.data.parsed import RecordSet, parsed_once
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.splits import FRACTIONS, in_split
from rlhf_pipeline.data.tokenize import Example, tokenize
from rlhf_pipeline.errors import DataError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_pipeline.config.base import Lengths


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

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data, for a manifest."""
        return asdict(self)

    def summary(self) -> str:
        """Return one line for the log."""
        parts = [f"{self.source} ({self.format}), split {self.split}: {self.kept} examples of {self.rows} rows"]
        for name, counts in (("dropped", self.dropped), ("cut", self.truncated)):
            if counts:
                parts.append(f"{name}: " + ", ".join(f"{reason} {count}" for reason, count in counts.items()))
        return "; ".join(parts)


@dataclass
class ExampleSet:
    """Tokenised examples, with one report per source."""

    examples: list[Example]
    reports: tuple[SourceReport, ...]

    @property
    def report(self) -> SourceReport:
        """Report of the first source, normally the only one."""
        return self.reports[0]


def read_records(
    source: str,
    *,
    config: str | None = None,
    split: str | None = None,
    home: Path | None = None,
    base_dir: Path | None = None,
    skip_bad_rows: bool = False,
    kind: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> RecordSet:
    """Read a source and turn its rows into records.

    Args:
        source, config, split, home, base_dir: as for `read_source`.
        skip_bad_rows: drop and count faulty rows instead of refusing the source.
        kind, tokenizer: those of the stage, if known; empty prompts are then reported with the other faults.

    Raises:
        DataError: rows have faults (all are listed), or no row is usable.
    """
    place: dict[str, Path | None] = {"home": home, "base_dir": base_dir}
    found = parsed_once(str(source), config, split, place)
    if not skip_bad_rows:
        blank = [] if tokenizer is None else _blank(found, kind, tokenizer)
        refuse_faults([*found.faults, *blank], found.source, found.rows)
    if not found.records:
        reasons = {**count_reasons(found.faults), **found.skipped}
        raise DataError(
            [
                Fault(found.source, f"no rows left of {found.rows} ({_list(reasons)})", "at least one usable row"),
                *(item.fault for item in found.faults),
            ]
        )
    return found


def refuse_faults(faults: Sequence[RowFault], source: str, rows: int) -> None:
    """Raise all faults of a source at once, after a count of each reason.

    Raises:
        DataError: there are faults.
    """
    faults = by_line(list(dict.fromkeys(faults)))
    if faults:
        wrong = len({item.fault.where for item in faults})
        summary = Fault(
            source,
            f"{wrong} of {rows} rows cannot be used ({_list(count_reasons(faults))})",
            "",
            "fix them, or set `skip_bad_rows: true` to drop them",
        )
        raise DataError([summary, *(item.fault for item in faults)])


def _blank(found: RecordSet, kind: str | None, tokenizer: PreTrainedTokenizerBase) -> list[RowFault]:
    return blank_prompts(found.records, tokenizer, kind=kind, source_tokenizer_digest=found.tokenizer_digest)


def load_examples(
    source: str,
    *,
    kind: str,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    config: str | None = None,
    home: Path | None = None,
    skip_bad_rows: bool = False,
    fractions: Mapping[str, float] = FRACTIONS,
    max_samples: int | None = None,
    base_dir: Path | None = None,
    prepare: Callable[[RecordSet], RecordSet] | None = None,
) -> ExampleSet:
    """Load one split of a source as tokenised examples.

    Args:
        source, config, home, base_dir: as for `read_source`.
        kind: the kind that the stage needs: text, prompt, demonstration, pair, preference or order.
        split: name of a split, or "all".
        tokenizer, lengths: as for `tokenize`.
        skip_bad_rows: drop and count faulty rows instead of refusing the source.
        fractions: share of each split, if the source has no splits.
        max_samples: maximum number of records, in hash order.
        prepare: function applied to the records of the whole source first.

    Raises:
        DataError: rows have faults, the split does not exist, its records are of the wrong kind, or none is usable.
    """
    stage: dict[str, Any] = {"skip_bad_rows": skip_bad_rows, "kind": kind, "tokenizer": tokenizer}
    found = read_records(source, config=config, home=home, base_dir=base_dir, **stage)
    return examples_of(
        found if prepare is None else prepare(found),
        kind=kind,
        split=split,
        tokenizer=tokenizer,
        lengths=lengths,
        skip_bad_rows=skip_bad_rows,
        fractions=fractions,
        max_samples=max_samples,
    )


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
) -> ExampleSet:
    """Tokenise one split of given records; arguments and errors as for `load_examples`."""
    in_it = in_split(found.records, split, fractions, found.source)
    tied = tied_rows(in_it) if kind == "order" else []
    if not skip_bad_rows:
        refuse_faults(tied, found.source, len(in_it))
    records, left_out = as_kind(in_it, kind, found.source)
    records = lowest_hashes(records, max_samples)
    examples, counts = tokenize(records, tokenizer, lengths, source_tokenizer_digest=found.tokenizer_digest)
    if not skip_bad_rows:  # also faults in splits that this stage does not read
        refuse_faults([*counts.faults, *_blank(found, kind, tokenizer)], found.source, found.rows)
    dropped = Counter(count_reasons(found.faults)) + found.skipped + left_out + counts.dropped
    dropped += Counter(count_reasons([*tied, *counts.faults]))
    if not examples:
        raise DataError(
            Fault(
                found.source,
                f"split {split!r}: no example left of {len(in_it)} rows ({_list(dropped)})",
                f"prompts of at most {lengths.prompt} and responses of at most {lengths.response} tokens",
            )
        )
    report = SourceReport(
        source=found.source,
        format=found.format,
        split=split,
        digest=records_digest(in_it),
        source_rows=found.rows,
        rows=len(in_it),
        kept=len(examples),
        dropped=dict(sorted(dropped.items())),
        truncated=dict(sorted((+counts.truncated).items())),
    )
    return ExampleSet(examples, (report,))


def load_mixture(
    datasets: Sequence[Mapping[str, Any]], *, max_samples: int | None = None, **options: Any
) -> ExampleSet:
    """Load several sources in the proportion of their weights.

    The mixture is the largest one without repeated examples: a source with more than its share contributes the
    examples with the lowest hashes.

    Args:
        datasets: for each source `dataset_name`, optionally `dataset_config` and `weight` (default 1).
        max_samples: maximum size of the mixture.
        options: as for `load_examples`.
    """
    sets = [load_examples(entry["dataset_name"], config=entry.get("dataset_config"), **options) for entry in datasets]
    weights = [float(entry.get("weight", 1)) for entry in datasets]
    total = min(len(item.examples) * sum(weights) / weight for item, weight in zip(sets, weights))
    total = total if max_samples is None else min(total, max_samples)
    # The small addition keeps rounding errors from reducing a whole share by one.
    shares = [int(total * weight / sum(weights) + 1e-9) for weight in weights]
    examples = [example for item, share in zip(sets, shares) for example in lowest_hashes(item.examples, share)]
    if options.get("kind") == "prompt":  # a prompt of two sources is used once
        examples = list({example.prompt_key: example for example in examples}.values())
    if not examples:
        names = ", ".join(entry["dataset_name"] for entry in datasets)
        raise DataError(
            Fault(f"datasets: {names}", "no example is left at these weights", "at least one", "more samples")
        )
    return ExampleSet(examples, tuple(report for item in sets for report in item.reports))


def lowest_hashes(items: list, limit: int | None) -> list:
    """Return the `limit` records or examples with the lowest hashes, in their original order."""
    if limit is None or len(items) <= limit:
        return items
    # The hash is of the prompt and of the row's number among those of the prompt: the prompt's own hash decides the
    # split, and a source with many rows per prompt should not lose whole prompts.
    seen: Counter[str] = Counter()
    places = []
    for index, item in enumerate(items):
        number = seen[item.prompt_key]
        seen[item.prompt_key] += 1
        places.append((sha256(f"sample {item.prompt_key} {number}".encode()).hexdigest(), index))
    return [items[index] for index in sorted(index for _, index in sorted(places)[:limit])]


def records_digest(records: Sequence[Record]) -> str:
    """Return the SHA-256 of the content and order of records."""
    digest = sha256()
    for record in records:
        digest.update(record.canonical().encode() + b"\n")
    return digest.hexdigest()


def _list(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "none"
