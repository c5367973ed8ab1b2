from __future__ import annotations

import platform
import subprocess
import sys

import rlhf_pipeline
from rlhf_pipeline.registry.provenance import _checkout, code_state, environment


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_commit_of_a_checkout_and_whether_it_was_modified(tmp_path, monkeypatch):
    package = tmp_path / "rlhf_pipeline"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(rlhf_pipeline, "__file__", str(package / "__init__.py"))
    assert code_state() == {"package": rlhf_pipeline.__version__, "commit": None, "modified": None}
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    _checkout.cache_clear()  # as in a new process
    state = code_state()
    assert (len(state["commit"]), state["modified"]) == (40, False)
    (package / "__init__.py").write_text("x = 1")
    assert code_state() == state  # the process still has the code that was committed
    _checkout.cache_clear()
    assert code_state() == {**state, "modified": True}


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
