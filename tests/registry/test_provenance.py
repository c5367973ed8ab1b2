from __future__ import annotations

import platform
import subprocess
import sys

import pytest

import rlhf_pipeline
from rlhf_pipeline.registry import provenance
from rlhf_pipeline.registry.provenance import code_state, environment


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """The folder of a package in a folder of its own, taken for ours."""
    folder = tmp_path / "rlhf_pipeline"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    monkeypatch.setattr(rlhf_pipeline, "__file__", str(folder / "__init__.py"))
    return folder


def forget():
    """Forget what git said, as a new process has."""
    for asked in (provenance._is_checkout, provenance._is_modified, provenance._commit):
        asked.cache_clear()


def test_commit_of_a_checkout_and_whether_it_was_modified(package):
    assert code_state() == {"package": rlhf_pipeline.__version__, "commit": None, "modified": None}
    git(package.parent, "init")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "first")
    forget()
    state = code_state()
    assert (len(state["commit"]), state["modified"]) == (40, False)
    (package / "__init__.py").write_text("x = 1")
    assert code_state() == state  # the process still has the code that was committed
    forget()
    assert code_state() == {**state, "modified": True}


def test_a_checkout_without_a_commit_was_modified(package):
    git(package.parent, "init")
    assert code_state() == {"package": rlhf_pipeline.__version__, "commit": None, "modified": True}
    (package.parent / "HEAD").write_text("a file with the name of what git is asked for")
    assert code_state()["commit"] is None
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "first")
    assert len(code_state()["commit"]) == 40  # that there was none is not remembered


@pytest.mark.parametrize("command", ["rev-parse", "status"])
@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("git", 10), FileNotFoundError("git")])
def test_a_failure_of_git_is_not_remembered(package, monkeypatch, command, error):
    git(package.parent, "init")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "first")
    run = subprocess.run

    def failing(arguments, **options):
        if command in arguments:
            raise error
        return run(arguments, **options)

    monkeypatch.setattr(subprocess, "run", failing)
    failed = code_state()
    assert failed["modified"] is None
    assert (failed["commit"] is None) == (command == "rev-parse")
    monkeypatch.setattr(subprocess, "run", run)
    found = code_state()
    assert (len(found["commit"]), found["modified"]) == (40, False)
    monkeypatch.setattr(subprocess, "run", failing)
    assert code_state() == found  # an answer is


def test_commit_of_somebody_elses_checkout_is_not_ours(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "rlhf_pipeline"
    package.mkdir(parents=True)
    monkeypatch.setattr(rlhf_pipeline, "__file__", str(package / "__init__.py"))
    git(tmp_path, "init")
    assert code_state()["commit"] is None


def test_environment_names_versions_and_imports_no_torch():
    found = environment()
    assert found["python"] == platform.python_version()
    assert {"platform", "cpus", "threads", "torch", "transformers"} <= set(found)
    code = (
        "import sys, rlhf_pipeline.registry as r, rlhf_pipeline.registry.provenance as p; p.environment();"
        "print(sorted({'torch', 'transformers', 'datasets', 'trl'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
