"""Read rows with preferences: pairs and rankings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from rlhf_pipeline.data.columns import IDENTICAL, SourceRow, alike, alpaca_parts, alpaca_prompt
from rlhf_pipeline.data.records import Record, Text, shared_length
from rlhf_pipeline.errors import did_you_mean

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
STRAY_HUMAN = re.compile(r"(?<!\n\n)\bHuman:")
PROMPT_NAMES = ("question", "instruction", "query", "input", "context")
"""Column names that other data sets use for the prompt, the one that is read first."""
SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("rating_chosen", "rating_rejected"),
    ("chosen_rating", "rejected_rating"),
)
"""Columns that other data sets use for the scores behind a label."""
MARGIN = "margin"
"""The column with the margin of a pair. It counts as not read, because a stage uses it only if told to."""


def is_transcript(value: Any) -> bool:
    """Whether `value` is a conversation as one text, as in Anthropic's HH-RLHF data."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and ASSISTANT in value


def pair(row: SourceRow) -> Record | None:
    """Read a pair whose prompt has its own column."""
    name = prompt_column(row.columns) or "prompt"
    alpaca = name == "instruction" and "input" in row.columns
    own = alpaca_prompt(row) if alpaca else row.text(name)
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if own is None or chosen is None or rejected is None:
        return None
    if isinstance(own, str) and all(not isinstance(side, str) and len(side) > 1 for side in (chosen, rejected)):
        return _common(row, chosen, rejected)  # whole conversations that repeat the prompt column
    prompt = own if alpaca else row.with_system(own)
    if prompt is None:
        return None
    for begin in (own, prompt):
        sides = [side for side in (chosen, rejected) if not isinstance(side, str) and len(side) > len(begin)]
        if not isinstance(begin, str) and len(sides) == 2 and all(side[: len(begin)] == begin for side in sides):
            chosen, rejected = chosen[len(begin) :], rejected[len(begin) :]
            break
    record = finish_pair(row, prompt, chosen, rejected)
    return replace(record, instruction=alpaca_parts(row)) if record and alpaca and isinstance(prompt, str) else record


