"""Records to token ids: rendered, tokenised with one prompt for all completions, without limits of length."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import TYPE_CHECKING

from rlhf_pipeline.data.borders import completion_ids, first_at, offsets_of, token_ids
from rlhf_pipeline.data.files import RowFault
from rlhf_pipeline.data.pieces import Pieces, is_local, pieces_of
from rlhf_pipeline.data.records import Record, messages
from rlhf_pipeline.data.render import REASONING, REWRITTEN, Rendered, TemplateRefusal, as_plain, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 2048  # records whose texts are handed to the tokenizer at once
MANY = 64  # records from which on it pays to encode piece by piece
ACROSS = "token_across_border"
TURNS = "turns_dropped"
ADVICE = {
    REASONING: "the chat template removes the reasoning of replies: pairs that differ in it alone become equal, other "
    "rows train the answer alone; to keep it, set the value that the template has for this in `chat_template_kwargs`, "
    "or another `chat_template`",
    REWRITTEN: "the chat template writes the prompt otherwise where a reply follows it: the prompt is trained as it is "
    "sampled, and the reply follows it as the template has it",
    ACROSS: "the tokenizer puts a token across the end of the prompt: the prompt keeps its own ids, as in sampling",
    TURNS: "the prompt is too long: its first turns are left out, its system turn stays",
}
"""What a reason in `Counts.rows` means, and what to do."""
NEEDED = {
    "unknown_token": "text within the tokenizer's vocabulary",
    "refused_by_template": "conversations that the chat template accepts",
    "empty_prompt": "prompts with text",
    "tied_ranking": "rankings that prefer one completion to another",
    "identical_pair": "pairs of two different responses",
    "chunk_too_short": "longer texts",
}
"""What a split needs whose rows were all dropped, most of them for a reason that is not their length."""
SYSTEM_ROLES = ("system", "developer")
NOTHING = Rendered("", (), False)


@dataclass
class Counts:
    """What tokenisation dropped or cut, by reason, and the rows that cannot be tokenised.

    rows: the rows that were cut at the border or by the chat template, by reason.
    """

    dropped: Counter[str] = field(default_factory=Counter)
    truncated: Counter[str] = field(default_factory=Counter)
    faults: list[RowFault] = field(default_factory=list)
    rows: dict[str, list[str]] = field(default_factory=dict)

    def name(self, reason: str, where: str) -> None:
        """Count a row that was cut, and remember which one."""
        self.truncated[reason] += 1
        self.rows.setdefault(reason, []).append(where)


@dataclass
class Encoded:
    """One record's texts and ids before the length policy.

    prompt_ids, completions: None if the tokenizer has no token for part of the text.
    across: for each completion, whether a token reached across its border with the prompt.
    trained: of the prompt's tokens in a conversation; None: not asked for, or not a conversation.
    refused: what the chat template says of messages that it does not accept; there are no texts and ids then.
    """

    record: Record
    texts: Rendered
    prompt_ids: list[int] | None
    completions: list[list[int] | None]
    across: list[bool] = field(default_factory=list)
    trained: list[bool] | None = None
    refused: str | None = None


def encode(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, own_ids: bool, all_replies: bool = False
) -> Iterator[Encoded]:
    """Yield the token ids of each record, in their order.

    Args:
        own_ids: use the records' own token ids. all_replies: mark the assistant's turns in a conversation's prompt.

    Raises:
        DataError: there are messages, but the tokenizer has no chat template.
    """
    prefix, pieces, tried = _prefix(tokenizer), None, False
    records = iter(records)
    while batch := list(islice(records, BATCH)):
        if len(batch) >= MANY and not tried:
            pieces, tried = Pieces(tokenizer) if is_local(tokenizer) else None, True
        ready = [_rendered(record, tokenizer, own_ids and _has_ids(record), all_replies) for record in batch]
        items = [one.texts for one in ready if one.prompt_ids is None and one.refused is None]
        found = iter(_whole(items, tokenizer) if pieces is None else _by_piece(items, pieces))
        fresh = [one for one in ready if one.prompt_ids is None and one.refused is None]
        for one in fresh:
            one.prompt_ids, one.completions, one.across = next(found)
        marked = [one for one in fresh if one.texts.replies and one.prompt_ids is not None]
        for one, offsets in zip(marked, offsets_of(tokenizer, [one.texts.prompt for one in marked])):
            one.trained = _within(one.texts.replies, offsets)
        for one in fresh:
            if one.prompt_ids is not None and not one.texts.templated and one.prompt_ids[: len(prefix)] != prefix:
                one.prompt_ids = prefix + one.prompt_ids
        yield from ready


def _rendered(record: Record, tokenizer: PreTrainedTokenizerBase, done: bool, all_replies: bool) -> Encoded:
    """Return a record as text; with its own ids if it is `done`."""
    if done:
        prompt, completions = list(record.prompt_ids or ()), [list(ids) for ids in record.completion_ids or ()]
        return Encoded(record, as_plain(record), prompt, [*completions], [False] * len(completions))
    try:
        return Encoded(record, render(record, tokenizer, replies=all_replies and record.turns), None, [])
    except TemplateRefusal as refusal:
        return Encoded(record, NOTHING, None, [], refused=str(refusal))


Ids = tuple[list[int] | None, list[list[int] | None], list[bool]]
"""The ids of a prompt and of its completions, and whether a token of the whole text is across each border."""


def _whole(items: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Ids]:
    """Yield the ids of each item, from its prompt and its prompt with each completion."""
    found = iter(token_ids(tokenizer, [text for item in items for text in item.texts()]))
    for item in items:
        prompt, *wholes = [next(found) for _ in item.texts()]
        yield _split(tokenizer, item, [], prompt, wholes)


def _by_piece(items: Sequence[Rendered], pieces: Pieces) -> Iterator[Ids]:
    """As `_whole`, from the pieces of the prompt and of what follows its last cut."""
    parts = []
    for item in items:
        *head, last = pieces_of(item.prompt)[:-1] or [""]
        parts.append((head, [last], [pieces_of(last + completion) for completion in item.completions]))
    pieces.learn(chain.from_iterable(chain(head, last, *behind) for head, last, behind in parts))
    for item, (head, last, behind) in zip(items, parts):
        yield _split(pieces.tokenizer, item, pieces.ids(head), pieces.ids(last), map(pieces.ids, behind))


def _split(
    tokenizer: PreTrainedTokenizerBase,
    item: Rendered,
    head: list[int] | None,
    last: list[int] | None,
    wholes: Iterable[list[int] | None],
) -> Ids:
    """Cut the ids of whole texts at the border. Those of the prompt are `head + last`, of a text `head + whole`."""
    prompt = None if head is None or last is None else head + last
    completions: list[list[int] | None] = []
    across = []
    for text, whole in zip(item.completions, wholes):
        reaches = False
        if whole is None or prompt is None or last is None or head is None:
            completions.append(None)
        elif whole[: len(last)] == last:
            completions.append(whole[len(last) :])
        else:
            reaches = True
            completions.append(completion_ids(tokenizer, item.prompt, prompt, text, head + whole))
        across.append(reaches)
    return prompt, completions, across


def _within(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Return for each token whether it is in one of the spans of characters (start, end)."""
    inside = [False] * len(offsets)
    for start, end in spans:
        first, behind = first_at(offsets, start), first_at(offsets, end)
        inside[first:behind] = [True] * (behind - first)
    return inside


def with_fewer_turns(record: Record, tokenizer: PreTrainedTokenizerBase, longest: int) -> Record | None:
    """Return a conversation without its first turns, so that its prompt has at most `longest` tokens.

    The system's turn stays, and the first other turn is a user's. None: its last user's turn alone is too long.
    """
    turns = messages(record.prompt)
    first = next((number for number, turn in enumerate(turns) if turn["role"] not in SYSTEM_ROLES), len(turns))
    starts = [number for number in range(first + 1, len(turns)) if turns[number]["role"] == "user"]

    def after(start: int) -> Record:
        return replace(record, prompt=(*turns[:first], *turns[start:]))

    def fits(start: int) -> bool:
        made = next(encode([replace(after(start), kind="prompt", completions=(), ended=())], tokenizer, False))
        return made.prompt_ids is not None and len(made.prompt_ids) <= longest

    kept = bisect_left(starts, True, key=fits)
    return after(starts[kept]) if kept < len(starts) else None


def _has_ids(record: Record) -> bool:
    return (record.prompt_ids if record.kind == "prompt" else record.completion_ids) is not None


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the BOS that the tokenizer adds before a text, if it adds one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
