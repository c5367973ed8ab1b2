"""`rlhf doctor` and shell completion."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_pipeline.cli import doctor
from rlhf_pipeline.cli.main import main


def diagnosed(capsys, home: Path, code: int = 0) -> dict[str, dict[str, str]]:
    assert main(["--home", str(home), "doctor", "--json"]) == code
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is (code == 0)
    return {one["name"]: one for one in told["checks"]}


def test_this_environment_is_in_order(tmp_path, capsys) -> None:
    import torch

    found = diagnosed(capsys, tmp_path / "home")
    assert found["torch"]["found"] == importlib.metadata.version("torch")
    assert {"python", "transformers", "accelerate", "processor", "home", "disk", *doctor.OPTIONAL} <= set(found)
    assert found["home"]["found"].endswith("which does not exist yet") and not (tmp_path / "home").exists()
    assert not torch.cuda.is_available() or found["cuda:0"]["state"] == "ok"
    assert main(["--home", str(tmp_path), "doctor"]) == 0
    assert "all commands can run" in capsys.readouterr().out


def test_a_missing_and_an_old_package_are_faults(tmp_path, capsys, monkeypatch) -> None:
    real = doctor.version_of
    versions = {"accelerate": None, "transformers": "5.9.1"}
    monkeypatch.setattr(doctor, "version_of", lambda name: versions[name] if name in versions else real(name))
    found = diagnosed(capsys, tmp_path, code=1)
    assert found["accelerate"]["state"] == "fault" and "pip install 'accelerate>=" in found["accelerate"]["fix"]
    assert found["transformers"]["found"].startswith("5.9.1, older than 5.")
    assert main(["--home", str(tmp_path), "doctor"]) == 1
    assert "2 faults" in capsys.readouterr().out


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_home_that_cannot_be_written_is_a_fault(tmp_path, capsys) -> None:
    tmp_path.chmod(0o500)
    found = diagnosed(capsys, tmp_path / "home", code=1)
    assert "not writable" in found["home"]["found"]


def test_a_home_on_a_file_system_that_refuses(tmp_path, capsys, monkeypatch) -> None:
    def refuse(dir: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    assert "Read-only file system" in diagnosed(capsys, tmp_path, code=1)["home"]["found"]


def test_little_disk_memory_and_too_many_threads_are_warnings(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place: SimpleNamespace(free=2**29))
    monkeypatch.setattr(doctor, "machine_memory", lambda: (2**34, 2**30))
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    found = diagnosed(capsys, tmp_path)
    assert found["disk"]["state"] == found["memory"]["state"] == found["processor"]["state"] == "warning"
    assert found["disk"]["found"].startswith("0.5 GiB free") and found["memory"]["found"] == "1.0 GiB free of 16.0 GiB"


def test_versions_that_do_not_go_together(tmp_path, capsys, monkeypatch) -> None:
    real = doctor.version_of
    versions = {"vllm": "0.26.1", "peft": "0.9.0"}
    monkeypatch.setattr(doctor, "version_of", lambda name: versions.get(name) or real(name))
    monkeypatch.setattr("rlhf_pipeline.config.rollout_engine.vllm_version", lambda: versions["vllm"])
    found = diagnosed(capsys, tmp_path)
    assert found["vllm version"]["state"] == found["peft version"]["state"] == "warning"
    versions["vllm"], versions["peft"] = "0.30.0+cpu", "0.21.0"
    assert not {"vllm version", "peft version"} & set(diagnosed(capsys, tmp_path))


@pytest.mark.parametrize(
    ("version", "least", "older"),
    [("5.9", "5.20", True), ("5.20", "5.20", False), ("2.13.0+cpu", "2.13", False), ("1.15.0rc1", "1.15", False)],
)
def test_versions_are_compared_by_their_numbers(version, least, older) -> None:
    assert doctor.is_older(version, least) is older


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_of_a_shell(shell) -> None:
    words = {"bash": {"COMP_WORDS": "rlhf mod", "COMP_CWORD": "1"}}.get(shell, {"_TYPER_COMPLETE_ARGS": "rlhf mod"})
    environment = {
        **os.environ,
        "_RLHF_COMPLETE": f"complete_{shell}",
        **words,
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
    }
    code = "import sys; sys.argv = ['rlhf']; from rlhf_pipeline.cli.main import entry; entry()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "models" in done.stdout and "compare" not in done.stdout, done.stderr
