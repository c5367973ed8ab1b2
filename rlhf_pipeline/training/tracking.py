"""Metrics to metrics.jsonl, log lines to log.txt, and progress to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    track,
)

from rlhf_pipeline.disk.storage import replace_text
from rlhf_pipeline.errors import visible
from rlhf_pipeline.health.monitor import Finding

if TYPE_CHECKING:
    from rlhf_pipeline.training.trackers import Trackers

RATE_OVER = 50
"""The number of updates over which the shown rate is averaged."""
SILENCE = 30.0
"""Seconds after which the next update is shown, whatever `logging_steps` says: slow runs look dead otherwise."""


class _Console(Console):
    """A console for text from manifests, files and models; it shows control characters as escapes."""

    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(visible(item) if isinstance(item, str) else item for item in objects), **options)


console = _Console(stderr=True, highlight=False, soft_wrap=True)


def say_in_handler(say: Callable[[str], None], text: str) -> None:
    """Say something in a signal handler; it is left out if the signal came while the same stream was written to."""
    with suppress(RuntimeError):  # Python refuses that: "reentrant call"
        say(text)


def jsonable(value: Any, instead: Callable[[float], Any] = lambda _: None) -> Any:
    """Replace NaN and infinities, which JSON does not have, by instead(value), at every depth."""
    if isinstance(value, Mapping):
        return {key: jsonable(item, instead) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(item, instead) for item in value]
    return instead(value) if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except (ValueError, KeyError, TypeError):  # the last line of a killed process may be cut
        return math.inf


def logged(step: int, every: int, total: int) -> bool:
    """Whether an update is logged: every `every`-th, the first and the last."""
    return step % every == 0 or step in (1, total)


class RunLog:
    """The files of one run directory and the live line of a training run.

    Args:
        directory: runs/<run-id>; it must exist.
        total: number of updates. shown: names of the metrics in the live line.
        quiet: no progress (tests, ranks other than the first). writes: false on ranks other than the first.
    """

    def __init__(
        self,
        directory: Path,
        *,
        title: str,
        logging_steps: int,
        total: int = 0,
        shown: Sequence[str] = (),
        quiet: bool = False,
        writes: bool = True,
    ):
        self.directory, self.title, self.total, self.shown = directory, title, total, shown
        self.logging_steps = max(1, logging_steps)
        self.quiet = quiet
        metrics, log = (directory / name if writes else Path(os.devnull) for name in ("metrics.jsonl", "log.txt"))
        self._metrics: IO[str] = metrics.open("a", encoding="utf-8")
        self._log: IO[str] = log.open("a", encoding="utf-8")
        self._live = sys.stderr.isatty() and not quiet
        self._progress: Progress | None = None
        self._task: Any = None
        self.trackers: Trackers | None = None
        self._times: deque[tuple[float, int]] = deque(maxlen=RATE_OVER)
        self._shown_at = time.perf_counter()

    def rewind(self, step: int) -> None:
        """Remove what was logged after `step`, because a resumed run writes it again."""
        path = self.directory / "metrics.jsonl"
        self._metrics.close()
        rows = path.read_text(encoding="utf-8").splitlines()
        kept = [row for row in rows if _step_of(row) <= step]
        replace_text(path, "".join(row + "\n" for row in kept))
        self._metrics = path.open("a", encoding="utf-8")

    def sync(self) -> None:
        """Sync the log to disk, so that after a power failure a checkpoint has all of its metrics."""
        if self._metrics.name != os.devnull:
            os.fsync(self._metrics.fileno())

    def say(self, text: str, *, style: str | None = None) -> None:
        """Write one line to log.txt and to stderr."""
        self._log.write(visible(text) + "\n")
        self._log.flush()
        if not self.quiet:
            console.print(text, style=style, markup=False)

    def update(self, step: int, metrics: dict[str, float], note: str = "") -> None:
        """Log an update; metrics.jsonl gets every `logging_steps`-th update, the first and the last.

        note: text for the live line only.
        """
        self._times.append((time.perf_counter(), step))
        due = logged(step, self.logging_steps, self.total)
        line = "  ".join(f"{name} {metrics[name]:.4g}" for name in self.shown if name in metrics)
        line += f"  {note}" if note else ""
        if due:
            self.record(step, metrics)
        if self._live:
            self._show(step, line)
        elif not self.quiet and ((due and self._heartbeat(step)) or self._times[-1][0] - self._shown_at > SILENCE):
            self._shown_at, rate = self._times[-1][0], self._rate()
            pace = f"{rate:.3g}/s  {(self.total - step) / rate:.0f} s left  " if rate else ""
            console.print(f"{self.title} {step}/{self.total}  {pace}{line}", markup=False)

    def _rate(self) -> float:
        """Updates per second over the last updates; 0 after the first, which includes the start-up."""
        (before, first), (now, last) = self._times[0], self._times[-1]
        return (last - first) / max(now - before, 1e-9)

    def _heartbeat(self, step: int) -> bool:
        """Whether to print progress at a step without a terminal: about twenty lines per run."""
        every = max(self.logging_steps, -(-self.total // 20))
        return step in (1, self.total) or step % every < self.logging_steps

    def _show(self, step: int, line: str) -> None:
        if self._progress is None:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[line]}"),
            )
            self._progress = Progress(*columns, console=console, transient=True)
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=self.total, rate="", line="")
        rate = self._rate()
        self._progress.update(self._task, completed=step, rate=f"{rate:.3g}/s", line=line)

    def record(self, step: int, metrics: dict[str, float]) -> None:
        """Write metrics of an update, or of an evaluation after it, to metrics.jsonl."""
        self._metrics.write(json.dumps(jsonable({"step": step, **metrics})) + "\n")
        self._metrics.flush()
        if self.trackers is not None:
            self.trackers.record(step, metrics)

    def close(self) -> None:
        """Stop the live line and close the files."""
        if self._progress is not None:
            self._progress.stop()
        if self.trackers is not None:
            self.trackers.finish()
        self._metrics.close()
        self._log.close()


def progress(items: Sequence[Any], title: str):
    """Iterate over items, with a progress bar on stderr if stderr is a terminal."""
    if not sys.stderr.isatty():
        yield from items
        return
    yield from track(items, description=title, console=console, transient=True)


def tell(log: RunLog, findings: Sequence[Finding]) -> None:
    """Log one line for each new finding."""
    for finding in findings:
        log.say(finding.line(), style="yellow")


def tell_all(log: RunLog, findings: Sequence[Finding]) -> None:
    """Log one line with all findings at the end of a run, or nothing without findings."""
    if findings:
        log.say(f"health: {', '.join(finding.span() for finding in findings)}", style="yellow")
