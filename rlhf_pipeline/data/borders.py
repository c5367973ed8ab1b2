"""The border between a prompt and its completion in token ids.

A prompt has the ids that it has alone, for training as for sampling. A completion has the ids of the whole text from
there on. Some tokenizers put a token across the border; then only the part of that token behind the border is encoded
again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.data.tokenizers import text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
ANCHORS = ("\n", ".", "a", "1", "(", "e", "▁")
"""Texts before a piece that is encoded, because some tokenizers put a space before a text; one of them ends a token."""
NEAR = 4
"""Tokens behind the border at which the ids of the whole text may begin again."""


def completion_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: Sequence[int], completion: str, whole: Sequence[int]
) -> list[int]:
    """Return the ids of a completion: decode(prompt_ids + ids) is decode(whole).

    Args:
        prompt, completion: texts. prompt_ids: the ids of `prompt`. whole: the ids of `prompt + completion`.

    Returns:
        the ids; if none decode to the text, those that differ in white space only, else those of the completion alone.
    """
    if list(whole[: len(prompt_ids)]) == list(prompt_ids):
        return list(whole[len(prompt_ids) :])
    text, nearly = decoded(tokenizer, whole), None
    for ids in _candidates(tokenizer, prompt, completion, whole):
        found = decoded(tokenizer, [*prompt_ids, *ids])
        if found == text:
            return ids
        if nearly is None and "".join(found.split()) == "".join(text.split()):
            nearly = ids
    return nearly or (token_ids(tokenizer, [completion])[0] or [])


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int] | None]:
    """Return the token ids of each text without special tokens; None if the tokenizer has no token for part of it."""
    if not texts:
        return []
    try:
        return tokenizer(texts, **PLAIN)["input_ids"]
    except Exception:  # a word-level tokenizer without an unknown token raises a bare Exception
        if len(texts) == 1:
            return [None]
        return [ids for text in texts for ids in token_ids(tokenizer, [text])]


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of ids, with special tokens and without a change of white space."""
    return text_of(tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def first_at(offsets: Sequence[tuple[int, int]], place: int) -> int:
    """Return the number of the first token with a character at or behind `place`."""
    return next((number for number, (_, end) in enumerate(offsets) if end > place), len(offsets))


def offsets_of(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[tuple[int, int]]]:
    """Return the characters (start, end) of each token of each text.

    A slow tokenizer does not know them: the texts are then decoded token by token.
    """
    if not texts:
        return []
    if tokenizer.is_fast:
        return tokenizer(texts, return_offsets_mapping=True, **PLAIN)["offset_mapping"]
    found = []
    for ids in tokenizer(texts, **PLAIN)["input_ids"]:
        ends = [len(decoded(tokenizer, ids[:number])) for number in range(1, len(ids) + 1)]
        found.append(list(zip([0, *ends], ends)))
    return found


def _candidates(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, whole: Sequence[int]
) -> Iterator[list[int]]:
    """Yield ids for a completion: those of the whole text from the first possible token on, else its own."""
    border = len(prompt)
    (offsets,) = offsets_of(tokenizer, [prompt + completion])
    if len(offsets) == len(whole):
        start = first_at(offsets, border)
        yield list(whole[start:])
        for number in range(start, min(start + NEAR, len(whole))):
            piece = (prompt + completion)[border : offsets[number][1]]
            for head in _inside(tokenizer, piece):
                yield head + list(whole[number + 1 :])
    yield from _inside(tokenizer, completion)


def _inside(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    """Yield ids that a text can have within another text."""
    for anchor in ("", *ANCHORS):
        before, ids = token_ids(tokenizer, [anchor, anchor + text])
        if before is not None and ids is not None and ids[: len(before)] == before and ids[len(before) :]:
            yield ids[len(before) :]
