"""Records to token ids under one length policy for all stages.

A prompt longer than `lengths.prompt`, or than its longest completion leaves of `lengths.total`, is cut on the left; one
of messages loses whole turns there. An example with a completion longer than `lengths.response` (EOS included) is
dropped and counted. A completion gets a stop token (EOS unless the config names one) only if it ended and its text has
none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.data.encode import Counts, Encoded, encode, with_fewer_turns
from rlhf_pipeline.data.files import row_fault
from rlhf_pipeline.data.kinds import as_kind, ranks_of
from rlhf_pipeline.data.records import Messages, Record, messages
from rlhf_pipeline.data.tokenizers import stop_ids, text_of, tokenizer_digest
from rlhf_pipeline.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_pipeline.config.lengths import Lengths

Closer = Callable[[list[int], bool], list[int]]


@dataclass
class Example:
    """One prompt and its K completions as token ids; a completion includes its stop token if it `ended`."""

    prompt_ids: list[int]
    completions: list[list[int]]
    ended: list[bool]
    prompt_key: str
    where: str
    label_probability: float | None = None  # P(first preferred over second); None: a hard label
    prompt_text: str = ""
    completion_texts: tuple[str, ...] = ()
    ranks: tuple[int, ...] | None = None  # of a ranking, ascending; equal ones are ties. None: best first, no ties
    prompt_truncated: bool = False
    trained: list[bool] | None = None  # of the tokens of the only completion: whether SFT trains it; None: all
    messages: Messages | None = None  # of a chat: the turns of the whole prompt
    columns: Mapping[str, Any] = field(default_factory=dict)  # of the row; a format reads none of them

    @property
    def tokens_trained(self) -> int:
        """The number of completion tokens that SFT trains."""
        return sum(map(len, self.completions)) if self.trained is None else sum(self.trained)

    def untied(self) -> list[tuple[int, int]]:
        """Return the pairs (i, j) in which completion i is preferred to j.

        A pair gives [(0, 1)]; a single completion gives [].
        """
        if len(self.completions) == 2 and self.ranks is None:
            return [(0, 1)]
        return untied(self.completions, self.ranks)


def untied(completions: Sequence[list[int]], ranks: Sequence[int] | None = None) -> list[tuple[int, int]]:
    """Return the pairs (i, j) in which completion i ranks above j; equal responses form no pair.

    Args:
        ranks: one per completion, 1 for the best; None: completions are ordered best first, without ties.
    """
    ranks = range(len(completions)) if ranks is None else ranks
    pairs = combinations(range(len(completions)), 2)
    ordered = ((i, j) if ranks[i] < ranks[j] else (j, i) for i, j in pairs if ranks[i] != ranks[j])
    return [(i, j) for i, j in ordered if completions[i] != completions[j]]


def tokenize(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerBase,
    lengths: Lengths,
    *,
    source_tokenizer_digest: str | None = None,
    kind: str | None = None,
    all_replies: bool = False,
) -> tuple[list[Example], Counts]:
    """Turn records into examples, in their order.

    Args:
        records: all of one kind, or of any kinds that convert to `kind`.
        tokenizer: must have an EOS token.
        lengths: limits in tokens: `prompt`, `response` (with EOS) and `total`.
        source_tokenizer_digest: digest of the tokenizer of the records' own token ids. The ids are used if it is the
            digest of `tokenizer`; otherwise the texts are tokenised again.
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
    own_ids = source_tokenizer_digest is not None and source_tokenizer_digest == tokenizer_digest(tokenizer)
    examples: list[Example] = []
    closed = _closer(tokenizer)
    for encoded in encode(records, tokenizer, own_ids, counts, all_replies):
        if encoded.record.kind == "text":
            examples += _chunks(encoded, closed, lengths.total, counts)
            continue
        shorter: Encoded | None = encoded
        room = _room(_ended(encoded, closed), lengths)
        if encoded.texts.templated and len(encoded.prompt_ids) > room:
            shorter = with_fewer_turns(encoded, tokenizer, room, counts, all_replies)
        example = None if shorter is None else _fit(shorter, tokenizer, closed, lengths, counts)
        examples += [] if example is None else [example]
    return examples, counts


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


def whole_sequence(example: Example) -> Example:
    """Return the example with all but its first prompt token moved into its one completion.

    Raises:
        ValueError: it has not exactly one completion.
    """
    if len(example.completions) != 1:
        raise ValueError(f"{example.where}: expected one completion, found {len(example.completions)}")
    joined = example.prompt_ids[1:] + example.completions[0]
    return replace(example, prompt_ids=example.prompt_ids[:1], completions=[joined], trained=None)


