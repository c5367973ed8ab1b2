"""Records to examples under one length policy for all stages.

A prompt longer than `lengths.prompt`, or than its longest completion leaves of `lengths.total`, is cut on the left; one
of messages loses whole turns there. An example with a completion longer than `lengths.response` (EOS included) is
dropped and counted. A completion gets a stop token (EOS unless the config names one) only if it ended and its text has
none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_pipeline.data.choices import Chosen, choose
from rlhf_pipeline.data.encode import TURNS, Counts, with_fewer_turns
from rlhf_pipeline.data.encodings import (
    ENDED,
    KINDS,
    NOTES,
    REFUSED,
    TEMPLATED,
    UNKNOWN,
    Encodings,
    encode_all,
)
from rlhf_pipeline.data.examples import Example, Examples, View, untied, whole_sequence
from rlhf_pipeline.data.files import row_fault
from rlhf_pipeline.data.kinds import as_kind, places_of
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.disk.arrays import Array, entries, release
from rlhf_pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_pipeline.config.lengths import Lengths

__all__ = ["Example", "cut_prompt", "examples_from", "fit", "prompts_of_texts", "tokenize", "untied", "whole_sequence"]
_PAIRS = 1024  # pairs of one length that are compared before the pages of their ids are released
_TEXT, _PAIR, _RANKING = (KINDS.index(kind) for kind in ("text", "pair", "ranking"))


def tokenize(records: Sequence[Record], *arguments: Any, **options: Any) -> tuple[list[Example], Counts]:
    """Turn records into a list of examples, as `examples_from` does."""
    examples, counts = examples_from(records, *arguments, **options)
    return list(examples), counts


def examples_from(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    *,
    source_tokenizer_digest: str | None = None,
    kind: str | None = None,
    all_replies: bool = False,
) -> tuple[Examples, Counts]:
    """Turn records into examples, in their order.

    Args:
        records: all of one kind, or of any kinds that convert to `kind`.
        tokenizer: must have an EOS token.
        lengths: limits in tokens: `prompt`, `response` (with EOS) and `total`.
        source_tokenizer_digest: as for `encode_all`.
        kind: kind that the records are converted to first; None: no conversion.
        all_replies: of a conversation, also train on the assistant's turns in the prompt. The example's prompt then
            ends at the first of them, and its completion is the rest of the conversation.

    Raises:
        DataError: there are messages, but the tokenizer has no chat template.
    """
    counts = Counts()
    if kind is not None:
        records, left_out = as_kind(list(records), kind)
        counts.dropped += left_out
    options: dict[str, Any] = {"source_tokenizer_digest": source_tokenizer_digest, "all_replies": all_replies}
    encodings = encode_all(records, tokenizer, **options)
    chosen = choose(encodings, np.arange(len(records)), None, counts.dropped)
    return fit(encodings, chosen, tokenizer, lengths, counts, all_replies), counts


def prompts_of_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, lengths: Lengths, *, raw: bool = True
) -> list[Example]:
    """Tokenise prompts from the command line.

    Args:
        raw: false: each is what a user says to a chat model, by the chat template if the tokenizer has one.

    Raises:
        DataError: a prompt cannot be tokenised (it has a word outside a word-level vocabulary).
    """
    said = [text if raw or not tokenizer.chat_template else ({"role": "user", "content": text},) for text in texts]
    records = [Record("prompt", prompt, where=f"--prompt {text!r}") for text, prompt in zip(texts, said)]
    examples, counts = tokenize(records, tokenizer, lengths)
    if counts.faults:
        raise DataError([item.fault for item in counts.faults])
    return examples


def cut_prompt(ids: list[int], longest: int, bos: int | None) -> list[int]:
    """Return the last `longest` tokens of a prompt; a BOS at its beginning stays, for models that need it there."""
    if len(ids) <= longest:
        return ids
    return [ids[0], *ids[1 - longest :]] if ids[0] == bos and longest > 1 else ids[-longest:]


def fit(
    encodings: Encodings,
    chosen: Chosen,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    counts: Counts,
    all_replies: bool = False,
) -> Examples:
    """Return the examples of some records within the limits; what is dropped, cut or faulty is counted."""
    refused = (encodings.table["flags"][chosen.record] & REFUSED) > 0
    anew = np.flatnonzero(refused & ~chosen.whole)  # a part of the record may be accepted
    readable = _readable(encodings, chosen, refused, counts)
    kinds = encodings.table["kinds"][chosen.record]
    mask = readable & (kinds != _TEXT)
    texts, others, rest = np.flatnonzero(readable & (kinds == _TEXT)), np.flatnonzero(mask), chosen.select(mask)
    room = _room(encodings, rest, lengths)
    templated = (encodings.table["flags"][rest.record] & TEMPLATED) > 0
    long = templated & (encodings.sizes[encodings.first[rest.record]] > room)
    view, kept = _limited(encodings, rest.select(~long), room[~long], lengths, counts, all_replies)
    parts = [(Examples.of(view), others[~long][kept])]
    if len(texts):
        view, places = _chunks(encodings, chosen.select(texts), lengths.total, counts)
        parts.append((Examples.of(view), texts[places]))
    if long.any():
        options = (tokenizer, lengths, counts, all_replies)
        view, places = _shorter(encodings, rest.select(long), room[long], *options)
        parts.append((Examples.of(view), others[long][places]))
    if len(anew):
        again = encode_all([chosen.item(encodings, number) for number in anew.tolist()], tokenizer)
        for place, number in enumerate(anew):
            one = choose(again, np.array([place]), None, counts.dropped)
            made = fit(again, one, tokenizer, lengths, counts, all_replies)
            parts.append((made, np.full(len(made), number)))
    for counted in (counts.dropped, counts.truncated):
        for reason in [reason for reason, count in counted.items() if not count]:
            del counted[reason]
    if len(parts) == 1:
        return parts[0][0]
    order = np.argsort(np.concatenate([places for _, places in parts]), kind="stable")
    return Examples.joined([examples for examples, _ in parts]).select(order)


def _readable(encodings: Encodings, chosen: Chosen, refused: Array, counts: Counts) -> Array:
    """Whether each item has ids: (N,). The others are faults, and what happened to some is counted by name."""
    bits = encodings.table["bits"]
    mine = bits[chosen.sequence]
    unknown = ~refused & (((bits[encodings.first[chosen.record]] & UNKNOWN) > 0) | chosen.any((mine & UNKNOWN) > 0))
    for number in np.flatnonzero(unknown | (refused & chosen.whole)).tolist():
        where = encodings.where(int(chosen.record[number]))
        if refused[number]:
            said = f"the chat template refuses these messages: {encodings.refusal(int(chosen.record[number]))}"
            counts.faults.append(row_fault(where, "refused_by_template", said))
        else:
            found = "text that the tokenizer has no token for"
            counts.faults.append(row_fault(where, "unknown_token", found, "text within its vocabulary"))
    readable = ~(unknown | refused)
    for reason, bit in NOTES.items():
        for number in np.flatnonzero(readable & chosen.any((mine & bit) > 0)).tolist():
            counts.name(reason, encodings.where(int(chosen.record[number])))
    return readable


def _room(encodings: Encodings, chosen: Chosen, lengths: Lengths) -> Array:
    """Return the most tokens that each prompt may have before its completions; those that are too long do not count."""
    sizes = encodings.sizes[chosen.sequence]
    longest = chosen.maximum(np.where(sizes <= lengths.response, sizes, 0))
    return np.minimum(lengths.prompt, lengths.total - longest)


def _limited(
    encodings: Encodings, chosen: Chosen, room: Array, lengths: Lengths, counts: Counts, all_replies: bool
) -> tuple[View, Array]:
    """Return the examples of prompts that are cut on the left, and the number of the item of each."""
    sizes, table, bos = encodings.sizes, encodings.table, encodings.bos
    prompts, sequence = encodings.first[chosen.record], chosen.sequence
    kinds = table["kinds"][chosen.record]
    # 1. Prompts and completions that have no token are faults.
    empty = (sizes[prompts] == 0) & (bos is None)
    lacking = ~empty & chosen.any(sizes[sequence] == 0)
    fix = "give a prompt, or a tokenizer with a BOS token"
    for number in np.flatnonzero(empty | lacking).tolist():
        where = encodings.where(int(chosen.record[number]))
        if empty[number]:
            counts.faults.append(row_fault(where, "empty_prompt", "the prompt has no token", "a prompt", fix))
        else:
            counts.faults.append(row_fault(where, "empty_completion", "a completion has no token", "a response"))
    # 2. Completions that are too long leave a ranking, and are the end of other items; equal ones have no preference.
    keep = ~(empty | lacking)
    ranking = chosen.whole & (kinds == _RANKING)
    ranks = np.zeros(len(sequence), np.int32)
    stay = np.ones(len(sequence), bool)
    sequence = sequence.copy()
    for number in np.flatnonzero(ranking & keep).tolist():
        span = slice(int(chosen.first[number]), int(chosen.first[number + 1]))
        reason = _order(encodings, sequence[span], ranks[span], stay[span], lengths.response)
        keep[number] = reason is None
        counts.dropped[reason or ""] += reason is not None
        counts.truncated["ranking_shortened"] += reason is None and not stay[span].all()
    too_long = keep & ~ranking & chosen.any(sizes[sequence] > lengths.response)
    counts.dropped["completion_too_long"] += int(too_long.sum())
    keep &= ~too_long
    pairs = keep & np.where(chosen.whole, kinds == _PAIR, chosen.kind == "pair")
    firsts = chosen.first[:-1][pairs]
    same = sizes[sequence[firsts]] == sizes[sequence[firsts + 1]]
    for done, (number, first) in enumerate(zip(np.flatnonzero(pairs)[same].tolist(), firsts[same].tolist())):
        if done % _PAIRS == 0:
            release(table["ids"])
        if np.array_equal(encodings.ids(int(sequence[first])), encodings.ids(int(sequence[first + 1]))):
            counts.dropped["identical_pair"] += 1
            keep[number] = False
    # 3. Prompts are cut; a BOS at the beginning stays, and stands for a prompt without tokens.
    start, end, none = encodings.starts[prompts], encodings.starts[prompts + 1], sizes[prompts] == 0
    cut = ~none & (sizes[prompts] > room)
    begun = cut & (room > 1)
    begun[begun] = entries(table["ids"], start[begun]) == (-1 if bos is None else bos)
    left = room - begun
    start = np.where(cut, np.where(left > 0, end - left, start - left), start)
    truncated = cut | (none & (room < 1))
    counts.truncated["prompt_truncated"] += int((truncated & keep).sum())
    # 4. In a conversation whose earlier replies are trained too, the completion begins at the first of them.
    ranges = np.stack([encodings.starts[sequence], encodings.starts[sequence + 1]], 1)
    trained = np.zeros(len(prompts), bool)
    if all_replies:
        border = table["border"][chosen.record].astype(np.int64)
        trained = border > 0
        ranges[chosen.first[:-1][trained], 0] = (start + border)[trained]
        end = np.where(trained, start + border, end)
    stay &= np.repeat(keep, np.diff(chosen.first))
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(stay)])
    view = View(
        encodings,
        chosen.record[keep],
        np.stack([start, end], 1)[keep],
        (none | begun)[keep],
        truncated[keep],
        before[np.concatenate([chosen.first[:-1][keep], chosen.first[-1:]])],
        ranges[stay],
        sequence[stay],
        (table["bits"][sequence[stay]] & ENDED) > 0,
        ranks[stay],
        trained[keep],
        chosen.whole[keep],
        sides=chosen.kind == "prompt",
        labelled=chosen.kind == "labelled",
    )
    return view, np.flatnonzero(keep)


def _order(encodings: Encodings, sequence: Array, ranks: Array, stay: Array, longest: int) -> str | None:
    """Put the completions of a ranking in order, best first, those that are too long last; write ranks and who stays.

    Returns:
        Why no preference is left; None if there is one.
    """
    fitting = np.flatnonzero(encodings.sizes[sequence] <= longest).tolist()
    places = places_of(encodings.table["goodness"][sequence].tolist())
    best = sorted(fitting, key=places.__getitem__)
    ordered = [places[k] for k in best]
    sequence[: len(best)], ranks[: len(best)] = sequence[best], ordered
    stay[len(best) :] = False
    if untied([encodings.ids(int(one)).tolist() for one in sequence[: len(best)]], ordered):
        return None
    if len(best) < 2:
        return "completion_too_long"  # the others were
    return "tied_ranking" if len(set(ordered)) == 1 else "identical_pair"


def _shorter(
    encodings: Encodings,
    chosen: Chosen,
    room: Array,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    counts: Counts,
    all_replies: bool,
) -> tuple[View, Array]:
    """Return the examples of conversations that are too long, without their first turns, and the item of each."""
    items = [with_fewer_turns(chosen.item(encodings, n), tokenizer, most) for n, most in enumerate(room.tolist())]
    kept = [number for number, item in enumerate(items) if item is not None]
    again = encode_all([item for item in items if item is not None], tokenizer, all_replies=all_replies)
    whole, unsaid = choose(again, np.arange(len(kept)), None, counts.dropped), Counts()
    refused = (again.table["flags"] & REFUSED) > 0
    readable = np.flatnonzero(_readable(again, whole, refused, unsaid))
    counts.dropped["prompt_too_long"] += len(items) - len(readable)
    numbers = np.array(kept, np.int64)[readable]
    for number in numbers.tolist():
        counts.name(TURNS, encodings.where(int(chosen.record[number])))
    whole = whole.select(readable)
    view, places = _limited(again, whole, _room(again, whole, lengths), lengths, counts, all_replies)
    numbers = numbers[places]
    origin = (encodings, chosen.record[numbers])
    cut = np.ones(len(numbers), bool)
    return replace(view, of=origin, truncated=cut, own=chosen.whole[numbers], sides=chosen.kind == "prompt"), numbers


def _chunks(encodings: Encodings, chosen: Chosen, total: int, counts: Counts) -> tuple[View, Array]:
    """Cut texts into sequences of at most `total` tokens; the first token of each is its prompt."""
    sizes, starts = encodings.sizes[chosen.sequence], encodings.starts[chosen.sequence]
    pieces = -(-sizes // total)
    counts.truncated["text_cut_into_chunks"] += int((pieces > 1).sum())
    of = np.repeat(np.arange(len(sizes)), pieces)
    number = np.arange(len(of)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start, length = starts[of] + number * total, np.minimum(total, sizes[of] - number * total)
    keep = length >= 2
    counts.dropped["chunk_too_short"] += int((~keep).sum())
    ended = (encodings.table["bits"][chosen.sequence[of]] & ENDED) > 0
    ended &= number == pieces[of] - 1
    of, start, length, ended = of[keep], start[keep], length[keep], ended[keep]
    no = np.zeros(len(of), bool)
    view = View(
        encodings,
        chosen.record[of],
        np.stack([start, start + 1], 1),
        no,
        no,
        np.arange(len(of) + 1),
        np.stack([start + 1, start + length], 1),
        np.full(len(of), -1),
        ended,
        np.zeros(len(of), np.int32),
        no,
        no,
    )
    return view, of
