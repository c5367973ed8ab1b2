"""`make faults`: everything that can be done to a run, its files and its inputs, at length; prints the results.

    python -m tests.faults.run [--only kills,stops,...] [--seed N] [--share F] [--output docs/faults.md]

Seeded: a figure that is not as it should be can be had again. `--share` does that share of each kind (a rehearsal; its
table is printed, not written). What failed stays in the folder that is named at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_pipeline.data import parsed
from tests.faults import children, kills, subjects
from tests.faults.table import Row, document, table

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "docs/faults.md"
STEPS = 20


@dataclass
class Bench:
    """What the kinds of fault share. share: of each kind that is done."""

    folder: Path
    seed: int
    share: float
    made: list[subjects.Subject] | None = None

    def count(self, whole: int) -> int:
        return max(2, round(whole * self.share))

    def subjects(self) -> list[subjects.Subject]:
        """The four stages of 20 steps and an experiment."""
        if self.made is None:
            steps = STEPS if self.share == 1 else max(4, round(STEPS * self.share))
            self.made = subjects.make_subjects(self.folder, steps=steps)
        return self.made

    def stages(self) -> list[subjects.Subject]:
        return [subject for subject in self.subjects() if subject.name != subjects.EXPERIMENT]

    def steps(self) -> int:
        return STEPS if self.share == 1 else max(4, round(STEPS * self.share))


def _kills(bench: Bench) -> list[Row]:
    fresh = bench.count(20)
    found = kills.kills(bench.subjects(), bench.folder / "kills", count=bench.count(300), fresh=fresh, seed=bench.seed)
    trials = found["trials"]
    what = (
        f"SIGKILL at {found['hits']} random points of {trials} runs (four stages and `rlhf run`; {fresh} in fresh "
        "processes), then the same command again"
    )
    whole = trials - len(found["failed"])
    return [
        Row(
            what,
            f"{whole} of {trials} resumed; no torn version, weights and metrics bit for bit the same",
            found["failed"],
        )
    ]


def _jobs(bench: Bench) -> list[Row]:
    from tests.faults.jobs import kills_of_parents

    found = kills_of_parents(bench.folder / "jobs", count=bench.count(30), seed=bench.seed)
    trials = found["trials"]
    what = f"SIGKILL of `rlhf run --jobs 2` at {found['hits']} random points of {trials} runs, then the same command"
    came = f"{trials - len(found['failed'])} of {trials} resumed; no process left; weights, metrics and version numbers"
    return [Row(what, f"{came} as of runs one after another", found["failed"])]


def _stops(bench: Bench) -> list[Row]:
    fresh, folder = bench.count(20), bench.folder / "stops"
    found = kills.stops(bench.stages(), folder, steps=bench.steps(), fresh=fresh, seed=bench.seed)
    whole = found["trials"] - len(found["failed"])
    what = (
        f"each stage stopped and resumed at every step of a {bench.steps()}-step run, and at all of them in one run; "
    )
    what += f"and at {fresh} random steps in fresh processes"
    return [Row(what, f"{whole} of {found['trials']} identical bit for bit", found["failed"])]


def _terminate(bench: Bench) -> list[Row]:
    demo = subjects.make_demo_subjects(bench.folder / "terminate")
    fresh = bench.count(20)
    count = max(bench.count(50) - fresh, 2)
    found = kills.terminate(demo, bench.folder / "terminate", count=count, fresh=fresh, seed=bench.seed)
    whole, trials = found["trials"] - len(found["failed"]), found["trials"]
    what = f"SIGTERM at {trials} random moments while training the demo's models ({fresh} in fresh processes)"
    came = f"{whole} checkpoints and exit code 143; longest wait {found['longest_wait_seconds']:.1f} s"
    return [Row(what, came, found["failed"])]


def _tests(words: Sequence[str], folder: Path) -> tuple[int, list[str]]:
    """Passed and failed of a run of pytest, in a process of its own."""
    report = folder / "report.xml"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if not report.exists():
        return 0, [done.stdout[-2000:] + done.stderr[-2000:]]
    from xml.etree import ElementTree

    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    failed = [
        str(case.get("name")) for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    return len(cases) - len(failed), failed


def _disks(bench: Bench) -> list[Row]:
    from tests.faults.disks import disk_full, read_only

    found = disk_full(bench.count(30), bench.folder / "disks")
    disk = "a small separate disk" if found["mounted"] else "a limit on the size of files"
    what = f"{disk}, full at {found['full']} points of a run, a collection, a comparison and PPO "
    what += f"({found['in_fresh_processes']} in fresh processes)"
    whole = found["trials"] - len({failure.partition(": ")[0] for failure in found["failed"]})
    rows = [
        Row(
            what,
            f"{whole} of {found['trials']}: an error of one line, nothing damaged, resumed with free space",
            found["failed"],
        )
    ]
    for folder, fresh, where in (("closed", False, ""), ("closed-fresh", True, ", in fresh processes")):
        closed = read_only(bench.folder / folder, fresh=fresh)
        came = (
            f"{closed['trials'] - len(closed['failed'])} of {closed['trials']}: an error of one line, nothing damaged"
        )
        what = f"a read-only home, {closed['trials']} commands{where}"
        rows.append(Row(what, came, closed["failed"]))
    return rows


def _bad_files(bench: Bench) -> list[Row]:
    from tests.faults import bad_configs, bad_data

    passed, failed = _tests(["tests/faults/test_bad_files.py"], bench.folder / "bad")
    what = f"{len(bad_data.BAD)} bad data files and {len(bad_configs.BAD)} bad configs"
    return [Row(what, f"{max(passed - 1, 0)} end with exit code 2 and no traceback; the error names the place", failed)]


def _fuzz(bench: Bench) -> list[Row]:
    from tests.faults.fuzz import fuzz

    found = fuzz(600 * bench.share, bench.seed)
    counts = ", ".join(f"{name} {count:,}" for name, count in found["by_target"].items())
    what = f"{found['seconds'] / 60:.0f} minutes of generated YAML, configs, rows and references ({counts})"
    return [Row(what, f"{len(found['failures'])} uncaught exceptions", found["failures"])]


def _finite(bench: Bench) -> list[Row]:
    passed, failed = _tests(["tests/training/test_finite.py"], bench.folder / "finite")
    what = (
        "NaN and infinities injected into log-probability, score, reward, value, advantage, loss, gradient, "
        "in every stage"
    )
    came = f"{passed} of {passed + len(failed)} tests: stopped before the step; the error names the place and the rows"
    return [Row(what, came, failed)]


def _memory(bench: Bench) -> list[Row]:
    passed, failed = _tests(["tests/training/test_halves.py"], bench.folder / "memory")
    what = "out of memory in training, scoring, sampling and evaluation"
    came = f"{passed} of {passed + len(failed)} tests: batches halved, weights within 1e-6 of the unhalved step"
    return [Row(what, came, failed)]


def _names(bench: Bench) -> list[Row]:
    from tests.faults.hostile_names import hostile_names

    found = hostile_names(bench.folder / "names")
    what = f"{found['names']} hostile names in {found['ways']} places"
    return [Row(what, f"{found['trials']} trials, {len(found['failed'])} escapes", found["failed"])]


def _files(bench: Bench) -> list[Row]:
    from tests.faults.hostile_files import hostile_files

    home = subjects.make_template(bench.folder / "hostile")
    found = hostile_files(home, bench.folder / "hostile-files")
    what = f"{found['cases']} hostile files: pickles, tags, remote code, templates, archives, links, pages"
    return [Row(what, f"{len(found['failed'])} executions, escapes or network requests", found["failed"])]


def _labels(bench: Bench) -> list[Row]:
    from tests.labelling.kill import BROWSERS, kills
    from tests.labelling.load import load

    found = kills(bench.folder / "labels", bench.count(50), bench.seed)
    what = f"SIGKILL of the labelling server at {found['kills']} random points while {BROWSERS} browsers label"
    came = f"{found.get('acknowledged', 0)} acknowledged actions, {len(found['failed'])} lost, doubled or changed; "
    rows = [Row(what, f"{came}{found.get('resent', 0)} sent again", found["failed"])]
    found = load(bench.folder / "load", labelers=50, rate=10, seconds=60 * bench.share)
    what = f"50 labelers, 10 actions a second each: {found.get('actions', 0)} actions"
    came = f"{len(found['failed'])} lost; saved within {found.get('p99_ms')} ms (99th percentile)"
    return [*rows, Row(what, came, found["failed"])]


def _registry(bench: Bench) -> list[Row]:
    from tests.faults.registry_load import concurrency

    rows = []
    for processes, each, method in ((16, 50, "fork"), (20, 10, "spawn")):
        found = concurrency(bench.count(processes), bench.count(each), method=method)
        what = f"{found['processes']} {'' if method == 'fork' else 'separately started '}processes, "
        what += f"{found['registered']} registrations, while other processes read and move aliases"
        came = f"{found['distinct']} distinct versions, {len(found['lost'])} lost; {len(found['torn'])} torn reads"
        rows.append(Row(what, f"{came} of {found['reads']}", [] if found["ok"] else [found]))
    return rows


def _fresh(bench: Bench) -> list[Row]:
    from tests.faults import fresh

    template = subjects.make_template(bench.folder / "fresh")
    (dpo,) = subjects.make_subjects(bench.folder / "fresh-subject", steps=6, names=("dpo",))
    rows = []
    kinds = fresh.every_kind(template, dpo, bench.folder / "fresh-trials", bench.count(fresh.COUNT), bench.seed)
    for kind, trials in kinds.items():
        done = list(trials)
        failed = [asdict(trial) for trial in done if trial.faults]
        came = f"{len(done) - len(failed)} of {len(done)} as in the other rows"
        rows.append(Row(f"{len(done)} {kind}, in fresh processes", came, failed))
    return rows


def _flips(bench: Bench) -> list[Row]:
    from tests.faults.flips import flips, prepare

    found = flips(
        bench.count(1000), bench.seed, prepare(bench.folder / "flips"), range(0, 100, max(1, round(1 / bench.share)))
    )
    done = found["flips"] + found["cuts"]
    what = f"{found['flips']} bits flipped, {found['cuts']} cuts in {found['files']} files of checkpoints, models, data"
    return [
        Row(
            what,
            f"{done - len(found['missed'])} of {done} detected; the error names the file",
            [*found["missed"], *found["after"]],
        )
    ]


# Those that compute in this process come last: children are forked from one that has not.
KINDS: dict[str, Callable[[Bench], list[Row]]] = {
    "kills": _kills,
    "jobs": _jobs,
    "stops": _stops,
    "terminate": _terminate,
    "disks": _disks,
    "registry": _registry,
    "labels": _labels,
    "fresh": _fresh,
    "finite": _finite,
    "memory": _memory,
    "bad": _bad_files,
    "fuzz": _fuzz,
    "names": _names,
    "files": _files,
    "flips": _flips,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default=",".join(KINDS), help="kinds of fault, by comma")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="do this share of each kind")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    parsed.STORED_BYTES = 0  # the small sources of the subjects have stores too, so that kills and full disks hit them
    kinds = [kind for kind in options.only.split(",") if kind]
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"--only: found {', '.join(unknown)}; expected some of {','.join(KINDS)}")
    folder = Path(tempfile.mkdtemp(prefix="rlhf-faults-"))
    children.prepare()
    bench, rows = Bench(folder, options.seed, options.share), []
    for kind in kinds:
        started = time.perf_counter()
        found = KINDS[kind](bench)
        seconds = (time.perf_counter() - started) / len(found)
        rows += [Row(row.what, row.came, row.failed, seconds) for row in found]
        for row in found:
            print(f"{kind}: {row.what}: {row.came}; {len(row.failed)} failed", file=sys.stderr, flush=True)
    failed = [failure for row in rows for failure in row.failed]
    print(table(rows))
    if options.share == 1 and set(kinds) == set(KINDS) and not failed:
        options.output.write_text(document(rows, options.seed), encoding="utf-8")
    if failed:
        print(json.dumps(failed, indent=1, default=str)[:20000], file=sys.stderr)
        print(f"{len(failed)} failed; what is left of them lies in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
