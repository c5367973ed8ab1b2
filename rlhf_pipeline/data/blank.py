"""Rows whose prompt is empty or white space: what a stage says of them, for a whole source and before it is split."""

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
    """A fault for each record with nothing to answer.

    Args:
        tokenizer: it decides: one with a BOS token takes an empty prompt, and some have tokens of white space. Without
            it every prompt is named that is empty or white space and has no token ids of the source's own tokenizer.
        kind: what a stage makes of the records; texts need no prompt.
        source_tokenizer_digest: as for `tokenize`.
    """
    blank = [item for item in records if isinstance(item.prompt, str) and (not item.prompt or item.prompt.isspace())]
    if not blank or kind == "text":
        return []
    if tokenizer is None:
        own = source_tokenizer_digest is not None
        return [_unread(record) for record in blank if not (own and record.prompt_ids)]
    # One at a time: a prompt that comes twice is a fault of both its rows.
    made = blank if kind is None else [item for record in blank for item in as_kind([record], kind)[0]]
    _, counts = tokenize(made, tokenizer, NO_LIMITS, source_tokenizer_digest=source_tokenizer_digest)
    return list({item.fault.where: item for item in counts.faults if item.reason == REASON}.values())


def _unread(record: Record) -> RowFault:
    found = "the prompt is white space" if record.prompt else "the prompt is empty"
    fix = "give a prompt or drop the row (a tokenizer with a BOS token may take it: --tokenizer MODEL says)"
    return row_fault(record.where, REASON, found, "a prompt", fix)
