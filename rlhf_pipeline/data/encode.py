"""Records to token ids: rendered, tokenised with one prompt for all completions, without limits of length."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import TYPE_CHECKING

from rlhf_pipeline.data.borders import completion_ids, first_at, offsets_of, token_ids
from rlhf_pipeline.data.files import RowFault, row_fault
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
SYSTEM_ROLES = ("system", "developer")


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
    """One record's texts and ids before the length policy."""

    record: Record
    texts: Rendered
    prompt_ids: list[int]
    completions: list[list[int]]
    trained: list[bool] | None = None  # of the prompt's tokens, in a conversation
    truncated: bool = False


def encode(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    own_ids: bool,
    counts: Counts,
    all_replies: bool = False,
) -> Iterator[Encoded]:
    """Yield the token ids of records, in their order; what cannot be encoded or was cut is counted.

    Args:
        own_ids: use the records' own token ids. all_replies: mark the assistant's turns in a conversation's prompt.

    Raises:
        DataError: there are messages, but the tokenizer has no chat template.
    """
    prefix = _prefix(tokenizer)
    pieces = Pieces(tokenizer) if len(records) >= MANY and is_local(tokenizer) else None
    for start in range(0, len(records), BATCH):
        ready: list[tuple[Record, Rendered, bool]] = []
        for record in records[start : start + BATCH]:
            done = own_ids and _has_ids(record)
            replies = all_replies and record.turns
            try:
                item = as_plain(record) if done else render(record, tokenizer, replies=replies)
                ready.append((record, item, done))
            except TemplateRefusal as refusal:
                found = f"the chat template refuses these messages: {refusal}"
                counts.faults.append(row_fault(record.where, "refused_by_template", found))
        open_items = [item for _, item, done in ready if not done]
        encoded = iter(_whole(open_items, tokenizer) if pieces is None else _by_piece(open_items, pieces))
        groups = [None if done else next(encoded) for _, _, done in ready]
        marked = [item.prompt for (_, item, _), group in zip(ready, groups) if item.replies and group is not None]
        offsets = iter(offsets_of(tokenizer, marked))
        for (record, item, done), group in zip(ready, groups):
            if done:
                completions = [list(tokens) for tokens in record.completion_ids or ()]
                yield Encoded(record, item, list(record.prompt_ids or ()), completions)
                continue
            if group is None:
                found = "text that the tokenizer has no token for"
                counts.faults.append(row_fault(record.where, "unknown_token", found, "text within its vocabulary"))
                continue
            prompt, completions, across = group
            for reason in item.notes:
                counts.name(reason, record.where)
            if across:
                counts.name(ACROSS, record.where)
            trained = _within(item.replies, next(offsets)) if item.replies else None
            start_ids = [] if item.templated or prompt[: len(prefix)] == prefix else prefix
            yield Encoded(record, item, start_ids + prompt, completions, trained)


Ids = tuple[list[int], list[list[int]], bool]
"""The ids of a prompt and of its completions, and whether a token of the whole text is across their border."""


def _whole(items: Sequence[Rendered], tokenizer: PreTrainedTokenizerBase) -> Iterator[Ids | None]:
    """Yield the ids of each item, from its prompt and its prompt with each completion; None if a text has none."""
    found = iter(token_ids(tokenizer, [text for item in items for text in item.texts()]))
    for item in items:
        prompt, *wholes = [next(found) for _ in item.texts()]
        yield _split(tokenizer, item, [], prompt, wholes)


def _by_piece(items: Sequence[Rendered], pieces: Pieces) -> Iterator[Ids | None]:
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
) -> Ids | None:
    """Cut the ids of whole texts at the border. Those of the prompt are `head + last`, of a text `head + whole`."""
    if head is None or last is None:
        return None
    completions, across = [], False
    for text, whole in zip(item.completions, wholes):
        if whole is None:
            return None
        if whole[: len(last)] == last:
            completions.append(whole[len(last) :])
        else:
            across = True
            completions.append(completion_ids(tokenizer, item.prompt, head + last, text, head + whole))
    return head + last, completions, across


def _within(spans: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[bool]:
    """Return for each token whether it is in one of the spans of characters (start, end)."""
    inside = [False] * len(offsets)
    for start, end in spans:
        first, behind = first_at(offsets, start), first_at(offsets, end)
        inside[first:behind] = [True] * (behind - first)
    return inside


def with_fewer_turns(
    encoded: Encoded, tokenizer: PreTrainedTokenizerBase, longest: int, counts: Counts, all_replies: bool
) -> Encoded | None:
    """Return a conversation without its first turns, so that its prompt has at most `longest` tokens.

    The system's turn stays, and the first other turn is a user's. None: its last user's turn alone is too long.
    """
    record = encoded.record
    turns = messages(record.prompt)
    first = next((number for number, turn in enumerate(turns) if turn["role"] not in SYSTEM_ROLES), len(turns))
    starts = [number for number in range(first + 1, len(turns)) if turns[number]["role"] == "user"]

    def after(start: int) -> Record:
        return replace(record, prompt=(*turns[:first], *turns[start:]))

    def fits(start: int) -> bool:
        prompt = replace(after(start), kind="prompt", completions=(), ended=())
        made = next(encode([prompt], tokenizer, False, Counts()), None)
        return made is not None and len(made.prompt_ids) <= longest

    kept = bisect_left(starts, True, key=fits)
    rest = [after(start) for start in starts[kept : kept + 1]]
    made = next(encode(rest, tokenizer, False, Counts(), all_replies), None)
    if made is None:
        counts.dropped["prompt_too_long"] += 1
        return None
    counts.name(TURNS, record.where)
    return replace(made, record=record, truncated=True)


def _has_ids(record: Record) -> bool:
    return (record.prompt_ids if record.kind == "prompt" else record.completion_ids) is not None


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the BOS that the tokenizer adds before a text, if it adds one."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
