"""Find rows whose prompt is empty or white space, in a whole source before it is split."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.config.base import Lengths
from rlhf_pipeline.data.files import RowFault, row_fault
from rlhf_pipeline.data.kinds import as_kind
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.tokenize import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANY = 2**31
NO_LIMITS = Lengths(ANY, ANY, 2 * ANY)
REASON = "empty_prompt"


def blank_prompts(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    kind: str | None = None,
    source_tokenizer_digest: str | None = None,
) -> list[RowFault]:
    """Return a fault for each record with an empty prompt.

    Args:
        tokenizer: decides which prompts are empty: one with a BOS token accepts an empty prompt, and some have tokens
            for white space. Without a tokenizer, every empty or white-space prompt is a fault, unless it has token ids
            from the source's own tokenizer.
        kind: kind of record that the stage needs; "text" needs no prompt.
        source_tokenizer_digest: as for `tokenize`.
    """
    blank = [item for item in records if isinstance(item.prompt, str) and (not item.prompt or item.prompt.isspace())]
    if not blank or kind == "text":
        return []
    if tokenizer is None:
        own = source_tokenizer_digest is not None
        return [_unread(record) for record in blank if not (own and record.prompt_ids)]
    # One at a time: a prompt that occurs twice is a fault of both rows.
    made = blank if kind is None else [item for record in blank for item in as_kind([record], kind)[0]]
    _, counts = tokenize(made, tokenizer, NO_LIMITS, source_tokenizer_digest=source_tokenizer_digest)
    return list({item.fault.where: item for item in counts.faults if item.reason == REASON}.values())


def _unread(record: Record) -> RowFault:
    found = "the prompt is white space" if record.prompt else "the prompt is empty"
    fix = "add a prompt or drop the row (a tokenizer with a BOS token may accept it: check with --tokenizer MODEL)"
    return row_fault(record.where, REASON, found, "a prompt", fix)
