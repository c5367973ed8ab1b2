"""Read the columns of public preference data sets as they are published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from rlhf_pipeline.data.columns import TIED, Schema, SourceRow
from rlhf_pipeline.data.files import RowFault, Rows
from rlhf_pipeline.data.preferences import finish_pair, ranking
from rlhf_pipeline.data.records import Record, Text

OASST_ROLES = {"prompter": "user", "assistant": "assistant"}


def _pair(row: SourceRow, prompt: Text | None, better: str, worse: str) -> Record | None:
    """Read a pair from two columns that are named after their place, not after their label."""
    sides = row.text(better), row.text(worse)
    if prompt is None or sides[0] is None or sides[1] is None:
        return None
    return finish_pair(row, prompt, sides[0], sides[1], (better, worse))


def _choice(row: SourceRow, column: str) -> int | None:
    """Read a required 0 or 1."""
    value = row.value(column)
    if value is not None and value not in (0, 1):
        row.fault("wrong_type", f"{column!r} is neither 0 nor 1", "0 or 1")
        return None
    return None if value is None else int(value)


def _by_strength(prompt: str, first: str, second: str, column: str, label: str) -> Schema:
    """The format of pairs whose label is a strength: negative if the first response is better, 0 for a tie."""

    def read(row: SourceRow) -> Record | None:
        value = row.value(column)
        strength = None if value is None else row.number(column, value)
        if strength is None:
            return None
        if strength == 0:
            row.skipped = TIED
        return _pair(row, row.text(prompt), *((first, second) if strength <= 0 else (second, first)))

    return Schema((prompt, first, second, column), read, label)


def _pku(row: SourceRow) -> Record | None:
    better = _choice(row, "better_response_id")
    return None if better is None else _pair(row, row.text("prompt"), f"response_{better}", f"response_{1 - better}")


def _shp(row: SourceRow) -> Record | None:
    first = _choice(row, "labels")
    names = ("human_ref_A", "human_ref_B")
    return None if first is None else _pair(row, row.text("history"), *(names if first else names[::-1]))


def _tldr(row: SourceRow) -> Record | None:
    choice, info, summaries = _choice(row, "choice"), row.value("info"), row.value("summaries")
    if choice is None or info is None or summaries is None:
        return None
    texts = [one.get("text") if isinstance(one, dict) else None for one in _list(summaries)]
    post = {key: value for key, value in info.items() if value is not None} if isinstance(info, dict) else {}
    if len(texts) != 2 or not {"post", "article"} & set(post):
        row.fault("wrong_type", "'info' has no post, or 'summaries' are not two", "an info with a post, two summaries")
        return None
    if "post" in post:
        prompt = f"SUBREDDIT: r/{post.get('subreddit', '')}\n\nTITLE: {post.get('title', '')}\n\nPOST: {post['post']}"
    else:
        prompt = f"TITLE: {post.get('title', '')}\n\n{post['article']}"
    names = f"summaries[{choice}].text", f"summaries[{1 - choice}].text"
    better, worse = (row.as_text(name, texts[place]) for name, place in zip(names, (choice, 1 - choice)))
    if better is None or worse is None:
        return None
    return finish_pair(row, f"{prompt}\n\nTL;DR:", better, worse, names)


def _ranked(prompt: str, column: str, text: str, measures: tuple[str, ...], label: str) -> Schema:
    """The format of rankings whose completions are a list of objects, each with its own rank or score."""

    def read(row: SourceRow) -> Record | None:
        listed = row.value(column)
        if row.value(prompt) is None or listed is None:
            return None
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            row.fault("wrong_type", f"{column!r} is not a list of objects", f"objects with {text} and {measures[0]}")
            return None
        measure = next((name for name in measures if all(one.get(name) is not None for one in listed)), measures[0])
        ours = {
            "prompt": row.values[prompt],
            "completions": [one.get(text) for one in listed],
            "ranks" if measure == "rank" else "scores": [one.get(measure) for one in listed],
        }
        inner = SourceRow(row.where, ours)
        record = ranking(inner)
        row.faults += inner.faults
        return record

    return Schema((prompt, column), read, label, objects=column)


def _rated(column: str, label: str) -> Schema:
    """The format of rated responses, which are a row each: the responses to a prompt are ranked by their ratings."""

    def gather(rows: Rows) -> tuple[Rows, list[RowFault]]:
        gathered: dict[tuple[Any, Any], tuple[str, dict[str, Any]]] = {}
        faults: list[RowFault] = []
        for where, values in rows:
            row = SourceRow(where, values)
            prompt, response, split, ended = row.text("prompt"), row.text("response"), row.split(), row.flag("ended")
            score = row.value(column)
            score = None if score is None else row.number(column, score)
            faults += [replace(item, split=split) for item in row.faults]
            if not row.faults:
                first: dict[str, Any] = {"prompt": prompt, "completions": [], "scores": [], "ended": [], "split": split}
                _, into = gathered.setdefault((str(prompt), split), (where, first))
                into["completions"].append(response)
                into["scores"].append(score)
                into["ended"].append(ended)
        return [*gathered.values()], faults

    return Schema(("prompt", "response", column), _several, label, also=("ended",), gather=gather)


def _several(row: SourceRow) -> Record | None:
    """Read a gathered ranking; a prompt with a single response makes no record."""
    if len(row.values["completions"]) < 2:
        row.skipped = "single_response"
        return None
    return ranking(row)


def _trees(rows: Rows) -> tuple[Rows, list[RowFault]]:
    """Make a ranking of each user's turn of the trees, from its ranked replies."""
    found = [
        (f"{where} (prompt {number})", turn | {"split": values.get("split")})
        for where, values in rows
        for number, (_, turn) in enumerate(_turns(values.get("prompt"), where), 1)
    ]
    return found, []


