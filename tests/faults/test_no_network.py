"""Nothing is asked of another machine unless the id of a model or data set on the hub was given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.faults import children, subjects

TRAP = """
    import socket, sys, time
    time.sleep = lambda seconds: None  # libraries try again and again
    asked = open({note!r}, "a")

    def refuse(self, address, *rest):
        print("connect", address, file=asked, flush=True)
        raise OSError(101, "Network is unreachable")

    def refuse_name(host, *rest, **options):
        print("look up", host, file=asked, flush=True)
        raise socket.gaierror(-2, "Name or service not known")

    socket.socket.connect = socket.socket.connect_ex = refuse
    socket.getaddrinfo = refuse_name
"""


def trap(note: Path) -> str:
    """A program that refuses every connection and keeps who was asked for in a file."""
    return textwrap.dedent(TRAP.format(note=str(note)))


@pytest.mark.check
@pytest.mark.slow
def test_the_four_stages_and_a_comparison_ask_nobody(tmp_path, monkeypatch) -> None:
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    children.prepare()
    note, home = tmp_path / "asked", tmp_path / "home"
    experiment = subjects.experiment_files(tmp_path / "experiment", steps=4)

    def before() -> None:
        exec(trap(note), {})

    done = children.run(["run", str(experiment), "--home", str(home)], tmp_path / "said", before=before)
    assert done.code == 0, done.err
    assert (home / "reports/disturbed/index.html").exists()
    assert note.read_text() == ""


def fresh(code: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, with the variables of a user who has set none but these."""
    names = (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "HF_DATASETS_OFFLINE",
        "HF_HUB_DISABLE_TELEMETRY",
        "DO_NOT_TRACK",
    )
    environment = {key: value for key, value in os.environ.items() if key not in names}
    environment |= {"OMP_NUM_THREADS": "1", "RLHF_HOME": str(home), "HF_HOME": str(home.parent / "hub"), **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)


GENERATE = "\nfrom rlhf_pipeline.cli.main import main\nsys.exit(main(['generate', 'org/none', '--prompt', 'x']))"


@pytest.mark.slow
@pytest.mark.check
@pytest.mark.parametrize("offline", ["", "1"])
def test_a_hub_id_is_asked_for_unless_offline(tmp_path, offline) -> None:
    note = tmp_path / "asked"
    variables = {"HF_HUB_OFFLINE": offline} if offline else {}
    done = fresh(trap(note) + GENERATE, tmp_path / "home", **variables)
    assert done.returncode == 2, done.stderr
    assert "org/none" in done.stderr and "Traceback" not in done.stderr
    assert bool(note.read_text()) is not bool(offline)


def test_telemetry_is_off_before_a_library_is_imported(tmp_path) -> None:
    code = """
        import json, os, sys
        from rlhf_pipeline.cli.main import main

        assert "huggingface_hub" not in sys.modules and "torch" not in sys.modules
        main(["models", "list"])
        from huggingface_hub import constants

        print(json.dumps([constants.HF_HUB_DISABLE_TELEMETRY, os.environ["DO_NOT_TRACK"]]))
    """
    done = fresh(textwrap.dedent(code), tmp_path / "home")
    assert json.loads(done.stdout.splitlines()[-1]) == [True, "1"], done.stderr
    done = fresh(textwrap.dedent(code), tmp_path / "home", HF_HUB_DISABLE_TELEMETRY="0", DO_NOT_TRACK="0")
    assert json.loads(done.stdout.splitlines()[-1])[0] is False  # the user's own setting wins
