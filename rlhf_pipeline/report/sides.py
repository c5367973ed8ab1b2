"""Arms against each other in results.json: contrasts, win rates, ranking, frontiers, human judgement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from rlhf_pipeline.report.figures import Cost, Gibbs, Interval, Number, Optimum, Part


class Summary(Part):
    """Figures of one arm at one setting, over its seeds and prompts."""

    arm: str
    setting: dict[str, Any]
    beta: Number
    optimum: Optimum
    effective_beta: Number
    seeds: int
    metrics: dict[str, Interval]
    method: str


class ArmEntry(Part):
    """The tuning of an arm, and its cost at the setting that represents it."""

    trials: int
    snapshots: int
    settings: list[dict[str, Any]]
    selected: dict[str, Any] | None
    cost: Cost | None


ContrastKind = Literal["as trained", "same beta", "selected", "matched KL", "area", "cost", "exact"]
"""The conditions at which two arms are compared."""


class Contrast(Part):
    """A difference between two arms in one figure; `why_not` says why there is none."""

    name: str
    kind: ContrastKind
    a: str
    b: str
    figure: str
    at: str
    estimate: Interval | None
    why_not: str | None
    p: Number
    p_holm: Number = None
    primary: bool = False


class LengthControlled(Part):
    """The win rate at equal length."""

    estimate: Interval | None
    phi: Number
    why_not: str | None


class WinRate(Part):
    """P(a response of a beats one of b to the same prompt), ties one half."""

    a: str
    b: str
    figure: str
    estimate: Interval | None
    why_not: str | None
    ties: Number
    p: Number
    length_controlled: LengthControlled


class Ranked(Part):
    """One model's Elo; None if no end of its interval is known."""

    name: str
    arm: str
    step: int | None
    elo: Interval | None
    bound: Literal["at least", "at most"] | None
    ties: float


class Ranking(Part):
    """Elo of every model, the baseline at 1000."""

    figure: str
    separable: bool
    left_out: int
    rows: list[Ranked]


class FrontierPoint(Part):
    """Reward against KL of one model."""

    setting: dict[str, Any]
    step: int | None
    seed: int | None
    model: str
    kl: Interval
    reward: Interval


class FrontierArm(Part):
    """An arm's points, the envelope of their means over seeds, and its interval (KL, low, high)."""

    points: list[FrontierPoint]
    envelope: list[tuple[float, float]]
    band: list[tuple[float, Number, Number]]


class Frontier(Part):
    """Reward against KL of every arm."""

    figure: str
    chosen_by: str | None
    arms: dict[str, FrontierArm]
    matched_kl: Number
    common_range: tuple[float, float] | None
    gibbs: Gibbs | None


class GaoFit(Part):
    """Gao et al.'s form fitted to the gold reward: d (alpha - beta ln d)."""

    form: str
    alpha: float
    beta: float
    peak: Number
    least: float
    largest: float
    points: int
    residual: float


class Overoptimised(Part):
    """Whether the gold reward falls while the optimised one rises; points are (sqrt KL, proxy gain, gold gain)."""

    gold: str
    reference: str
    points: list[tuple[float, float, float]]
    fit: GaoFit | None
    found: bool | None
    why: str
    p: Number


class HumanPair(Part):
    """P(people prefer a response of a to one of b), ties one half; `why_not` says why there is none.

    estimate: for prompts and labelers like these. among_these: for these labelers, on prompts like these.
    judges: the win rate of the same comparisons by each scorer, by its figure, on prompts like these.
    """

    a: str
    b: str
    comparisons: int
    prompts: int
    labelers: int
    estimate: Interval | None
    among_these: Interval | None
    why_not: str | None
    p: Number
    ties: Number
    judges: dict[str, Interval] = Field(default={})


class HumanStanding(Part):
    """One model's Elo by Bradley-Terry, the first model at 1000; None if no end of its interval is known."""

    name: str
    comparisons: int
    elo: Interval | None
    bound: Literal["at least", "at most"] | None


class HumanAgreement(Part):
    """The share of people's verdicts that a scorer shares, over the comparisons in which people named a winner.

    A tie by the scorer counts one half, and so a coin has one half. judge: the name of the scorer.
    """

    figure: str
    judge: str
    comparisons: int
    share: Interval
    p: Number


class HumanJudged(Part):
    """What people preferred in a labelling project.

    comparisons: verdicts of labelers on two responses; ties are among them. skipped: items that a labeler left out.
    missing: models of this comparison that the project does not have. agreement: by figure.
    """

    project: str
    prompts: int
    labelers: int
    comparisons: int
    ties: Number
    skipped: int
    missing: list[str]
    pairs: list[HumanPair]
    standings: list[HumanStanding]
    why_no_standings: str | None
    agreement: list[HumanAgreement]
    why_no_agreement: str | None


class Sides(Part):
    """What sets arms against each other."""

    summary: list[Summary]
    arms: dict[str, ArmEntry]
    contrasts: list[Contrast]
    win_rates: list[WinRate] = Field(default=[])
    ranking: Ranking | None = None
    frontier: Frontier | None = None
    overoptimisation: dict[str, Overoptimised] | None = None

    def find(self, **wanted: Any) -> Iterator[Contrast]:
        """Contrasts with these values."""
        return (one for one in self.contrasts if all(getattr(one, key) == value for key, value in wanted.items()))
