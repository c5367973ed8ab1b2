"""A monitor that applies watches to the metrics of a run and keeps their findings.

The watches of each stage are in `health/`; docs/health.md lists them. A monitor holds a short history of the metrics
that its watches read. The history is part of a checkpoint, so a resumed run has the findings of an uninterrupted one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_pipeline.config.training import TrainingConfig

RECENT = 100
"""The number of last values kept of each metric."""
FIRST = 20
"""The number of first values kept of each metric."""


@dataclass(frozen=True)
class Facts:
    """What the watches know of a run besides its metrics.

    total: number of updates. size: responses (ppo) or examples per update, over all ranks. tokens: mean length of a
    chosen response. low_precision: whether weights or forward pass use 16 bits. from_reference: whether
    the policy starts as its reference (dpo). fixed_reference: whether the loss
    reads one that stays (dpo).
    """

    total: int
    size: int
    tokens: float = 1.0
    low_precision: bool = False
    kl_coef: float = 0.0
    kl_target: float | None = None
    critic_warmup_steps: int = 0
    loss_type: object = "sigmoid"
    fixed_reference: bool = True
    from_reference: bool = False


def facts_of(config: TrainingConfig, total: int, ranks: int, known: Mapping[str, Any], *, bf16: bool) -> Facts:
    """The facts of a run of `total` updates on `ranks` processes.

    known: facts that the stage supplies. bf16: whether autocast is on.
    """
    rollout = getattr(config, "rollout_batch_size", None)
    examples = config.per_device_train_batch_size * (config.gradient_accumulation_steps or 1) * ranks
    return Facts(
        total=total,
        size=rollout or examples,
        low_precision=bf16 or config.dtype in ("bfloat16", "float16"),
        kl_coef=getattr(config, "kl_coef", 0.0),
        kl_target=getattr(config, "kl_target", None),
        critic_warmup_steps=getattr(config, "critic_warmup_steps", None) or 0,
        loss_type=getattr(config, "loss_type", "sigmoid"),
        fixed_reference=getattr(config, "needs_reference", True) and not getattr(config, "sync_ref_model", False),
        **known,
    )


class History:
    """The first and the last values of some metrics, without values that are not finite.

    The name "A with B" selects the values of A at the updates that have a value of B, so that A and B can be compared.
    The metric "step" is the number of the update.
    """

    def __init__(self, names: Iterable[str]):
        self.step = 0
        self._first: dict[str, list[float]] = {name: [] for name in sorted(names)}
        self._recent: dict[str, deque[float]] = {name: deque(maxlen=RECENT) for name in self._first}

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        self.step = step
        metrics = {"step": step, **metrics}
        for name in self._first:
            read = [metrics.get(part) for part in name.split(" with ")]
            values = [value for value in read if value is not None and math.isfinite(value)]
            if len(values) < len(read):
                continue
            self._recent[name].append(values[0])
            if len(self._first[name]) < FIRST:
                self._first[name].append(values[0])

    def knows(self, name: str) -> bool:
        return bool(self._recent[name])

    def first(self, name: str, count: int) -> list[float]:
        """The first `count` values (at most FIRST), or [] while there are fewer."""
        return self._first[name][:count] if len(self._first[name]) >= count else []

    def recent(self, name: str, count: int | None = None) -> list[float]:
        """The last `count` values (None: all that are kept, at most RECENT), or [] while there are fewer."""
        values = self._recent[name]
        if count is None:
            return list(values)
        return list(values)[len(values) - count :] if len(values) >= count > 0 else []

    def state(self) -> dict[str, Any]:
        return {"first": self._first, "recent": {name: list(values) for name, values in self._recent.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        for name in self._first:
            self._first[name] = list(state["first"].get(name, []))
            self._recent[name] = deque(state["recent"].get(name, []), maxlen=RECENT)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def error(values: Sequence[float]) -> float:
    """Standard error of the mean of two or more independent values."""
    centre = mean(values)
    return math.sqrt(sum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def late(h: History, f: Facts) -> bool:
    """Whether the first third of the run is over."""
    return 3 * h.step >= f.total


def width(f: Facts) -> int:
    """The number of updates in a sixth of the run, at most RECENT.

    When `late` first holds, these updates are the second half of the first third of the run.
    """
    return max(1, min(RECENT, f.total // 6))


@dataclass(frozen=True)
class Watch:
    """One cause and the condition that detects it.

    figures: the metrics that the condition reads. It is evaluated when the first one arrives, which is also reported.
    condition: returns the value to report, or None if nothing is wrong.
    blanks: returns the values for the {names} in message and knob.
    patience: consecutive evaluations with the cause before a finding. relief: consecutive evaluations without the cause
    before it counts as over; this takes at least a tenth of the run, so a metric that fluctuates around its limit is
    one finding.
    """

    cause: str
    figures: tuple[str, ...]
    condition: Callable[[History, Facts], float | None]
    message: str
    knob: str
    patience: int = 1
    relief: int = 5
    blanks: Callable[[History, Facts], Mapping[str, Any]] | None = None


@dataclass
class Finding:
    """A cause that a watch has found. until_step: the last step with the cause, or None while the cause lasts."""

    cause: str
    figure: str
    value: float
    since_step: int
    until_step: int | None
    message: str
    knob: str

    def line(self) -> str:
        """One line for the log: cause, first step, value, usual meaning, what to change."""
        return (
            f"health: {self.cause} since step {self.since_step}: {self.figure} is {self.value:.4g}; {self.message}. "
            f"Try: {self.knob}"
        )

    def span(self) -> str:
        """The cause with its steps."""
        if self.until_step is None:
            return f"{self.cause} (from step {self.since_step} to the end)"
        return f"{self.cause} (steps {self.since_step} to {self.until_step})"


@dataclass
class _Streak:
    seen: int = 0  # consecutive evaluations at which the condition held
    absent: int = 0  # consecutive evaluations at which it did not hold
    since: int = 0  # first step of the current streak with the condition
    until: int = 0  # last step at which the condition held


class Monitor:
    """The watches of one run; `findings` are in the order in which they were found."""

    def __init__(self, watches: Sequence[Watch], facts: Facts):
        self.watches, self.facts = tuple(watches), facts
        self.history = History({name for watch in watches for name in watch.figures})
        self.findings: list[Finding] = []
        self._streaks = {watch.cause: _Streak() for watch in watches}

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Read the metrics of an update, or of an evaluation after it, and return the new findings."""
        self.history.add(step, metrics)
        return [found for watch in self.watches if (found := self._look(watch, step, metrics)) is not None]

    def _look(self, watch: Watch, step: int, metrics: Mapping[str, float]) -> Finding | None:
        if watch.figures[0] not in metrics or not all(map(self.history.knows, watch.figures)):
            return None
        value, streak = watch.condition(self.history, self.facts), self._streaks[watch.cause]
        lasting = next((f for f in self.findings if f.cause == watch.cause and f.until_step is None), None)
        if value is None:
            streak.seen, streak.absent = 0, streak.absent + 1
            away = step - streak.until
            if lasting is not None and streak.absent >= watch.relief and 10 * away >= self.facts.total:
                lasting.until_step = streak.until
            return None
        if streak.seen == 0:
            streak.since = step
        streak.seen, streak.absent, streak.until = streak.seen + 1, 0, step
        if lasting is not None or streak.seen < watch.patience:
            return None
        message, knob = watch.message, watch.knob
        if watch.blanks is not None:
            known = watch.blanks(self.history, self.facts)
            message, knob = message.format_map(known), knob.format_map(known)
        found = Finding(watch.cause, watch.figures[0], value, streak.since, None, message, knob)
        self.findings.append(found)
        return found

    def lasting(self) -> dict[str, float]:
        """The causes that last, for a line of metrics.jsonl: `health/CAUSE` and the value at which it was found."""
        return {f"health/{found.cause}": found.value for found in self.findings if found.until_step is None}

    def report(self) -> list[dict[str, Any]]:
        """The findings for the manifest."""
        return [asdict(finding) for finding in self.findings]

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint, as JSON values."""
        streaks = {cause: asdict(streak) for cause, streak in self._streaks.items()}
        return {"history": self.history.state(), "streaks": streaks, "findings": self.report()}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Restore a `state`; None (a checkpoint of an earlier release) changes nothing."""
        if state is None:
            return
        self.history.restore(state["history"])
        known = {cause: value for cause, value in state["streaks"].items() if cause in self._streaks}
        self._streaks |= {cause: _Streak(**value) for cause, value in known.items()}
        self.findings = [Finding(**value) for value in state["findings"]]
