"""Records as token ids in flat arrays, before the length policy: made once, for every kind and every length.

A record has a sequence of ids for its prompt and one for each completion. A completion that ended has its stop token
already. The record itself is read again only for its columns and messages.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline.data.encode import ACROSS, BATCH, Encoded, encode
from rlhf_pipeline.data.kinds import MAKES, goodness
from rlhf_pipeline.data.preferences import MARGIN
from rlhf_pipeline.data.processes import taken_in_turns
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.render import REASONING, REWRITTEN
from rlhf_pipeline.data.rows import Records
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.tokenizers import stop_ids, text_of, token_count, tokenizer_digest
from rlhf_pipeline.disk.arrays import Array, Table, Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KINDS = tuple(MAKES)
ENDED, UNKNOWN = 1, 2
NOTES = {REASONING: 4, REWRITTEN: 8, ACROSS: 16}
"""Bits of a sequence: it ended, the tokenizer has no token for part of it; and what is said of a completion."""
REFUSED, TEMPLATED, MESSAGES, COLUMNS = 1, 2, 4, 8
"""Bits of a record: its chat template refuses it, it was rendered by one, its prompt is messages, it has columns."""


@dataclass(frozen=True, eq=False)
class Encodings:
    """R records as S sequences.

    records: what was encoded, before `style`.
    table: of sequences: `ids` (one sequence behind another), `ends` of each in them, `bits`, `goodness`, `texts` (the
        rendered texts). Of records: `last` (R,) the number of sequences up to each, `kinds`, `flags`, `keys` (R, 32)
        (the prompt's SHA-256), `probability` of the label, `margin`. With `all_replies`: `trained`, one for each id,
        and `border` (R,), the first token of the prompt that is trained, at least 1 (0: none is).
    """

    records: Sequence[Record]
    table: Table
    style: Style | None
    bos: int | None

    @functools.cached_property
    def starts(self) -> Array:
        """Where each sequence begins in `ids`, and where the last one ends: (S + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), self.table["ends"]])

    @functools.cached_property
    def sizes(self) -> Array:
        """The number of ids of each sequence: (S,)."""
        return np.diff(self.starts)

    @functools.cached_property
    def first(self) -> Array:
        """The sequence of each record's prompt, and the number of all sequences: (R + 1,)."""
        return np.concatenate([np.zeros(1, np.int64), self.table["last"]])

    def ids(self, sequence: int) -> Array:
        """Return the ids of a sequence."""
        return self.table["ids"][int(self.starts[sequence]) : int(self.starts[sequence + 1])]

    def record(self, number: int) -> Record:
        """Return a record in the style of the stage."""
        record = self.records[number]
        return record if self.style is None else self.style.apply(record)

    def where(self, number: int) -> str:
        """Return the place of a record's row."""
        records = self.records
        return records.where(number) if isinstance(records, Records) else records[number].where

    def refusal(self, number: int) -> str:
        """Return what the chat template says of a record that it does not accept."""
        return str(self.table.about["refused"][str(number)])


