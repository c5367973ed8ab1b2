"""results.json as types: `rlhf compare` writes it; the verdict, the tables, the page and users read it.

`load(path)` returns a `Results`. `results.schema.json` beside this module is the JSON schema of the same classes. A
number that JSON cannot represent (the infinite end of an interval) is null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.evaluation.statistics import Estimate

VERSION: Literal[1] = 1
SCHEMA = Path(__file__).with_name("results.schema.json")
BEST_OF_N = "best-of-n"
"""The stage of a row of best-of-n, which is not a trained model."""


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Optimum = Literal["same", "scale", "other"]
"""How the optimum of a model relates to pi_ref exp(r / beta): the same, the same form at another beta, or another."""

Number = Annotated[float | None, BeforeValidator(_finite)]
"""A number; None if it is not known or infinite."""


class Part(BaseModel):
    """A part of results.json: immutable, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Interval(Part):
    """A mean with its 95 % interval over n values in `clusters` (prompts or seeds); the ends are None if unknown."""

    mean: float
    low: Number
    high: Number
    n: int
    clusters: int
    method: str

    @classmethod
    def of(cls, found: Estimate) -> Interval:
        """Convert an estimate to its form in results.json."""
        return cls.model_validate(found.as_dict())

    @classmethod
    def table(cls, found: Mapping[str, Estimate]) -> dict[str, Interval]:
        """Convert several estimates, by name."""
        return {name: cls.of(estimate) for name, estimate in found.items()}

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends, if they are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def excludes(self, value: float = 0.0) -> bool:
        """Whether the interval is known and lies on one side of a value."""
        return self.ends is not None and not self.ends[0] <= value <= self.ends[1]


class DataReport(Part):
    """The use of the rows of one source, as recorded in a manifest."""

    model_config = ConfigDict(frozen=True, extra="allow")
    source: str
    split: str | None = None
    digest: str
    rows: int


class DataChange(Part):
    """Data that no longer match the manifest of a model.

    `found` and `expected` are digests; `found` is None if the split is missing. `text` is one sentence.
    """

    model: str
    source: str
    split: str
    found: str | None
    expected: str
    rows: int
    expected_rows: int
    text: str


class Span(Part):
    """A number with both ends of its 95 % interval; all are None if there is none."""

    mean: Number
    low: Number
    high: Number


class Gate(Part):
    """Whether a reward model beats a coin and the baselines on held-out pairs; differences are in accuracy."""

    passed: bool
    beats: dict[str, bool] = {}
    differences: dict[str, Span] = {}
    reason: str


class Difference(Part):
    """One fact in which the arms differ, with the value of each arm."""

    what: str
    values: dict[str, str]

    def __str__(self) -> str:
        return f"{self.what}: " + ", ".join(f"{arm} has {value}" for arm, value in self.values.items())


class Comparable(Part):
    """Whether the arms differ only in the way they were trained."""

    ok: bool
    differences: list[Difference]
    allowed: bool


class Cost(Part):
    """The cost of training: seconds, floating-point operations, tokens, optimizer steps, bytes."""

    wall_seconds: float
    flops: float
    tokens_trained: float
    tokens_generated: float
    optimizer_steps: float
    peak_memory_bytes: float


class Diversity(Part):
    """distinct-n over `tokens` tokens, the same number for every model; self-BLEU of the samples of a prompt."""

    distinct_1: float
    distinct_2: float
    distinct_4: float
    tokens: int
    self_bleu: Number


class EffectiveBeta(Span):
    """PPO's beta in units of the labels' reward: kl_coef times the calibration slope of its reward model."""

    slope: Span
    reward_model: str
    why_not: str | None


