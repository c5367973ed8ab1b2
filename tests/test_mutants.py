"""The table of planted faults: it fits the sources, and the script tells a caught fault from the rest."""

from __future__ import annotations

import ast
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = spec_from_file_location("mutants", ROOT / "scripts/mutants.py")
mutants = module_from_spec(spec)
sys.modules["mutants"] = mutants  # dataclasses look their module up
spec.loader.exec_module(mutants)


def test_every_replacement_matches_once_and_gives_another_program():
    for mutant in mutants.MUTANTS:
        source = (ROOT / mutant.path).read_text()
        mutated = mutant.apply(source)  # names the mutant where its passage is not there once
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(source)), mutant.name


def test_every_named_test_is_there():
    for mutant in mutants.MUTANTS:
        assert mutant.tests, mutant.name
        for test in mutant.tests:
            path, name = test.split("::")
            found = re.search(rf"^def {re.escape(name.split('[')[0])}\(", (ROOT / path).read_text(), re.MULTILINE)
            assert found, f"{mutant.name}: {test}"


def test_names_are_distinct():
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names)


def test_a_passage_that_is_not_there_once_is_refused():
    mutant = mutants.Mutant("none", "errors.py", "no such passage", "", ("tests/test_mutants.py::test",))
    with pytest.raises(ValueError, match="0 times"):
        mutant.apply("source")
    with pytest.raises(ValueError, match="2 times"):
        mutant.apply("no such passage, no such passage")


@pytest.mark.slow
@pytest.mark.check
def test_only_a_failed_assertion_catches_a_fault_and_a_survivor_is_the_exit_code(capsys):
    old, tests = "    mean = total / count\n", ("tests/algorithms/test_masked.py::test_moments_by_hand",)
    faults = {
        "wrong": ("    mean = total * count\n", "caught"),
        "harmless": ("    mean = total * (1 / count)\n", "SURVIVED"),
        "error-in-the-test": ("    mean = totals / count\n", "BROKEN"),
        "not-collected": ("    mean = = total / count\n", "BROKEN"),
    }
    table = [mutants.Mutant(name, "algorithms/masked.py", old, new, tests) for name, (new, _) in faults.items()]
    assert mutants.main([], table) == 1
    printed = capsys.readouterr().out
    for name, (_, word) in faults.items():
        assert re.search(rf"^{name} .* s  {word}", printed, re.MULTILINE)
    assert "1 of 4 mutants caught" in printed
    assert mutants.main(["wrong"], table) == 0