def encode_all(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    source_tokenizer_digest: str | None = None,
    style: Style | None = None,
    all_replies: bool = False,
    keep: Callable[[Callable[[Writer], Mapping[str, Any]]], Table] | None = None,
    processes: int = 1,
    tell: Callable[[int], None] = lambda _: None,
) -> Encodings:
    """Encode records; `keep` makes the table from a function that fills it, or has it already.

    Args:
        source_tokenizer_digest: digest of the tokenizer of the records' own ids. They are used if it is the digest of
            `tokenizer`; else the texts are encoded again.
        style, all_replies: as for `examples_of`; without a style, the records are in that of the stage.
        processes: how many share the work; the table is the same. tell: is told how many records are encoded.

    Raises:
        DataError: there are messages, but the tokenizer has no chat template.
    """
    own_ids = source_tokenizer_digest is not None and source_tokenizer_digest == tokenizer_digest(tokenizer)
    small = keep is not None and not own_ids and token_count(tokenizer) <= 2**16
    kind = np.dtype(np.uint16 if small else np.int64 if own_ids else np.uint32)

    def parts(number: int, of: int) -> Iterator[Part]:
        """Yield every `of`-th part, from that with this number on."""
        starts = range(number * BATCH, len(records), of * BATCH)
        mine = chain.from_iterable(records[at : at + BATCH] for at in starts)
        found = encode(mine if style is None else map(style.apply, mine), tokenizer, own_ids, all_replies)
        closed = closer(tokenizer)
        while batch := list(islice(found, BATCH)):
            yield _part(batch, closed, kind, all_replies)

    def fill(writer: Writer) -> Mapping[str, Any]:
        if not len(records):
            return _fill(writer, [_part([], closer(tokenizer), kind, all_replies)], tell)
        several = min(processes, -(-len(records) // BATCH))
        return _fill(writer, taken_in_turns(parts, several) if several > 1 else parts(0, 1), tell)

    if keep is not None:
        table = keep(fill)
    else:
        writer = Writer()
        table = writer.table(fill(writer))
    return Encodings(records, table, style, tokenizer.bos_token_id)


@dataclass
class Part:
    """Some records as the arrays of `Encodings`; `ends` and `last` begin at 0. refused: what templates say of some."""

    arrays: dict[str, Array]
    texts: list[str]
    refused: dict[int, str]


def _fill(writer: Writer, parts: Iterable[Part], tell: Callable[[int], None]) -> Mapping[str, Any]:
    """Write the arrays of `Encodings`, one part behind another; return the refusals."""
    refused: dict[str, str] = {}
    done = sequences = tokens = 0
    for part in parts:
        arrays = part.arrays
        arrays["ends"] += tokens
        arrays["last"] += sequences
        for name, rows in arrays.items():
            writer.add(name, rows)
        writer.texts("texts", part.texts)
        refused |= {str(done + number): said for number, said in part.refused.items()}
        done, sequences, tokens = (
            done + len(arrays["last"]),
            sequences + len(arrays["ends"]),
            tokens + len(arrays["ids"]),
        )
        tell(done)
    return {"refused": refused}


def _part(batch: Sequence[Encoded], closed: Closer, kind: np.dtype[Any], all_replies: bool) -> Part:
    """Return the arrays of some records; kind: the type of their ids."""
    ids: list[int] = []
    ends: list[int] = []
    last: list[int] = []
    refused: dict[int, str] = {}
    bits, measures, texts, border, trained = [], [], [], [], bytearray()
    for number, one in enumerate(batch):
        record = one.record
        whole = record.kind == "text"
        prompt = one.prompt_ids or []
        if not whole:
            ids += prompt
        ends.append(len(ids))
        bits.append(UNKNOWN if one.prompt_ids is None and one.refused is None else 0)
        texts.append(one.texts.prompt)
        measures += [0.0, *goodness(record)]
        notes = one.texts.notes or [()] * len(one.completions)
        for own, ended, across, said in zip(one.completions, record.ended, one.across, notes):
            ids += closed([*prompt, *(own or [])] if whole else own or [], ended)
            ends.append(len(ids))
            bit = ENDED * ended + UNKNOWN * (own is None) + NOTES[ACROSS] * across
            bits.append(bit + sum(NOTES[reason] for reason in said))
        texts += one.texts.completions
        if one.refused is not None:
            refused[number] = one.refused
            missing = len(record.completions)
            ends += [len(ids)] * missing
            bits += [ENDED * ended for ended in record.ended]
            texts += [""] * missing
        flags = one.trained if one.trained and any(one.trained) and one.completions else None
        border.append(0 if flags is None else max(flags.index(True), 1))
        if flags is not None:
            start = len(ids) - (ends[-1] - ends[-2]) - len(prompt)
            trained += bytes(start - len(trained)) + bytes(flags) + b"\x01" * (ends[-1] - ends[-2])
        last.append(len(ends))
    trained += bytes(len(ids) - len(trained))
    records = [one.record for one in batch]
    keys = bytes.fromhex("".join(record.prompt_key for record in records))
    arrays = {
        "ids": np.array(ids, kind),
        "ends": np.array(ends, np.int64),
        "bits": np.array(bits, np.uint8),
        "goodness": np.array(measures, np.float64),
        "last": np.array(last, np.int64),
        "border": np.array(border, np.int32),
        **({"trained": np.frombuffer(bytes(trained), np.uint8)} if all_replies else {}),
        "kinds": np.array([KINDS.index(record.kind) for record in records], np.uint8),
        "flags": np.array([_flags(one) for one in batch], np.uint8),
        "keys": np.frombuffer(keys, np.uint8).reshape(-1, 32),
        "probability": _numbers(records, "label_probability"),
        "margin": _numbers(records, MARGIN),
    }
    return Part(arrays, texts, refused)


def _numbers(records: Sequence[Record], name: str) -> Array:
    """Return a number that some records have, NaN for the others."""
    return np.array([np.nan if (one := record.extra.get(name)) is None else one for record in records], np.float64)


def _flags(one: Encoded) -> int:
    record = one.record
    messages = record.prompt is not None and record.conversational
    return (
        REFUSED * (one.refused is not None)
        + TEMPLATED * one.texts.templated
        + MESSAGES * messages
        + COLUMNS * bool(record.columns)
    )


Closer = Callable[[list[int], bool], list[int]]


def closer(tokenizer: PreTrainedTokenizerBase) -> Closer:
    """The function that gives a completion its end: exactly one stop token if it ended, none if it was cut.

    A text that ends in stop tokens, as a template writes them, ends at the first of these; white space between and
    behind them is dropped. Otherwise the stop token of the config, or EOS, is appended.
    """
    stops = stop_ids(tokenizer)
    is_blank = cache(lambda token: not text_of(tokenizer, [token]).strip())

    def closed(ids: list[int], ended: bool) -> list[int]:
        end, place = None, len(ids)
        while place and (ids[place - 1] in stops or is_blank(ids[place - 1])):
            place -= 1
            end = place if ids[place] in stops else end
        if ended:
            return [*ids, stops[0]] if end is None else ids[: end + 1]
        return ids[:end] if end else ids  # a cut response has no stop token, even if its text has one

    return closed
