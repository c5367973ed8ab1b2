"""The planted faults of tests/mutants/: they fit the sources, and the script tells a caught fault from the rest."""

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
FILES = sorted(mutants.FOLDER.glob("*.patch"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_patch_fits_once_and_gives_another_program(file):
    mutant, head = mutants.read(file), file.read_text().splitlines()[0]
    source = (ROOT / mutant.path).read_text()
    assert ast.dump(ast.parse(mutant.apply(source))) != ast.dump(ast.parse(source))
    assert head.endswith(".") and head[0].isupper()  # what it breaks, in a sentence


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_named_test_is_there(file):
    tests = mutants.read(file).tests
    assert tests
    for test in tests:
        path, name = test.split("::")
        assert re.search(rf"^def {re.escape(name.split('[')[0])}\(", (ROOT / path).read_text(), re.MULTILINE), test


def test_there_are_quick_faults_and_others():
    assert {mutants.read(file).quick for file in FILES} == {True, False}


PATCH = """Nothing is left.
test: tests/x.py::test_x
quick
--- a/rlhf_pipeline/x.py
+++ b/rlhf_pipeline/x.py
@@
     if a:
-        return 1
-
-    return 2
+        return 3
+    return 4
"""


def test_a_patch_is_read_and_fits_at_any_line_and_indentation(tmp_path):
    file = tmp_path / "gone.patch"
    file.write_text(PATCH)
    mutant = mutants.read(file)
    assert (mutant.name, mutant.path, mutant.quick) == ("gone", "rlhf_pipeline/x.py", True)
    assert mutant.tests == ("tests/x.py::test_x",)
    source = "def f(a):\n    if a:\n        return 1\n\n    return 2\n"
    assert mutant.apply(source) == "def f(a):\n    if a:\n        return 3\n    return 4\n"
    moved = "class C:\n    x = 1\n\n" + "".join(
        f"    {line}" if line.strip() else line for line in source.splitlines(True)
    )
    assert (
        mutant.apply(moved)
        == "class C:\n    x = 1\n\n    def f(a):\n        if a:\n            return 3\n        return 4\n"
    )
    with pytest.raises(ValueError, match="has 0 times"):
        mutant.apply(source.replace("2", "5"))
    with pytest.raises(ValueError, match="has 2 times"):
        mutant.apply(source + source)


@pytest.mark.slow
@pytest.mark.check
def test_only_a_failed_assertion_catches_a_fault_and_a_survivor_is_the_exit_code(tmp_path, capsys, monkeypatch):
    faults = {
        "wrong": ("mean = total * count", "caught"),
        "harmless": ("mean = total * (1 / count)", "SURVIVED"),
        "error-in-the-test": ("mean = totals / count", "BROKEN"),
        "not-collected": ("mean = = total / count", "BROKEN"),
    }
    for name, (new, _) in faults.items():
        (tmp_path / f"{name}.patch").write_text(
            "A moment is wrong.\ntest: tests/algorithms/test_masked.py::test_moments_by_hand\n"
            + ("quick\n" if name == "wrong" else "")
            + "--- a/rlhf_pipeline/algorithms/masked.py\n+++ b/rlhf_pipeline/algorithms/masked.py\n@@\n"
            f"-    mean = total / count\n+    {new}\n"
        )
    monkeypatch.syspath_prepend(ROOT / "scripts")  # where the processes find what they call
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert mutants.main([], tmp_path) == 1
    printed = capsys.readouterr().out
    for name, (_, word) in faults.items():
        assert re.search(rf"^{name} .* s  {word}", printed, re.MULTILINE)
    assert "1 of 4 mutants caught" in printed
    tried = []

    def outcomes(tests, mutant=None):
        tried.append(mutant and mutant.name)
        return {test: {"assertion" if mutant else "passed"} for test in tests}, ""

    monkeypatch.setattr(mutants, "run_tests", outcomes)
    assert mutants.main(["--quick"], tmp_path) == 0 and "1 of 1 mutants caught" in capsys.readouterr().out
    assert tried == [None, "wrong"]
    with pytest.raises(SystemExit):
        mutants.main(["none"], tmp_path)
