"""Workers that help a comparison: they measure its models from the last to the first (compare/ahead.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.config.compare import CompareConfig
from rlhf_pipeline.experiment.workers import Crew, Job, Team, hired, threads_each

LOG = "compare.txt"


@dataclass
class Helpers:
    """The workers of a crew that measure for a comparison; in the crew their keys are negative.

    home: of the comparison. logs: the folder of their log.
    """

    crew: Team
    home: Path
    logs: Path
    _given: int = 0
    _last: Any = ()

    def ask(self, config: CompareConfig, points: Sequence[Point] | None, most: int) -> None:
        """Have up to `most` workers that are free measure these points; the same points are given only once."""
        if points == self._last:
            return
        self._last = points
        self.logs.mkdir(parents=True, exist_ok=True)
        (self.logs / LOG).touch()
        values = None if points is None else [asdict(point) for point in points]
        job = Job(config.stage, config.model_dump(mode="json"), str(self.home), str(self.logs / LOG), points=values)
        while self.crew.free and sum(key < 0 for key in self.crew.busy) < most:
            self._given += 1
            self.crew.give(-self._given, job)

    @contextmanager
    def beside(
        self, config: CompareConfig, points: Sequence[Point] | None, before_work: Callable[[], None]
    ) -> Iterator[None]:
        """Have all workers but one help the comparison that this process makes with the threads of that one.

        before_work: called first, while the workers begin.
        """
        self.ask(config, points, self.crew.size - 1)
        before_work()
        import torch

        threads = torch.get_num_threads()
        if self.crew.threads is not None:
            torch.set_num_threads(self.crew.threads)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


@contextmanager
def helped(
    config: CompareConfig, home: Path, jobs: int, before_work: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Have `jobs` - 1 worker processes help a comparison that this process makes meanwhile; see `Helpers.beside`."""
    if jobs == 1:
        before_work()
        yield
        return
    home = home.absolute()
    with (
        hired(Crew(jobs, threads_each(jobs))) as crew,
        Helpers(crew, home, home / "logs" / config.name).beside(config, None, before_work),
    ):
        yield