def _flat(rows: Rows) -> tuple[Rows, list[RowFault]]:
    """Make a ranking of each user's turn of the messages, which name their parents."""
    nodes = {str(row.get("message_id")): {**row, "replies": [], "where": where} for where, row in rows}
    roots: list[dict[str, Any]] = []
    for node in nodes.values():
        parent = nodes.get(str(node.get("parent_id")))
        (roots if parent is None or parent is node else parent["replies"]).append(node)
    found = [(where, turn | {"split": root.get("split")}) for root in roots for where, turn in _turns(root, "")]
    return found, []


def _turns(root: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the user's turns of a tree, each with the conversation up to it and its replies with their ranks.

    Messages that were deleted or rejected in review are left out, with all replies to them.
    """
    waiting: list[tuple[Any, list[dict[str, Any]]]] = [(root, [])]
    while waiting:
        node, before = waiting.pop(0)
        if not isinstance(node, dict) or node.get("deleted") or node.get("review_result") is False:
            continue
        role, text = node.get("role"), node.get("text")
        path = [*before, {"role": OASST_ROLES.get(role, role) if isinstance(role, str) else role, "content": text}]
        replies = _list(node.get("replies"))
        waiting += [(reply, path) for reply in replies]
        if role != "assistant":
            kept = [one for one in replies if isinstance(one, dict) and not one.get("deleted")]
            kept = [one for one in kept if one.get("review_result") is not False and one.get("rank") is not None]
            texts, ranks = [one.get("text") for one in kept], [one["rank"] for one in kept]
            yield node.get("where", where), {"prompt": path, "completions": texts, "ranks": ranks}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


_OASST = ("rank", "deleted", "review_result", "replies")
SCHEMAS = [
    _by_strength("context", "response1", "response2", "overall_preference", "pair, HelpSteer3"),
    _by_strength("prompt", "response_1", "response_2", "preference_strength", "pair, HelpSteer2"),
    _by_strength("prompt", "response_1", "response_2", "preference", "pair, two responses with a strength"),
    Schema(("prompt", "response_0", "response_1", "better_response_id"), _pku, "pair, PKU-SafeRLHF"),
    Schema(("history", "human_ref_A", "human_ref_B", "labels"), _shp, "pair, SHP"),
    Schema(("info", "summaries", "choice"), _tldr, "pair, TL;DR comparisons"),
    _ranked("prompt", "answers", "answer", ("rank",), "ranking, Nectar"),
    _ranked(
        "instruction", "completions", "response", ("fine-grained_score", "overall_score"), "ranking, UltraFeedback"
    ),
    _rated("helpfulness", "ranking, HelpSteer2 by helpfulness"),
    _rated("rating", "ranking, rated responses"),
    Schema(("message_id", "parent_id", "role", "text"), _several, "ranking, OpenAssistant", _OASST, gather=_flat),
    Schema(("message_tree_id", "prompt"), _several, "ranking, OpenAssistant trees", gather=_trees),
]
"""The formats of public data sets; each has columns that no other format has."""