class Row(Part):
    """Figures of one model, or of best-of-n of the baseline (stage "best-of-n")."""

    name: str
    model: str
    stage: str | None
    metrics: dict[str, Interval]
    cost: Cost | None = None
    # a model
    arm: str | None = None
    seed: int | None = None
    setting: dict[str, Any] = {}
    step: int | None = None
    digest: str | None = None
    beta: Number = None
    effective_beta: EffectiveBeta | None = None
    optimum: Optimum = "same"
    moves_optimum: dict[str, Any] = {}
    may_move_optimum: dict[str, Any] = {}
    scored_by: str | None = None
    per_prompt: dict[str, list[float]] = {}
    validation: dict[str, Interval] | None = None
    win_rate: Interval | None = None
    ties: Number = None
    difference: Interval | None = None
    gain_in_sd: Number = None
    diversity: Diversity | None = None
    # best-of-n
    n: int | None = None
    samples: int | None = None
    chosen_by: str | None = None
    kl_bound: Number = None


class ExactPerPrompt(Part):
    """The exact figures for each prompt."""

    reward: list[float]
    kl: list[float]
    objective: list[float]
    gap: list[float]
    attainable: list[float]


class Gap(Part):
    """beta KL(pi || pi*) under a reward, a mean over the first `prompts` prompts."""

    value: float
    prompts: int
    reward: list[tuple[float, str]]


class TrainingLoss(Part):
    """A DPO policy's training loss, and its excess over the best known loss."""

    training_loss: float
    best: str
    excess: Number


class ExactRow(Part):
    """Exact figures of one model, or of the optimum at one beta (stage "optimum")."""

    name: str
    model: str | None
    stage: str | None
    digest: str | None
    beta: float
    reward: float
    kl: float
    objective: float
    gap: float
    attainable: float
    share: Number
    prompts: int
    per_prompt: ExactPerPrompt
    below_frontier: float
    gap_true: Gap
    optimisation_gap: Gap | None = None
    disagreement: Gap | None = None
    gap_true_there: Gap | None = None
    training_loss: TrainingLoss | None = None


class ExactBestOfN(Part):
    """Best-of-n of the reference, computed without sampling."""

    n: int
    chosen_by: str
    prompts: int
    reward: float
    kl: float


class Gibbs(Part):
    """Points of the exact frontier: mean KL and mean reward at each beta."""

    beta: list[float]
    reward: list[float]
    kl: list[float]


class Exact(Part):
    """Exact figures over all responses, for a model whose responses can all be listed."""

    reward: str
    reference: str
    reward_model: str | None
    prompts: int
    reward_model_prompts: int
    responses: int
    temperature: float
    rows: list[ExactRow]
    best_of_n: list[ExactBestOfN]
    frontier: Gibbs


class ExactResults(Exact):
    """The output of `rlhf exact`: the exact figures, the source of their prompts, and data that have changed."""

    split: str
    data_changed: list[DataChange]


class Scorer(Part):
    """Accuracy and calibration of one scorer on held-out pairs; `bins`: (mean confidence, mean correctness, pairs)."""

    accuracy: Interval
    ece: Number
    nll: Number
    brier: Number
    bins: list[tuple[float, float, int]]


class ScorerTest(Part):
    """The first reward model's accuracy minus the first DPO policy's."""

    name: str
    method: str
    difference: Interval
    p: Number


class Preferences(Part):
    """Reward models and DPO policies on the same held-out pairs."""

    pairs: int
    prompts: int
    scorers: dict[str, Scorer]
    test: ScorerTest | None


class LlmFigures(Part):
    """A language model's verdicts on `comparisons` pairs, each read in both orders.

    ties: share without a winner. first_place: share of single readings with a winner that the reply in the first place
    won; one half without a preference for a place. disagreed: share of pairs whose two readings named different
    winners; these are ties. unreadable: answers without a verdict.
    """

    comparisons: int
    ties: Number
    first_place: Number
    disagreed: Number
    unreadable: int


class JudgedPair(LlmFigures):
    """P(the judge prefers a response of a to one of b), ties one half; `why_not` says why there is none."""

    a: str
    b: str
    estimate: Interval | None
    why_not: str | None
    p: Number


class LabelAgreement(LlmFigures):
    """The share of held-out labelled pairs that the judge orders as their label, ties one half."""

    pairs: int
    prompts: int
    accuracy: Interval


