"""What the labelling page and its server say to each other.

Everything is by place on the page, never by a response's number k: what a browser gets says nothing of which model a
response is from.
"""

from __future__ import annotations

from pydantic import Field

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.labelling.kinds import Action, FlagAction, Item, Part, RankAction, RateAction, TaskState
from rlhf_pipeline.labelling.markdown import Turn, turns
from rlhf_pipeline.labelling.store import Progress, Refused


class Join(Part):
    """Who is labelling; the token of a server that other machines reach."""

    name: str = Field(max_length=200)
    token: str | None = Field(default=None, max_length=200)


class Joined(Part):
    """The labeler's name as it is kept, and the CSRF token that every POST of the session must carry."""

    csrf: str
    name: str


class Sent(Part):
    """One action on a task, with an id that the browser made; response numbers are places on the page."""

    task: int = Field(ge=0, lt=2**63)
    client: str = Field(max_length=64)
    action: Action


class Back(Part):
    """Opens the task before this one again; None: the last."""

    task: int | None = Field(ge=0, lt=2**63)


class PlacedState(Part):
    """A task's state by place on the page, without what tells the places' responses apart."""

    task: int
    ranks: list[int | None]
    ratings: list[int | None]
    flags: list[dict[str, bool]]
    note: str
    status: str
    reason: str
    actions: int
    seconds: float


class PlacedResponse(Part):
    """A response as the page shows it."""

    turns: list[Turn]
    ended: bool


class Shown(Part):
    """An item as the page shows it. earlier: whether the labeler has a task before it."""

    task: int
    kind: str
    prompt: list[Turn]
    responses: list[PlacedResponse]
    earlier: bool


class Answer(Part):
    """What the page gets: the state of a task, how far the labeler is, and the item where it is a new one."""

    state: PlacedState | None
    progress: Progress
    item: Shown | None = None


class Question(Part):
    """A yes/no question."""

    key: str
    text: str


class Grades(Part):
    """The scale of the overall quality."""

    low: int
    high: int
    low_words: str
    high_words: str


class Project(Part):
    """What the page asks about each item."""

    scale: Grades
    flags: list[Question]
    mode: str


def placed(state: TaskState) -> PlacedState:
    """The state by place: place p shows response k = shown[p]."""
    return PlacedState(
        task=state.task,
        ranks=[state.ranks[k] for k in state.shown],
        ratings=[state.ratings[k] for k in state.shown],
        flags=[state.flags[k] for k in state.shown],
        note=state.note,
        status=state.status,
        reason=state.reason,
        actions=state.actions,
        seconds=state.seconds,
    )


def numbered(action: Action, shown: list[int]) -> Action:
    """An action by place as an action by response number k.

    Raises:
        Refused: a place that is not there.
    """
    count = len(shown)
    if isinstance(action, RankAction):
        if len(action.ranks) != count:
            raise Refused(f"ranks: found {len(action.ranks)}; expected {count}, one per response")
        ranks: list[int | None] = [None] * count
        for place, rank in enumerate(action.ranks):
            ranks[shown[place]] = rank
        return RankAction(ranks=ranks)
    if isinstance(action, RateAction | FlagAction):
        if action.response >= count:
            raise Refused(f"response: found {action.response}; expected 0 to {count - 1}")
        return action.model_copy(update={"response": shown[action.response]})
    return action


def shown_item(state: TaskState, item: Item, *, earlier: bool) -> Shown:
    """The item of a task in the order of the page."""
    responses = [item.responses[k] for k in state.shown]
    return Shown(
        task=state.task,
        kind=item.kind,
        prompt=turns(item.prompt),
        responses=[PlacedResponse(turns=turns(response.text), ended=response.ended) for response in responses],
        earlier=earlier,
    )


def project_of(config: LabelConfig) -> Project:
    """What a project asks about each item."""
    scale = config.scale
    return Project(
        scale=Grades(low=scale.lowest, high=scale.highest, low_words=scale.lowest_word, high_words=scale.highest_word),
        flags=[Question(key=flag.key, text=flag.text) for flag in config.flags],
        mode=config.mode,
    )
