"""What labelling is about: items, responses, actions of labelers, and their judgements."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Message = dict[str, str]
Text = str | list[Message]
"""A text, or messages with `role` and `content`."""

MAX_NOTE = 4000
MAX_RESPONSES = 9


class Part(BaseModel):
    """A value that does not change and has no other keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Response(Part):
    """One response to the prompt of an item.

    source: the model that gave it (`sft@v1`), or None where a file gave it. Labelers never see it.
    """

    text: Text
    source: str | None = None
    ids: list[int] | None = None
    ended: bool = True


class Item(Part):
    """A prompt and its K responses, 2 to 9, in the order of their numbers k = 0 ... K - 1.

    kind: `rank` (rank all responses), or `arena` (which of two models is better).
    columns: what the source's row had besides, such as `prompt_ids`.
    """

    number: int
    kind: Literal["rank", "arena"] = "rank"
    prompt: Text
    responses: list[Response] = Field(min_length=2, max_length=MAX_RESPONSES)
    split: str | None = None
    columns: dict[str, Any] = {}


class RankAction(Part):
    """All ranks at once, one per response k: 1 is the best, equal numbers are ties, None: not ranked yet."""

    kind: Literal["rank"] = "rank"
    ranks: list[Annotated[int, Field(ge=1, le=MAX_RESPONSES)] | None]


class RateAction(Part):
    """The overall quality of response k on the Likert scale; None takes the rating back."""

    kind: Literal["rate"] = "rate"
    response: int = Field(ge=0, lt=MAX_RESPONSES)
    value: int | None


class FlagAction(Part):
    """The answer to a yes/no question about response k; None takes it back."""

    kind: Literal["flag"] = "flag"
    response: int = Field(ge=0, lt=MAX_RESPONSES)
    flag: str
    value: bool | None


class NoteAction(Part):
    """The labeler's note on the item."""

    kind: Literal["note"] = "note"
    text: str = Field(max_length=MAX_NOTE)


class SubmitAction(Part):
    """The item is done; every response must have a rank."""

    kind: Literal["submit"] = "submit"


class SkipAction(Part):
    """The item is left out, and why."""

    kind: Literal["skip"] = "skip"
    reason: str = Field(min_length=1, max_length=MAX_NOTE)


class UndoAction(Part):
    """Takes back the last action of the task that is not taken back yet (also a submit or a skip)."""

    kind: Literal["undo"] = "undo"


Action = Annotated[
    RankAction | RateAction | FlagAction | NoteAction | SubmitAction | SkipAction | UndoAction,
    Field(discriminator="kind"),
]


class TaskState(Part):
    """A task as the labeler left it: what all actions together that are not taken back amount to."""

    task: int
    item: int
    repeat: int = 0  # 0: the labeler's first sight of the item; 1: shown again, for self-consistency
    shown: list[int]  # order on the page: shown[0] is the number k of the first response
    ranks: list[int | None]  # by k, as in RankAction
    ratings: list[int | None]  # by k
    flags: list[dict[str, bool]]  # by k
    note: str = ""
    status: Literal["open", "done", "skipped"] = "open"
    reason: str = ""  # of a skip
    actions: int = 0  # not taken back: what undo can take back
    seconds: float = 0.0  # from the first sight to the last action, five minutes at most of each pause


class Judgement(Part):
    """A finished task of one labeler, who is a number here: the labeler's name leaves the storage in no export."""

    labeler: int
    item: int
    repeat: int
    shown: list[int]
    ranks: list[int]  # by k; dense: the best is 1, the next lower group is 2, ...
    ratings: list[int | None]
    flags: list[dict[str, bool]]
    note: str = ""
    skipped: bool = False  # then ranks is empty
    reason: str = ""
    seconds: float
    at: float  # Unix time of the submit
