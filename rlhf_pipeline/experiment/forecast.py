"""What runs will take on this machine, in numbers with their units and in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.grid import Node, StageSpec
from rlhf_pipeline.config.stages import CollectConfig, ModelConfig, PpoConfig, TrainingConfig
from rlhf_pipeline.errors import BadInput, ConfigError, first_line
from rlhf_pipeline.experiment.comparison import comparison, run_of_prompts, runs_of_arms
from rlhf_pipeline.experiment.machine import FACTOR, Speed, speed_of
from rlhf_pipeline.experiment.outlook import Outlook
from rlhf_pipeline.experiment.progress import spoken
from rlhf_pipeline.experiment.work import Amounts
from rlhf_pipeline.models.refusals import refuse_to_hide


@dataclass(frozen=True)
class Forecast:
    """The amounts and the time of a run or a comparison; figures is {} if they are not known."""

    figures: dict[str, Any]
    notes: tuple[str, ...]
    speed: Speed | None = None

    @property
    def seconds(self) -> float | None:
        """The estimated time; None if it is not known."""
        return self.figures.get("seconds")


def forecast_run(outlook: Outlook, node: Node) -> Forecast:
    """The forecast of one run.

    Raises:
        BadInput: its rows cannot be read.
    """
    config = outlook.config(node)
    found = _forecast(lambda: outlook.amounts(node), lambda: outlook.described(node), config)
    if not found.figures:
        return found
    rows = "records" if isinstance(config, CollectConfig) else "prompts" if isinstance(config, PpoConfig) else "rows"
    figures = {rows: found.figures.pop("rows")}
    if isinstance(config, PpoConfig):
        figures |= {"updates": config.updates, "episodes": config.updates * config.rollout_batch_size}
    return Forecast(figures | found.figures, found.notes, found.speed)


def forecast_comparison(outlook: Outlook, spec: StageSpec[CompareConfig]) -> Forecast:
    """The forecast of an experiment's comparison: its samples, their scores and their KL."""
    arms = runs_of_arms(outlook, spec)
    if not arms:
        return Forecast({}, ("its time is not known: no arm is a stage of this experiment",))
    if run_of_prompts(outlook, spec) is None:
        return Forecast({}, ("its time is not known: its arms are trained on mixtures, so name its prompts",))
    found = _forecast(lambda: comparison(outlook, spec), lambda: outlook.described(arms[0]), spec.config)
    if found.figures:
        found.figures["prompts"] = found.figures.pop("rows")
    return found


def _forecast(amounts: Callable[[], Amounts], described: Callable[[], Any], config: ModelConfig) -> Forecast:
    try:
        found = amounts()
        if found.work is None:
            return Forecast({} if found.rows is None else {"rows": found.rows}, found.notes)
        speed = speed_of(described(), config)
    except Exception as error:
        # An architecture that cannot be made from its config alone; an adapter that does not fit is refused.
        if isinstance(error, BadInput) and (not isinstance(error, ConfigError) or adapts(config)):
            raise
        refuse_to_hide(error)
        return Forecast({}, (f"its tokens and its time are not known: {first_line(error)}",))
    work = found.work
    parts = {name: value for name, value in speed.seconds(work).items() if value}
    figures = {
        "rows": found.rows,
        "optimizer_steps": work.optimizer_steps,
        "tokens_trained": work.tokens_trained,
        "tokens_sampled": work.tokens_sampled,
        "tflop": work.flops / 1e12,
        "evaluation_tflop": work.evaluation / 1e12,
        **{f"{name}_seconds": value for name, value in parts.items()},
        "seconds": sum(parts.values()),
    }
    return Forecast(figures, found.notes, speed)


def adapts(config: ModelConfig) -> bool:
    """Whether a run trains an adapter."""
    return isinstance(config, TrainingConfig) and config.use_peft


SUMMED = ("optimizer_steps", "tokens_trained", "tokens_sampled", "tflop", "evaluation_tflop", "seconds")


def total_of(forecasts: Sequence[Forecast]) -> dict[str, Any]:
    """The sums over all forecasts whose figures are known."""
    return {name: sum(one.figures.get(name, 0) for one in forecasts) for name in SUMMED}


def about(seconds: float, speed: Speed) -> str:
    """One sentence on a time: `about 3.0 h on this machine at 120 GFLOP/s, ...; up to a factor of 2 either way`."""
    rate = speed.training / 1e9
    shown = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    where = f"on this machine ({speed.device}) at {shown} GFLOP/s, if nothing else runs on it"
    return f"about {spoken(seconds)} {where}; up to a factor of {FACTOR} either way"


def shares(figures: Mapping[str, Any]) -> str:
    """The parts of a time: `training 2.0 h, sampling 40 min`."""
    names = ("training", "scoring", "sampling", "evaluation")
    parts = [(name, figures[f"{name}_seconds"]) for name in names if f"{name}_seconds" in figures]
    return ", ".join(f"{name} {spoken(value)}" for name, value in parts)
