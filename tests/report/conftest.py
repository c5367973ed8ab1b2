"""The report of everything, drawn once: drawing it takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.report import Results, write_report
from tests.once import once
from tests.report.report_fixture import full


@pytest.fixture(scope="session")
def full_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report of everything; for reading only."""

    def make(folder: Path) -> Path:
        write_report(Results.model_validate(full()), folder)
        return folder

    return once(tmp_path_factory, "report", make)
