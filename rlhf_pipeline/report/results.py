"""results.json as types: `rlhf compare` writes it; the verdict, the tables, the page and users read it.

`load(path)` returns a `Results`. `results.schema.json` beside this module is the JSON schema of the same classes. The
figures of one model are in `figures.py`, those of arms against each other in `sides.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, ValidationError

from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.report.figures import BEST_OF_N, Exact, Gate, Interval, Number, Part, Row
from rlhf_pipeline.report.sides import HumanJudged, Sides

VERSION: Literal[1] = 1
SCHEMA = Path(__file__).with_name("results.schema.json")


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
    human: HumanJudged | None = None
    decoding: Decoding | None = None  # None: of a version that only sampled the policy itself

    @property
    def decoder(self) -> str | None:
        """The decoder in words; None if responses are samples of the policy itself."""
        return None if self.decoding is None or self.decoding.is_plain else self.decoding.text


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
