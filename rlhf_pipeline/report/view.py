"""results.json as the report reads it: whatever is absent, null or of another kind is simply not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.report.palette import NEUTRAL, Look, looks
from rlhf_pipeline.report.text import clean, finite, number, plain, plural, words

FIGURES = {
    "true_reward": "true reward",
    "judge": "judge",
    "score": "RM score",
    "kl": "KL",
    "kl_k1": "KL (k1)",
    "kl_k3": "KL (k3)",
    "length": "length",
    "ended": "ended by EOS",
    "well_formed": "well formed",
    "entropy": "entropy",
}
BEST_OF_N = "best-of-n"
REWARD_MODEL = "reward model"


def part(value: Any, *keys: Any) -> Any:
    """The part of nested mappings under `keys`; None where something on the way is absent."""
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def items(value: Any) -> list[tuple[str, Any]]:
    """The entries of a mapping; none where there is no mapping."""
    return [(str(key), entry) for key, entry in value.items()] if isinstance(value, Mapping) else []


def listed(value: Any) -> list[Any]:
    """The entries of a list; none where there is no list."""
    return list(value) if isinstance(value, list | tuple) else []


def records(value: Any) -> list[Mapping[str, Any]]:
    """The mappings in a list."""
    return [entry for entry in listed(value) if isinstance(entry, Mapping)]


def tuples(value: Any, size: int) -> list[tuple[float, ...]]:
    """The entries of a list that begin with `size` finite numbers."""
    found = []
    for entry in listed(value):
        known = tuple(value for item in listed(entry)[:size] if (value := finite(item)) is not None)
        if len(known) == size:
            found.append(known)
    return found


@dataclass(frozen=True)
class Reading:
    """An estimate: a mean and, where it is known, its 95 % interval."""

    mean: float
    low: float | None = None
    high: float | None = None
    clusters: int | None = None
    method: str | None = None

    @property
    def cells(self) -> tuple[float, float | None, float | None]:
        """Mean and ends, for a CSV."""
        return self.mean, self.low, self.high

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends, where they are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    def text(self, digits: int = 2) -> str:
        """1.23 [1.10, 1.36]."""
        if self.interval is None:
            return number(self.mean, digits)
        return f"{number(self.mean, digits)} [{number(self.low, digits)}, {number(self.high, digits)}]"


def reading(value: Any) -> Reading | None:
    """An estimate of results.json, or a bare number; None where there is neither."""
    if (bare := finite(value)) is not None:
        return Reading(bare)
    mean = finite(part(value, "mean"))
    if mean is None:
        return None
    low, high = finite(part(value, "low")), finite(part(value, "high"))
    if low is None or high is None:
        low = high = None
    clusters = finite(part(value, "clusters"))
    method = part(value, "method")
    return Reading(
        mean,
        low,
        high,
        None if clusters is None else int(clusters),
        method if isinstance(method, str) else None,
    )


def setting_text(setting: Any) -> str:
    """{"beta": 0.1} as "β 0.1"."""
    return ", ".join(f"{'β' if name == 'beta' else name} {plain(value)}" for name, value in items(setting))


def setting_key(setting: Any) -> tuple:
    """A setting as something to sort and group by."""
    return tuple(
        (name, finite(value) if finite(value) is not None else 0.0, str(value)) for name, value in items(setting)
    )


def setting_csv(setting: Any) -> str:
    """{"beta": 0.1} as "beta=0.1"."""
    return ";".join(f"{name}={value}" for name, value in items(setting))


class View:
    """One comparison: its rows, its arms in order, and how each of them looks."""

    def __init__(self, results: Mapping[str, Any]):
        self.results = results
        known = records(results.get("rows"))
        self.snapshots = [row for row in known if finite(row.get("step")) is not None]
        self.rows = [row for row in known if finite(row.get("step")) is None]
        self.primary = str(results.get("primary") or "true_reward")
        self.baseline = results.get("baseline")
        arms = [name for name, _ in items(results.get("arms"))]
        arms += [self.arm(row) for row in self.rows if not self.is_baseline(row)]
        self.arms = [arm for arm in dict.fromkeys(arms) if arm != BEST_OF_N]
        stages = {self.arm(row): str(row.get("stage")) for row in reversed(self.rows)}
        self._looks = looks([*self.arms, BEST_OF_N, REWARD_MODEL], stages)
        self._stages = {str(entry.get("model")): str(entry.get("stage")) for entry in records(results.get("lineage"))}
        self._arm_of = {str(row.get("model")): self.arm(row) for row in reversed([*self.rows, *self.snapshots])}

    def get(self, *keys: Any) -> Any:
        """A part of the results."""
        return part(self.results, *keys)

    @staticmethod
    def arm(row: Mapping[str, Any]) -> str:
        """The arm that a row belongs to."""
        if row.get("stage") == BEST_OF_N:
            return BEST_OF_N
        return str(row.get("arm"))

    def is_baseline(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is of the model that the others are set against."""
        known = self.baseline is not None and row.get("stage") != BEST_OF_N
        return known and self.baseline in (row.get("name"), row.get("model"))

    def look(self, name: str) -> Look:
        """Colour and marker of an arm or a scorer."""
        return self._looks.get(name, NEUTRAL)

    def look_of(self, row: Mapping[str, Any]) -> Look:
        """Colour and marker of a row: those of its arm; the baseline's are neutral."""
        return NEUTRAL if self.is_baseline(row) else self.look(self.arm(row))

    def kind(self, label: Any) -> str:
        """What a model is by its label: its arm, "reward model", or its stage."""
        arm = self.arm_of_model(label)
        if arm in self.arms:
            return arm
        stage = self._stages.get(str(label), arm or "")
        return REWARD_MODEL if stage == "reward" else stage

    def arm_of_model(self, label: Any) -> str | None:
        """The arm of a model by its label."""
        return self._arm_of.get(str(label))

    def title(self, row: Mapping[str, Any]) -> str:
        """What to call a row: its name, or where an arm has many models its setting and seed."""
        arm = self.arm(row)
        if arm == BEST_OF_N or self.is_baseline(row) or sum(len(rows) for rows in self.settings(arm).values()) < 2:
            return str(row.get("name"))
        seed = f"seed {row.get('seed')}" if row.get("seed") is not None else ""
        step = f" #{plain(row.get('step'))}" if finite(row.get("step")) is not None else ""
        return ", ".join(text for text in (f"{arm} {setting_text(row.get('setting'))}".strip(), seed) if text) + step

    def title_of_model(self, label: Any) -> str:
        """What to call a model: as its row is called, else its label."""
        row = next((row for row in self.trained() if row.get("model") == label), None)
        return str(label) if row is None else self.title(row)

    def settings(self, arm: str) -> dict[tuple, list[Mapping[str, Any]]]:
        """Rows of an arm by setting, in the order of settings; models that have none stand each for itself."""
        found: dict[tuple, list[Mapping[str, Any]]] = {}
        for row in self.trained():
            if self.arm(row) == arm and not self.is_baseline(row):
                key = setting_key(row.get("setting"))
                if not key and not self.results.get("seeds"):
                    key = (("", 0.0, str(row.get("name"))),)
                found.setdefault(key, []).append(row)
        return dict(sorted(found.items()))

    def has_seeds(self) -> bool:
        """Whether any setting was trained with several seeds."""
        return any(len(rows) > 1 for arm in self.arms for rows in self.settings(arm).values())

    def summaries(self) -> list[Mapping[str, Any]]:
        """Figures of arms and settings over seeds and prompts."""
        return records(self.results.get("summary"))

    def summary(self, arm: str, setting: Any) -> Mapping[str, Any] | None:
        """Figures of one arm at one setting over seeds and prompts."""
        wanted = (arm, setting_key(setting))
        return next((e for e in self.summaries() if (e.get("arm"), setting_key(e.get("setting"))) == wanted), None)

    def trained(self) -> list[Mapping[str, Any]]:
        """Rows of models: the baseline and the arms, without best-of-n."""
        return [row for row in self.rows if self.arm(row) != BEST_OF_N]

    def best_of_n(self) -> list[Mapping[str, Any]]:
        """Rows of best-of-n, smallest n first."""
        return sorted(
            (row for row in self.rows if self.arm(row) == BEST_OF_N), key=lambda row: finite(row.get("n")) or 0
        )

    def figure(self, row: Mapping[str, Any], name: str) -> Reading | None:
        """A figure of a row on the test prompts."""
        return reading(part(row, "metrics", name))

    def figures(self) -> list[str]:
        """Names of all figures that any row has, the known ones first."""
        found = dict.fromkeys(name for row in self.rows for name, _ in items(row.get("metrics")))
        known = [name for name in FIGURES if name in found]
        return known + [name for name in found if name not in FIGURES]

    def name_of(self, figure: str | None = None) -> str:
        """What a figure is called in words (default: the primary one)."""
        figure = figure or self.primary
        return FIGURES.get(figure, figure.replace("_", " "))

    def is_selected(self, row: Mapping[str, Any]) -> bool:
        """Whether the row is of the setting that was selected for its arm."""
        selected = self.get("arms", self.arm(row), "selected")
        return isinstance(selected, Mapping) and bool(selected) and row.get("setting") == selected

    def passed(self) -> str:
        """How many snapshots of each arm there are, in words; empty without any."""
        counts = {arm: sum(self.arm(row) == arm for row in self.snapshots) for arm in self.arms}
        return words([f"{count} of {clean(arm)}" for arm, count in counts.items() if count])

    def seeds(self) -> list[Any]:
        """The seeds of the comparison."""
        return listed(self.results.get("seeds")) or sorted(
            {row["seed"] for row in self.trained() if isinstance(row.get("seed"), int)}
        )

    def intervals(self) -> str:
        """How the intervals of the rows were made, in words."""
        for row in self.trained():
            found = self.figure(row, self.primary)
            if found is not None and found.interval is not None and found.method:
                method = {"t": "Student t", "bootstrap": "bootstrap"}.get(found.method, found.method)
                clusters = f" over {plural(found.clusters, 'prompt')}" if found.clusters else " over prompts"
                return f"95 % intervals: {method}{clusters}, of shares Wilson's"
        return "no intervals"

    def basis(self) -> str:
        """What the figures are taken over: prompts, samples, seeds, intervals."""
        parts = []
        prompts, samples = finite(self.results.get("prompts")), finite(self.results.get("samples"))
        if prompts:
            split = self.results.get("split")
            text = plural(int(prompts), f"{split} prompt" if split else "prompt")
            parts.append(f"{text} × {plural(int(samples), 'sample')}" if samples else text)
        seeds = self.seeds()
        if len(seeds) > 1:
            parts.append(f"seeds {words([str(seed) for seed in seeds])}")
        parts.append(self.intervals())
        return "; ".join(parts) + "."
