"""Stores of large sources in `cache/tokens/`: their records, parsed once, and the ids of these by a tokenizer."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline.data.encodings import Encodings, encode_all
from rlhf_pipeline.data.files import RowFault
from rlhf_pipeline.data.formats import RecordSet, for_template
from rlhf_pipeline.data.processes import usable_cores
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.rows import Records, write_records
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.templates import template_of
from rlhf_pipeline.data.tokenizers import stop_ids, tokenizer_digest
from rlhf_pipeline.disk.arrays import Writer, digest_of, stored
from rlhf_pipeline.disk.cache import TOKENS
from rlhf_pipeline.disk.stamps import Stamp, stamp
from rlhf_pipeline.errors import Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STORES = ("cache", TOKENS)
"""The folder of all stores in the home directory."""
FORMAT = 1
TOLD_EVERY = 10.0  # seconds between two lines on the progress


def encodings_of(
    records: Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source_tokenizer_digest: str | None,
    style: Style,
    all_replies: bool,
    processes: int = 1,
) -> Encodings:
    """Return the encodings of all records of a source, from their store if they are there; `rows` are their numbers.

    processes: how many encode, at most one for each usable core.
    """
    every = replace(records, rows=np.arange(len(records.table["keys"])), split=None)
    options: dict[str, Any] = {"source_tokenizer_digest": source_tokenizer_digest, "style": style}
    options["all_replies"] = all_replies
    # The digest of a slow tokenizer does not tell its code; records that are not on disk have no digest.
    if not tokenizer.is_fast or records.table.digest is None:
        return encode_all(every, tokenizer, **options)
    template = template_of(tokenizer) or ""
    how = {
        "records": records.table.digest,
        "tokenizer": tokenizer_digest(tokenizer),
        "stops": stop_ids(tokenizer),
        "template": template,
        "day": str(date.today()) if "strftime_now" in template else None,  # the template writes the date
        "special": tokenizer.special_tokens_map,  # for templates; the digest leaves out a PAD, and texts may have one
        "split": tokenizer.split_special_tokens,
        "style": asdict(style),
        "all_replies": all_replies,
        "own": source_tokenizer_digest,
    }
    folder = records.folder.parent / _name(how)
    options |= {"processes": min(processes, usable_cores()), "tell": teller("tokens", len(every), records.say)}
    about = {"source": records.table.about["source"]}
    return encode_all(
        every,
        tokenizer,
        keep=lambda fill: stored(folder, lambda writer: {**fill(writer), **about}, records.say),
        **options,
    )


def teller(what: str, rows: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Return a function that is told how many rows are done, and says how fast and when the last one will be."""
    began = told = time.monotonic()

    def tell(done: int) -> None:
        nonlocal told
        if (now := time.monotonic()) - told > TOLD_EVERY:
            told, rate = now, done / (now - began)
            left = (rows - done) / rate
            say(f"{what}: {done:,} of {rows:,} rows, {rate:,.0f} rows a second, {left:,.0f} s left")

    return tell


def source_name(source: str, files: Sequence[Path], *read: Any) -> str:
    """Return the name of the store of a source: of its files' content, and how they are read."""
    content = [(str(file), _known_digest(file)) for file in files]
    return _name({"source": source, "files": content, "read": read})


_DIGESTS: dict[Stamp, str] = {}


def _known_digest(file: Path) -> str:
    """Return the SHA-256 of a file, computed once as long as it does not change."""
    if (seen := stamp([file])) is None:
        return digest_of(file)
    if seen not in _DIGESTS:
        _DIGESTS[seen] = digest_of(file)
    return _DIGESTS[seen]


def _name(how: Mapping[str, Any]) -> str:
    content = {**how, "format": FORMAT, "code": _code(), "versions": [version("tokenizers"), version("transformers")]}
    return sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """The SHA-256 of the modules that make records and ids: a store of other code is another store."""
    digest, package = sha256(), Path(__file__).parents[1]
    for path in sorted([*package.glob("data/*.py"), *package.glob("disk/*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stored_records(
    folder: Path, parsed: Callable[[], tuple[RecordSet, Iterable[Record]]], say: Callable[[str], None]
) -> RecordSet:
    """Return the records of a source from its store, which is filled first if it is not there.

    Args:
        parsed: parses the source.

    Raises:
        Unstorable: a row has columns that are not JSON.
    """
    table = stored(folder, lambda writer: _fill(writer, *parsed(), say), say)
    about = table.about
    return RecordSet(
        about["source"],
        about["format"],
        about["rows"],
        Records(table, np.arange(len(table["keys"])), folder, say),
        [RowFault(reason, Fault(*fault), split) for reason, fault, split in about["faults"]],
        Counter(about["skipped"]),
        about["recorded_digest"],
        unread=about["unread"],
        not_read=tuple(about["not_read"]),
        against=Counter(about["against"]),
        template_values=frozenset(about["template_values"]),
    )


def _fill(writer: Writer, found: RecordSet, records: Iterable[Record], say: Callable[[str], None]) -> Mapping[str, Any]:
    """Write the records of a source, and return what else is known of it."""
    values: set[str] = set()
    tell = teller("rows", found.rows, say)

    def noted() -> Iterator[Record]:
        for number, record in enumerate(records):
            tell(number)
            values.update(for_template(record) if record.extra else ())
            yield record

    splits = write_records(writer, noted())
    said = [(item.reason, item.fault, item.split) for item in found.faults]
    named = ("source", "format", "rows", "recorded_digest", "unread", "not_read")
    return {
        **{name: getattr(found, name) for name in named},
        "skipped": dict(found.skipped),
        "against": dict(found.against),
        "template_values": sorted(values),
        "faults": [(reason, (one.where, one.found, one.expected, one.fix), split) for reason, one, split in said],
        "splits": splits,
    }
