"""Every bad file is refused: exit code 2, the place named, no traceback, nothing left in the home."""

from __future__ import annotations

import pytest

from rlhf_pipeline.cli.main import main
from tests.faults import bad_configs, bad_data, fresh


def test_there_are_as_many_kinds_as_promised():
    assert len(bad_data.BAD) >= 60 and len(bad_data.ROW_FAULTS) >= 15
    assert len(bad_configs.BAD) >= 60
    for corpus in (bad_data.BAD, bad_configs.BAD):
        assert len({bad.name for bad in corpus}) == len(corpus)


@pytest.mark.parametrize("bad", [*bad_data.BAD, *bad_configs.BAD], ids=lambda bad: bad.name)
def test_a_bad_file_is_refused_and_its_place_named(bad, capsys, tmp_path):
    home = tmp_path / "home"
    code = main([*bad.write(tmp_path), "--home", str(home)])
    captured = capsys.readouterr()
    assert fresh.not_refused(bad, tmp_path, home, code, captured.err + captured.out) == []
