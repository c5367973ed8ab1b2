"""Children and the commands that they run, for the quick part of the fault harness."""

from __future__ import annotations

import pytest

from tests.faults import children, subjects


@pytest.fixture(scope="session")
def disturbed(tmp_path_factory: pytest.TempPathFactory) -> list[subjects.Subject]:
    """The four stages and an experiment, each a few steps long, with what they leave when nothing disturbs them."""
    children.prepare()
    return subjects.make_subjects(tmp_path_factory.mktemp("subjects"), steps=5)
