"""Plant known faults in a copy of the package, and check that the named tests catch each of them.

A fault is a file of tests/mutants/: a description, `test:` lines, `quick` for some faults of each kind, and one hunk of
a diff. The old lines of the hunk must occur exactly once in the source, at any line and indentation. The named tests
must pass in an unchanged copy, and each must fail by an assertion in the broken copy. The exit code is 1 if a fault
survives.

A process that has imported torch and the like, and nothing of ours, is forked for each fault.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import textwrap
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests/mutants"
FORKS = multiprocessing.get_context("forkserver")
LIBRARIES = ["accelerate", "pydantic", "pytest", "safetensors.torch", "torch", "transformers.modeling_utils", "typer"]
"""What tests import of others."""


@dataclass(frozen=True)
class Mutant:
    """One fault: it replaces the lines `old` in `path` by `new`, and each of `tests` must fail."""

    name: str
    path: str
    old: tuple[str, ...]
    new: tuple[str, ...]
    tests: tuple[str, ...]
    quick: bool

    def apply(self, source: str) -> str:
        """Return the broken source. Raises ValueError if the old lines do not occur exactly once."""
        lines, wanted = source.splitlines(), [line.strip() for line in self.old]
        places = range(len(lines) - len(wanted) + 1)
        found = [at for at in places if [line.strip() for line in lines[at : at + len(wanted)]] == wanted]
        if len(found) != 1:
            raise ValueError(f"{self.name}: {self.path} has {len(found)} times {wanted}, expected once")
        margin = lines[found[0]].removesuffix(lines[found[0]].lstrip())
        new = textwrap.indent(textwrap.dedent("\n".join(self.new)), margin).splitlines()
        return "\n".join([*lines[: found[0]], *new, *lines[found[0] + len(wanted) :]]) + "\n"


def read(file: Path) -> Mutant:
    """Read one file of tests/mutants/."""
    head, _, hunk = file.read_text(encoding="utf-8").partition("\n@@\n")
    said = [line.partition(" ") for line in head.splitlines()]
    (path,) = (rest.removeprefix("b/") for word, _, rest in said if word == "+++")
    old, new = (tuple(line[1:] for line in hunk.splitlines() if line[0] in kind) for kind in (" -", " +"))
    tests = tuple(rest for word, _, rest in said if word == "test:")
    return Mutant(file.stem, path, old, new, tests, ("quick", "", "") in said)


def run_pytest(copy: Path, output: Path, arguments: Sequence[str]) -> None:
    """Run pytest in a copy, in the process of its own that calls this; what it prints goes to a file."""
    stream = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    os.chdir(copy)
    os.environ |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(copy)}  # for the processes that tests start
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(copy))
    import pytest

    pytest.main(["-q", "-p", "no:cacheprovider", *arguments])


def run_tests(tests: Sequence[str], mutant: Mutant | None = None) -> tuple[dict[str, set[str]], str]:
    """Run tests in a copy; return the outcomes per test ("passed", "assertion", "error"), and the output."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy, report, printed = Path(folder), Path(folder) / "report.xml", Path(folder) / "printed.txt"
        shutil.copy(ROOT / "pyproject.toml", copy)
        for name in ("rlhf_pipeline", "tests"):  # with their bytecode: compiling takes longer than most tests
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.pyc.*"))  # in work
        if mutant is not None:
            path = copy / mutant.path
            for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
                compiled.unlink()
            path.write_text(mutant.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
        process = FORKS.Process(target=run_pytest, args=(copy, printed, [f"--junitxml={report}", *tests]))
        process.start()
        process.join()
        output = printed.read_text(encoding="utf-8", errors="replace") if printed.is_file() else "nothing was run"
        cases = list(ElementTree.parse(report).iter("testcase")) if report.is_file() else []
    outcomes: dict[str, set[str]] = {test: set() for test in tests}
    for case in cases:
        identity = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        (found,) = [child for child in case if child.tag in ("failure", "error", "skipped")] or [None]
        asserted = found is not None and found.get("message", "").startswith(("assert", "AssertionError"))
        word = "passed" if found is None else "assertion" if asserted else "error"
        for test in {identity, identity.split("[")[0]} & set(outcomes):
            outcomes[test].add(word)
    return outcomes, output


def judge(mutant: Mutant) -> tuple[Mutant, str, str, float]:
    """Return the result of a fault ("caught", or why not), the tests' output, and the seconds."""
    start, word = time.perf_counter(), "caught"
    outcomes, output = run_tests(mutant.tests, mutant)
    if survived := [test for test, found in outcomes.items() if "assertion" not in found]:
        word = "SURVIVED: " + ", ".join(survived)
    if any("error" in found or not found for found in outcomes.values()):
        word = "BROKEN: an error instead of a failed assertion"
    return mutant, word, output, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    """Try the faults, print a table, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults to try (default: all)")
    parser.add_argument("--quick", action="store_true", help="only the faults that are marked quick")
    parser.add_argument("--jobs", type=int, default=2, help="faults tried at once (default: 2)")
    options = parser.parse_args(arguments)
    mutants = {file.stem: read(file) for file in sorted(folder.glob("*.patch"))}
    if unknown := set(options.names) - set(mutants):
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    os.environ["OMP_NUM_THREADS"] = "1"
    FORKS.set_forkserver_preload(LIBRARIES)
    chosen = [mutants[name] for name in options.names or mutants if mutants[name].quick or not options.quick]
    outcomes, output = run_tests(sorted({test for mutant in chosen for test in mutant.tests}))
    if failing := [test for test, found in outcomes.items() if found != {"passed"}]:
        print(output, "these tests do not pass without a mutant:", *failing, sep="\n")
        return 1
    print(f"{len(outcomes)} tests pass without a mutant")
    survivors: list[str] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for mutant, word, output, seconds in pool.map(judge, chosen):
            print(f"{mutant.name:40}  {mutant.path:36}  {seconds:5.1f} s  {word}", flush=True)
            survivors += [] if word == "caught" else [f"\n--- {mutant.name}: {word}\n{output}"]
    print(*survivors, f"{len(chosen) - len(survivors)} of {len(chosen)} mutants caught", sep="\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
