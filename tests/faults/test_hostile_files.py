from __future__ import annotations

import pytest

from tests.faults.hostile_files import CASES, attempt, make_scene


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 50


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_runs_nothing_and_reaches_nothing(tiny, tmp_path, name) -> None:
    assert attempt(name, make_scene(tiny.home, tmp_path / "scene")) == []