def implicit(row: SourceRow) -> Record | None:
    """Read a pair whose prompt is the common beginning of both sides."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen is None or rejected is None:
        return None
    if isinstance(chosen, str) != isinstance(rejected, str):
        row.fault("wrong_type", "'chosen' and 'rejected' are text and a list", "two of a kind")
        return None
    return _common(row, chosen, rejected)


def prompt_column(columns: Iterable[str]) -> str | None:
    """Return the column that is the prompt of pairs; None if there is none, so that both sides begin with it."""
    there = set(columns)
    return next((name for name in ("prompt", *PROMPT_NAMES) if name in there), None)


def unread_prompt(columns: Iterable[str]) -> str | None:
    """Return the column that looks like a misspelt prompt and is not read; None if there is none."""
    there = {str(column).lower(): column for column in columns}
    near = [name for name in PROMPT_NAMES if name in there]  # in capitals
    near += [name for name in there if did_you_mean(name, ["prompt"]) and not name.startswith("prompt_")]
    return there[near[0]] if near else None


def _common(row: SourceRow, chosen: Text, rejected: Text) -> Record | None:
    if chosen == rejected:
        row.fault(IDENTICAL, "'chosen' equals 'rejected'", "two different responses", "drop the row")
        return None
    shared = shared_length(chosen, rejected)
    if isinstance(chosen, str):
        # Back to the last word boundary, so that no word is split; a space belongs to the word after it.
        boundary = re.search(r"\s\S*\Z", chosen[:shared])
        cut = 0 if boundary is None else boundary.start() + (chosen[boundary.start()] != " ")
    else:
        cut = min(shared, len(chosen) - 1, len(rejected) - 1)
    if not cut or (isinstance(chosen, str) and not chosen[:cut].strip()):
        unread = None if row.has("prompt") else unread_prompt(filter(row.has, row.values))
        fix = "" if unread is None else f"the column {unread!r} is not read; did you mean prompt?"
        row.fault("prompts_differ", "'chosen' and 'rejected' have no common beginning", "one prompt for both", fix)
        return None
    prompt = row.with_system(chosen[:cut])
    return None if prompt is None else finish_pair(row, prompt, chosen[cut:], rejected[cut:])


def hh(row: SourceRow) -> Record | None:
    """Read a pair of HH transcripts, whose prompt ends with the last "Assistant:"."""
    chosen, rejected = row.string("chosen"), row.string("rejected")
    if chosen is None or rejected is None:
        return None
    prompts, replies = [], []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        end = text.rfind(ASSISTANT)
        if end < text.rfind(HUMAN) or end < 0:
            row.fault("no_assistant_turn", f"{name!r} does not end in a turn of Assistant", "an Assistant turn")
            return None
        prompts.append(text[: end + len(ASSISTANT)])
        replies.append(text[end + len(ASSISTANT) :])
        if STRAY_HUMAN.search(text.lstrip(), 1):
            # A turn of Human within a paragraph: the end of the reply before it is unknown.
            row.fault("no_assistant_turn", f"{name!r} has a 'Human:' that does not begin a paragraph", "whole turns")
    if prompts[0] != prompts[1]:
        row.fault("prompts_differ", "'chosen' and 'rejected' differ before the last reply", "one prompt for both")
        return None
    return finish_pair(row, prompts[0], replies[0], replies[1])


def finish_pair(
    row: SourceRow, prompt: Text, chosen: Text, rejected: Text, names: tuple[str, str] = ("chosen", "rejected")
) -> Record | None:
    """Check a pair and return its record; `names` are the columns of both sides, for messages."""
    ids = row.all_ids("prompt_ids", "chosen_ids", "rejected_ids")
    prompt, (chosen, rejected) = alike(prompt, (chosen, rejected))
    ended = (row.flag("chosen_ended"), row.flag("rejected_ended"))
    for name, text in zip(names, (chosen, rejected)):
        row.completion(name, text, empty=ids is not None)
    if ids is None and chosen == rejected and ended[0] == ended[1]:
        row.fault(IDENTICAL, f"{names[0]!r} equals {names[1]!r}", "two different responses", "drop the row")
    row.check_prompt(prompt)
    extra = {}
    if row.has("label_probability"):
        extra["label_probability"] = row.number("label_probability", row.values["label_probability"], 0, 1)
    if row.has(MARGIN):
        extra[MARGIN] = row.number(MARGIN, row.values[MARGIN])
    prompt_ids, completion_ids = (ids[0], ids[1:]) if ids else (None, None)
    return Record("pair", prompt, (chosen, rejected), ended, "", None, prompt_ids, completion_ids, extra)


def ranking(row: SourceRow) -> Record | None:
    """Read a ranking of two or more completions by their ranks or scores."""
    prompt, values = row.prompt(), row.value("completions")
    if prompt is None or values is None:
        return None
    if not isinstance(values, (list, tuple)) or len(values) < 2:
        row.fault("wrong_type", "'completions' is not a list of two or more", "a list of responses")
        return None
    texts = [row.as_text(f"completions[{i}]", value) for i, value in enumerate(values)]
    given = tuple(text for text in texts if text is not None)
    measure = "ranks" if row.has("ranks") else "scores"
    measures = row.value(measure)
    ended = row.values.get("ended")
    flags = [True if ended is None else ended] * len(values) if not isinstance(ended, list) else ended
    if measures is None or len(given) < len(texts):
        return None
    if not isinstance(measures, list) or len(measures) != len(values) or len(flags) != len(values):
        found = f"{measure!r} or 'ended' has another length than 'completions'"
        row.fault("wrong_type", found, "one per completion")
        return None
    numbers = tuple(row.number(f"{measure}[{i}]", value) for i, value in enumerate(measures))
    prompt, completions = alike(prompt, given)
    prompt_ids, completion_ids = None, None
    if row.has("completion_ids") or row.has("prompt_ids"):
        prompt_ids, lists = row.ids("prompt_ids"), row.value("completion_ids")
        if prompt_ids is None or not isinstance(lists, list) or len(lists) != len(values):
            row.fault("wrong_type", "'completion_ids' is not one list per completion", "lists of token ids")
            return None
        read = [row.as_ids(f"completion_ids[{i}]", value) for i, value in enumerate(lists)]
        completion_ids = tuple(ids for ids in read if ids is not None)
    for i, text in enumerate(completions):
        row.completion(f"completions[{i}]", text, empty=completion_ids is not None)
    row.check_prompt(prompt)
    ended = tuple(row.as_flag(f"ended[{i}]", flag) for i, flag in enumerate(flags))
    return Record("ranking", prompt, completions, ended, "", None, prompt_ids, completion_ids, {measure: numbers})


def against_label(values: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> str | None:
    """Compare a row's label with its scores: "contradicted", "equal", or None if they agree or are not known.

    Ranks are compared with scores, `chosen` and `rejected` with the columns of `SCORES` that the source has. A label
    that was drawn with a known probability contradicts nothing.
    """
    gaps: list[float] = []
    if _numbers(values.get("ranks")) and _numbers(values.get("scores")):
        measures = list(zip(values["ranks"], values["scores"]))
        signs = [(b[0] - a[0]) * (a[1] - b[1]) for a, b in combinations(measures, 2)]
        gaps = [min(signs, default=0)] if min(signs, default=0) < 0 else []
    elif values.get("label_probability") is None:
        both: list[Any] = [[values.get(name) for name in names] for names in columns]
        gaps = [pair[0] - pair[1] for pair in both if _numbers(pair)]
    if not gaps or min(gaps) > 0:
        return None
    return "contradicted" if min(gaps) < 0 else "equal"


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) in (int, float) for one in value)
