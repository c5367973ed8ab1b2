"""Every bad file is refused: exit code 2, the place named, no traceback, nothing left in the home."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from tests.faults import bad_configs, bad_data


def refused(capsys: pytest.CaptureFixture, home: Path, *words: str) -> str:
    """Run `rlhf`, expect a refusal that leaves nothing behind; return what was said."""
    code = main([*words, "--home", str(home)])
    captured = capsys.readouterr()
    said = captured.err + captured.out
    assert code == 2, said[-2000:]
    assert "Traceback" not in said
    assert not home.exists() or not any(path.is_file() for path in home.rglob("*"))
    return said


def test_there_are_as_many_kinds_as_promised():
    assert len(bad_data.BAD) >= 60 and len(bad_data.ROW_FAULTS) >= 15
    assert len(bad_configs.BAD) >= 60
    for corpus in (bad_data.BAD, bad_configs.BAD):
        assert len({bad.name for bad in corpus}) == len(corpus)


@pytest.mark.parametrize("bad", bad_data.BAD, ids=lambda bad: bad.name)
def test_a_bad_data_file(bad, capsys, tmp_path):
    path = tmp_path / bad.file
    if callable(bad.content):
        bad.content(path)
    else:
        path.write_bytes(bad.content)
    said = refused(capsys, tmp_path / "home", "data", "check", str(path))
    place = next((line for line in said.splitlines() if str(tmp_path / bad.place) in line and not is_count(line)), "")
    assert place, said[-2000:]
    assert all(word in place for word in bad.says), place


def is_count(line: str) -> bool:
    """Whether a line counts the faults of a whole file."""
    return "rows cannot be used" in line or "no rows left" in line


@pytest.mark.parametrize("bad", bad_configs.BAD, ids=lambda bad: bad.name)
def test_a_bad_config(bad, capsys, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_bytes(bad.content)
    said = refused(capsys, tmp_path / "home", *bad.words, str(path), *bad.overrides)
    wanted = f"{path}{bad.place}" if bad.place else ""
    assert any(wanted in line and all(word in line for word in bad.says) for line in said.splitlines()), said[-2000:]
    assert len(said) < 20_000
