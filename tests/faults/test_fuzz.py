from __future__ import annotations

import pytest

from tests.faults.fuzz import TARGETS, examine, fuzz

pytestmark = pytest.mark.check


@pytest.mark.parametrize("name", TARGETS)
def test_only_errors_of_ours_come_out_of_random_input(name, tmp_path):
    assert examine(name, tmp_path, 100) >= 50


def test_a_fault_that_is_none_of_ours_is_found(monkeypatch):
    def broken(folder, found):
        raise KeyError("planted")

    monkeypatch.setitem(TARGETS, "references", (broken, TARGETS["references"][1]))
    for name in ("yaml", "values", "rows"):
        monkeypatch.delitem(TARGETS, name)
    found = fuzz(0.01, examples=2)
    assert found["failures"] and "planted" in found["failures"][0]["error"]
