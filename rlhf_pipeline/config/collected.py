"""Which stages of an experiment can read the data that its `collect` stages make."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from rlhf_pipeline.config.collect import CollectConfig
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.config.grid import StageSpec
from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.config.stages import StageConfig
from rlhf_pipeline.config.yaml import KeyPath
from rlhf_pipeline.errors import Fault

Points = Mapping[str, Sequence[StageSpec[StageConfig]]]
"""Each stage at all points of its sweep, by its name."""

_PREFERENCES = ("train-rm", "dpo")
_DATA = ("dataset_name", "dataset_test_name", "datasets")
BEST = "one response to each prompt (labels best)"


def check_collected(stages: Points, where: Callable[[KeyPath], str]) -> Iterator[Fault]:
    """Yield the faults of stages on data of the wrong kind: preferences of one response, KTO of rankings.

    Args:
        where: the place of a key path of the experiment.
    """
    found: dict[Fault, None] = {}
    for name, points in stages.items():
        for spec in points:
            for path, source in spec.links.items():
                if spec.stage not in _PREFERENCES or path[0] not in _DATA:
                    continue
                place, loss = where(("stages", name, *path)), getattr(spec.config, "loss_type", None)
                for made in _collects(stages, source):
                    if made.labels == "best":
                        found[_fault(place, source, BEST, f"a {spec.stage} stage reads preferences")] = None
                    elif made.k > 2 and loss in UNPAIRED:
                        ranked = f"rankings of {made.k} responses (k {made.k})"
                        found[_fault(place, source, ranked, f"loss_type {loss} reads pairs or single responses")] = None
    yield from found


def check_context(
    compare: StageSpec[CompareConfig], stages: Points, where: Callable[[KeyPath], str]
) -> Iterator[Fault]:
    """Yield the fault of two-sided demonstrations, which need rejected responses, of `labels: best`."""
    source, settings = compare.links.get(("in_context", "source")), compare.config.in_context
    if source is None or settings is None or settings.score != "two_sided":
        return
    if any(made.labels == "best" for made in _collects(stages, source)):
        yield _fault(where(("compare", "in_context", "source")), source, BEST, "score two_sided reads rejected ones")


def _collects(stages: Points, name: str) -> Iterator[CollectConfig]:
    return (spec.config for spec in stages.get(name, ()) if isinstance(spec.config, CollectConfig))


def _fault(where: str, source: str, makes: str, reads: str) -> Fault:
    expected = "labels bradley-terry or rank" if makes == BEST else "k 2"
    return Fault(where, f"the stage {source!r} makes {makes}, and {reads}", f"data of a collect stage with {expected}")
