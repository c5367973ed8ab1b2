"""Show token ids, borders and trained tokens, for `rlhf data preview --tokenizer` and the first lines of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.config.lengths import Lengths
from rlhf_pipeline.data.borders import decoded
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.tokenize import Example, tokenize, whole_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST = 200  # characters of a trained piece in a run's log


def trained_text(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return one line: where an example comes from, how many of its tokens are trained, and their text."""
    total = len(example.prompt_ids) + sum(map(len, example.completions))
    pieces = [piece for k in range(len(example.completions)) for piece in trained_pieces(example, k, tokenizer)]
    said = ", ".join(_quoted(piece) for piece in pieces)
    return f"{example.where}: {example.tokens_trained} of {total} tokens trained: {said}"


def trained_pieces(example: Example, number: int, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the text of each run of trained tokens in a completion."""
    ids = example.completions[number]
    flags = [True] * len(ids) if example.trained is None else example.trained
    runs = groupby(zip(ids, flags), key=lambda item: item[1])
    return [decoded(tokenizer, [token for token, _ in run]) for trained, run in runs if trained]


def token_rows(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    *,
    digest: str | None = None,
    train_on: str = "all_assistant",
) -> Iterator[dict[str, Any]]:
    """Yield for each record its ids, its border and its trained tokens, or the reason why it has none.

    A row has `prompt_ids`, and for each completion `completion_ids`, `trained` (true or false for each token) and
    `trained_text` (the runs of trained tokens).

    Args:
        records: rows of a source.
        digest: the `source_tokenizer_digest` of `examples_from`.
        train_on: as in the config of SFT; "all" concerns records with one completion.

    Raises:
        DataError: there are messages, but the tokenizer has no chat template.
    """
    for record in records:
        options: dict[str, Any] = {"source_tokenizer_digest": digest, "all_replies": train_on == "all_assistant"}
        examples, counts = tokenize([record], tokenizer, lengths, **options)
        if not examples:
            reasons = [str(item.fault) for item in counts.faults] or [*+counts.dropped]
            yield {"left_out": "; ".join(reasons)}
            continue
        example = examples[0]
        if train_on == "all" and len(example.completions) == 1:
            example = whole_sequence(example)
        numbers = range(len(example.completions))
        yield {
            "prompt_ids": example.prompt_ids,
            "completion_ids": example.completions,
            "trained": [example.trained or [True] * len(ids) for ids in example.completions],
            "trained_text": [trained_pieces(example, number, tokenizer) for number in numbers],
            "cut": dict(+counts.truncated),
        }


def _quoted(text: str) -> str:
    return json.dumps(text if len(text) <= LONGEST else text[:LONGEST] + "...", ensure_ascii=False)
