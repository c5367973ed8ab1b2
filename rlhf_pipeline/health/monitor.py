"""Named causes instead of bare numbers: watches over the figures of a run, and what they have found.

The watches of each stage stand in `health/`; docs/health.md lists them. A monitor holds a short history of
the figures that its watches read; the history is part of a checkpoint, so a resumed run finds what a whole one finds.
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
"""Values of a figure that are kept, the last ones."""
FIRST = 20
"""Values of a figure that are kept, the first ones."""


@dataclass(frozen=True)
class Facts:
    """What the watches know of a run besides its figures.

    total: updates in all. size: responses (ppo) or examples of one update, over all ranks. tokens: of a chosen
    response, on average. low_precision: 16 bits in the weights or the forward pass.
    """

    total: int
    size: int
    tokens: float = 1.0
    low_precision: bool = False
    kl_coef: float = 0.0
    critic_warmup_steps: int = 0
    loss_type: str = "sigmoid"


def facts_of(config: TrainingConfig, total: int, ranks: int, known: Mapping[str, float], *, bf16: bool) -> Facts:
    """The facts of a run of `total` updates on `ranks` processes; known: from its stage; bf16: autocast is on."""
    rollout = getattr(config, "rollout_batch_size", None)
    examples = config.per_device_train_batch_size * (config.gradient_accumulation_steps or 1) * ranks
    return Facts(
        total=total,
        size=rollout or examples,
        low_precision=bf16 or config.dtype in ("bfloat16", "float16"),
        kl_coef=getattr(config, "kl_coef", 0.0),
        critic_warmup_steps=getattr(config, "critic_warmup_steps", 0),
        loss_type=getattr(config, "loss_type", "sigmoid"),
        **known,
    )


class History:
    """The first and the last values of some figures; what is not finite is left out.

    The name "A with B" stands for the values of A at the updates that have a B, so that the two can be set side by
    side; the update's number is the figure "step".
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
        """The first `count` values (at most FIRST); none while there are fewer."""
        return self._first[name][:count] if len(self._first[name]) >= count else []

    def recent(self, name: str, count: int | None = None) -> list[float]:
        """The last `count` values (None: all that are kept, at most RECENT); none while there are fewer."""
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


@dataclass(frozen=True)
class Watch:
    """One cause and how it shows.

    figures: what it reads; it looks whenever the first one arrives, which is also the one that it reports.
    condition: the value to report, or None where nothing is wrong.
    blanks: what fills the {names} in message and knob.
    patience: looks in a row until it is named. relief: looks in a row without it until it counts as over, which takes
    a tenth of the run at least: a figure that hovers about its limit is one finding and not ten.
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
    """A cause that was seen. until_step: None while it lasts."""

    cause: str
    figure: str
    value: float
    since_step: int
    until_step: int | None
    message: str
    knob: str

    def line(self) -> str:
        """One line for the log: what was seen since when, what it usually means, what to turn."""
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
    seen: int = 0  # looks in a row at which the condition held
    absent: int = 0  # looks in a row at which it did not
    since: int = 0  # step of the first of the former
    until: int = 0  # step at which it held last


class Monitor:
    """Watches over one run; `findings` in the order in which they were named."""

    def __init__(self, watches: Sequence[Watch], facts: Facts):
        self.watches, self.facts = tuple(watches), facts
        self.history = History({name for watch in watches for name in watch.figures})
        self.findings: list[Finding] = []
        self._streaks = {watch.cause: _Streak() for watch in watches}

    def update(self, step: int, metrics: Mapping[str, float]) -> list[Finding]:
        """Take in the figures of an update, or of an evaluation after it; return what is named for the first time."""
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
        """What is wrong now, for an update's line in metrics.jsonl: `health/CAUSE` and the value it was named at."""
        return {f"health/{found.cause}": found.value for found in self.findings if found.until_step is None}

    def report(self) -> list[dict[str, Any]]:
        """The findings as a manifest has them."""
        return [asdict(finding) for finding in self.findings]

    def state(self) -> dict[str, Any]:
        """Everything that changes, as JSON has it."""
        streaks = {cause: asdict(streak) for cause, streak in self._streaks.items()}
        return {"history": self.history.state(), "streaks": streaks, "findings": self.report()}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from a `state`; without one (a checkpoint of an earlier release) start anew."""
        if state is None:
            return
        self.history.restore(state["history"])
        known = {cause: value for cause, value in state["streaks"].items() if cause in self._streaks}
        self._streaks |= {cause: _Streak(**value) for cause, value in known.items()}
        self.findings = [Finding(**value) for value in state["findings"]]