def _fit(
    encoded: Encoded, tokenizer: PreTrainedTokenizerBase, closed: Closer, lengths: Lengths, counts: Counts
) -> Example | None:
    record, prompt, bos = encoded.record, encoded.prompt_ids, tokenizer.bos_token_id
    completions = _ended(encoded, closed)
    if not prompt and bos is None:
        fix = "give a prompt, or a tokenizer with a BOS token"
        counts.faults.append(row_fault(record.where, "empty_prompt", "the prompt has no token", "a prompt", fix))
        return None
    if not all(completions):
        counts.faults.append(row_fault(record.where, "empty_completion", "a completion has no token", "a response"))
        return None
    ended, texts, ranks = list(record.ended), encoded.texts.completions, None
    shortened = False
    if record.kind == "ranking":  # completions that are too long are dropped; the others are ordered best first
        places = ranks_of(record)
        fitting = [k for k, ids in enumerate(completions) if len(ids) <= lengths.response]
        shortened = len(fitting) < len(completions)
        order = sorted(fitting, key=places.__getitem__)
        completions, ended = [completions[k] for k in order], [ended[k] for k in order]
        texts, ranks = tuple(texts[k] for k in order), tuple(places[k] for k in order)
    reason = _left_out(record.kind, completions, ranks, lengths.response)
    if reason is not None:
        counts.dropped[reason] += 1
        return None
    if shortened:
        counts.truncated["ranking_shortened"] += 1
    prompt = prompt or [bos]
    room = _room(completions, lengths)
    truncated = encoded.truncated or len(prompt) > room
    if len(prompt) > room:
        counts.truncated["prompt_truncated"] += 1
    prompt = cut_prompt(prompt, room, bos)
    example = Example(
        prompt,
        completions,
        ended,
        record.prompt_key,
        record.where,
        record.extra.get("label_probability"),
        encoded.texts.prompt,
        texts,
        ranks,
        truncated,
        messages=messages(record.prompt) if record.conversational and record.prompt is not None else None,
        columns=record.columns,
    )
    return _with_replies(example, encoded.trained) if encoded.trained and any(encoded.trained) else example


def _with_replies(example: Example, trained: list[bool]) -> Example:
    """Move the border to the first trained token of the prompt."""
    border = max(trained.index(True), 1)  # at least one token of prompt
    completion = example.completions[0]
    return replace(
        example,
        prompt_ids=example.prompt_ids[:border],
        completions=[example.prompt_ids[border:] + completion],
        trained=trained[border:] + [True] * len(completion),
    )


def cut_prompt(ids: list[int], longest: int, bos: int | None) -> list[int]:
    """Return the last `longest` tokens of a prompt; a BOS at its beginning stays, for models that need it there."""
    if len(ids) <= longest:
        return ids
    return [ids[0], *ids[1 - longest :]] if ids[0] == bos and longest > 1 else ids[-longest:]


def _room(completions: Sequence[list[int]], lengths: Lengths) -> int:
    """Return the most tokens that a prompt may have before completions; those that are too long do not count."""
    longest = max((len(ids) for ids in completions if len(ids) <= lengths.response), default=0)
    return min(lengths.prompt, lengths.total - longest)


def _ended(encoded: Encoded, closed: Closer) -> list[list[int]]:
    """Return the completions with a stop token where they ended."""
    return [closed(ids, ended) for ids, ended in zip(encoded.completions, encoded.record.ended)]


def _left_out(kind: str, completions: list[list[int]], ranks: Sequence[int] | None, longest: int) -> str | None:
    """Return why an example cannot be used (too long, or no preference); None if it can."""
    if any(len(ids) > longest for ids in completions):
        return "completion_too_long"
    if kind == "pair":
        return "identical_pair" if completions[0] == completions[1] else None
    if ranks is None or untied(completions, ranks):
        return None
    if len(completions) < 2:
        return "completion_too_long"  # the others were
    return "tied_ranking" if len(set(ranks)) == 1 else "identical_pair"


def _closer(tokenizer: PreTrainedTokenizerBase) -> Closer:
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


def _chunks(encoded: Encoded, closed: Closer, total: int, counts: Counts) -> list[Example]:
    """Cut a text into sequences of at most `total` tokens; the first token of each is its prompt."""
    record = encoded.record
    ended = record.ended[0]
    ids = closed(encoded.prompt_ids + encoded.completions[0], ended)
    starts = range(0, len(ids), total)
    counts.truncated["text_cut_into_chunks"] += len(starts) > 1
    examples = []
    for start in starts:
        chunk = ids[start : start + total]
        if len(chunk) < 2:
            counts.dropped["chunk_too_short"] += 1
            continue
        last = start + total >= len(ids)
        examples.append(Example(chunk[:1], [chunk[1:]], [ended and last], record.prompt_key, record.where))
    return examples
