"""The figures of one model in results.json, with their intervals; exact figures where all responses can be listed.

A number that JSON cannot represent (the infinite end of an interval) is null.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from rlhf_pipeline.evaluation.statistics import Estimate

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


class InContext(Part):
    """How an arm without training answered: with demonstrations in its context, before every prompt.

    pool: demonstrations of the training split from which they are taken. chosen, prefixes, chosen_by: the number of the
    set that few_shot uses, the mean figure of every set on validation prompts, and what the figure is: a reward model's
    score, or "likelihood" of the validation demonstrations, nats per response. candidates, score, retrieval: of icdpo,
    the number for each response, the form of its contrast, and how demonstrations are found. kl_is_bound: the KL is an
    upper bound.
    """

    method: Literal["few_shot", "icdpo"]
    source: str
    demonstrations: int
    pool: int
    chosen: int | None = None
    prefixes: list[float] = []
    chosen_by: str | None = None
    candidates: int | None = None
    score: Literal["one_sided", "two_sided"] | None = None
    retrieval: Literal["bm25", "embeddings"] | None = None
    kl_is_bound: bool = False


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
    algorithm: str | None = None
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
    in_context: InContext | None = None
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
