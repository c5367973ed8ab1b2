"""Children and the commands that they run, for the quick part of the fault harness."""

from __future__ import annotations

import pytest

from tests.faults import children, subjects
from tests.once import once


@pytest.fixture(scope="session")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> list[subjects.Subject]:
    """The four stages and an experiment, each a few steps long, with what they leave when nothing disturbs them."""
    children.prepare()
    return once(tmp_path_factory, "subjects", lambda folder: subjects.make_subjects(folder, steps=5))