class LlmJudged(Part):
    """Win rates by a language model, and its agreement with the labels of held-out pairs."""

    judge: str
    endpoint: str
    pairs_per_prompt: int
    pairs: list[JudgedPair]
    labels: LabelAgreement | None
    why_no_labels: str | None


class Demonstrations(Part):
    """Figures of the demonstrations for the same prompts."""

    each: int
    metrics: dict[str, Interval]


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


class Line(Part):
    """One line of the verdict."""

    topic: str
    text: str
    certain: bool = True


class Verdict(Part):
    """The headline and its lines."""

    headline: str
    certain: bool
    lines: list[Line]


class Response(Part):
    """A response to read, with its scores."""

    text: str
    ended: bool
    true_reward: Number = None
    score: Number = None
    judge: Number = None


class Shown(Part):
    """One prompt with the responses of every model."""

    prompt: str
    responses: dict[str, list[Response]]


class Ancestor(Part):
    """One model behind a comparison."""

    model: str
    digest: str | None
    stage: str | None
    seed: int | None
    parents: dict[str, str]
    data: list[DataReport]


class Measurements(Part):
    """What was compared, how, and what was measured of each model."""

    version: Literal[1] = VERSION
    name: str
    command: str | None
    primary: str | None
    baseline: str
    reference: str | None
    reward_model: str | None
    judge: str | None
    true_reward: str | None
    gates: dict[str, Gate]
    prompts: int
    prompt_texts: list[str]
    samples: int
    split: str
    validation_split: str | None
    temperature: float
    response_length: int
    seed: int
    seeds: list[int]
    resampled: list[str]
    data: list[DataReport]
    comparable: Comparable
    rows: list[Row]
    exact: Exact | None
    preferences: Preferences | None
    data_changed: list[DataChange]
    demonstrations: Demonstrations | None
    llm_judge: LlmJudged | None = None


class Sides(Part):
    """What sets arms against each other."""

    summary: list[Summary]
    arms: dict[str, ArmEntry]
    contrasts: list[Contrast]
    win_rates: list[WinRate] = []
    ranking: Ranking | None = None
    frontier: Frontier | None = None
    overoptimisation: dict[str, Overoptimised] | None = None

    def find(self, **wanted: Any) -> Iterator[Contrast]:
        """Contrasts with these values."""
        return (one for one in self.contrasts if all(getattr(one, key) == value for key, value in wanted.items()))


class Findings(Sides, Measurements):
    """All that a verdict is drawn from."""


class Results(Findings):
    """One comparison."""

    verdict: Verdict
    samples_shown: list[Shown]
    curves: dict[str, dict[str, list[tuple[float, float]]]]
    lineage: list[Ancestor]
    configs: dict[str, str]
    path: str
    report: str

    def trained(self) -> Iterator[Row]:
        """Rows of trained models, without best-of-n and without snapshots."""
        return (row for row in self.rows if row.stage != BEST_OF_N and row.step is None)

    def text(self) -> str:
        """The file results.json."""
        return self.model_dump_json(indent=2, exclude_unset=True, ensure_ascii=True) + "\n"


def load(path: str | Path) -> Results:
    """The results of a comparison from its results.json.

    Raises:
        DamagedFile: the file is missing, is not JSON, or was not written by `rlhf compare` of this version.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror}); rlhf compare writes it") from None
    except ValueError as error:
        raise DamagedFile(
            f"{path}: found invalid JSON ({error}); expected the output of rlhf compare; compare again"
        ) from None
    version = found.get("version") if isinstance(found, dict) else None
    if version != VERSION:
        expected = f"expected version {VERSION} of this rlhf compare; compare again"
        raise DamagedFile(f"{path}: found {'no version' if version is None else f'version {version}'}, {expected}")
    try:
        return Results.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedFile(
            f"{path}: {error.error_count()} faults, the first at {where}: {first['msg']}; expected the output of "
            "rlhf compare; compare again"
        ) from None


def schema() -> str:
    """The JSON schema of results.json, equal to the file `SCHEMA`."""
    return json.dumps(Results.model_json_schema(), indent=1) + "\n"
