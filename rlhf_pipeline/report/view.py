"""One comparison as the page shows it: rows, arms in order, looks, and names of models and figures."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_pipeline.report.figures import BEST_OF_N, Row
from rlhf_pipeline.report.glossary import ENTRIES
from rlhf_pipeline.report.results import Results
from rlhf_pipeline.report.sides import Summary
from rlhf_pipeline.report.style import NEUTRAL, Look, looks
from rlhf_pipeline.report.text import clean, plain, plural, words

REWARD_MODEL = "reward model"
METHODS = {"t": "Student t"}

Setting = Mapping[str, object]
Key = tuple[tuple[str, float, str], ...]


def setting_text(setting: Setting) -> str:
    """{"beta": 0.1} as "β 0.1"."""
    return ", ".join(f"{'β' if name == 'beta' else name} {plain(value)}" for name, value in setting.items())


def setting_key(setting: Setting) -> Key:
    """A setting as a key for sorting and grouping."""
    return tuple(
        (name, float(value) if isinstance(value, int | float) else 0.0, str(value)) for name, value in setting.items()
    )


def setting_csv(setting: Setting) -> str:
    """{"beta": 0.1} as "beta=0.1"."""
    return ";".join(f"{name}={value}" for name, value in setting.items())


class View:
    """One comparison: its rows, its arms in order, and the look of each arm."""

    def __init__(self, results: Results):
        self.results = results
        self.snapshots = [row for row in results.rows if row.step is not None]
        self.trained = list(results.trained())
        self.best_of_n = sorted((row for row in results.rows if row.stage == BEST_OF_N), key=lambda row: row.n or 0)
        self.rows = [*self.trained, *self.best_of_n]
        self.primary = results.primary or ""
        self.by_model = {row.model: row for row in reversed([*self.trained, *self.snapshots])}
        self.arms = list(dict.fromkeys([*results.arms, *(self.arm(row) for row in self.models())]))
        stages = {self.arm(row): row.stage or "" for row in reversed(self.rows)}
        self._looks = looks([*self.arms, BEST_OF_N, REWARD_MODEL], stages)
        self._stages = {entry.model: entry.stage for entry in results.lineage}
        self._algorithms = {self.arm(row): row.algorithm for row in reversed(self.rows)}

    @staticmethod
    def arm(row: Row) -> str:
        """The arm that a row belongs to."""
        return BEST_OF_N if row.arm is None else row.arm

    def called(self, arm: str) -> str:
        """The name of an arm in words: with its algorithm, if that is a relative of PPO that the name does not say."""
        algorithm = self._algorithms.get(arm) or "ppo"
        return arm if algorithm == "ppo" or algorithm in arm.lower() else f"{arm} ({algorithm.upper()})"

    def is_baseline(self, row: Row) -> bool:
        """Whether the row belongs to the baseline."""
        return row.stage != BEST_OF_N and row.model == self.results.baseline

    def baseline(self) -> list[Row]:
        """The baseline's row."""
        return [row for row in self.trained if self.is_baseline(row)]

    def models(self, arm: str | None = None) -> list[Row]:
        """Rows of the models that are compared (of one arm): without baseline, snapshots and best-of-n."""
        found = [row for row in self.trained if not self.is_baseline(row)]
        return [row for row in found if arm is None or self.arm(row) == arm]

    def look(self, name: str) -> Look:
        """Colour and marker of an arm or a scorer."""
        return self._looks.get(name, NEUTRAL)

    def look_of(self, row: Row | None) -> Look:
        """Colour and marker of a row: those of its arm; the baseline's are neutral."""
        return NEUTRAL if row is None or self.is_baseline(row) else self.look(self.arm(row))

    def kind(self, model: str) -> str:
        """The kind of a model: its arm, "reward model", or its stage."""
        row = self.by_model.get(model)
        arm = "" if row is None else self.arm(row)
        if arm in self.arms:
            return arm
        stage = self._stages.get(model) or arm
        return REWARD_MODEL if stage == "reward" else stage

    def title(self, model: str) -> str:
        """The title of a model: its name, or its setting and seed if its arm has several models."""
        row = self.by_model.get(model)
        if row is None or self.is_baseline(row) or len(self.models(self.arm(row))) < 2:
            return model
        said = [f"{self.arm(row)} {setting_text(row.setting)}".strip()]
        said += [f"seed {row.seed}"] if row.seed is not None else []
        return ", ".join(said) + (f" #{row.step}" if row.step is not None else "")

    def settings(self, arm: str) -> list[list[Row]]:
        """Rows of an arm by setting, in the order of settings."""
        found: dict[Key, list[Row]] = {}
        for row in self.models(arm):
            found.setdefault(setting_key(row.setting), []).append(row)
        return [rows for _, rows in sorted(found.items())]

    def has_seeds(self) -> bool:
        """Whether any setting was trained with several seeds."""
        return any(len(rows) > 1 for arm in self.arms for rows in self.settings(arm))

    def summary(self, arm: str, setting: Setting) -> Summary | None:
        """Figures of one arm at one setting over seeds and prompts."""
        return next((one for one in self.results.summary if (one.arm, one.setting) == (arm, setting)), None)

    def figures(self) -> set[str]:
        """Names of all figures in any row."""
        return {name for row in self.rows for name in row.metrics}

    def name_of(self, figure: str) -> str:
        """The name of a figure in words."""
        return ENTRIES[figure][0] if figure in ENTRIES else figure.replace("_", " ")

    def is_selected(self, row: Row) -> bool:
        """Whether the row has the selected setting of its arm."""
        entry = self.results.arms.get(self.arm(row))
        return entry is not None and bool(entry.selected) and row.setting == entry.selected

    def passed(self) -> str:
        """How many snapshots of each arm there are, in words; empty without any."""
        counts = {arm: sum(self.arm(row) == arm for row in self.snapshots) for arm in self.arms}
        return words([f"{count} of {clean(arm)}" for arm, count in counts.items() if count])

    def seeds(self) -> list[int]:
        """The seeds of the comparison."""
        return self.results.seeds or sorted({row.seed for row in self.trained if row.seed is not None})

    def basis(self) -> str:
        """The basis of the figures: prompts, samples, seeds, intervals."""
        prompts = plural(self.results.prompts, f"{self.results.split} prompt")
        parts = [f"{prompts} × {plural(self.results.samples, 'sample')}"]
        if len(self.seeds()) > 1:
            parts.append(f"seeds {words([str(seed) for seed in self.seeds()])}")
        known = [row.metrics[self.primary] for row in self.trained if self.primary in row.metrics]
        found = next((one for one in known if one.ends is not None), None)
        if found is None:
            parts.append("no intervals")
        else:
            over = f"over {plural(found.clusters, 'prompt')}"
            parts.append(f"95 % intervals: {METHODS.get(found.method, found.method)} {over}, for shares Wilson's")
        return "; ".join(parts) + "."
