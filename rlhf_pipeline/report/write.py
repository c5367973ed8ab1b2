"""A report in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.registry.storage import replace_text, writing
from rlhf_pipeline.report.page import page
from rlhf_pipeline.report.points import Points

PAGE = "index.html"


def write_report(results: Mapping[str, Any], directory: Path) -> Path:
    """Write index.html and points/*.csv from what results.json holds; the same results give the same bytes.

    Returns the path of index.html. Whatever the results do not have, the page does not show.
    """
    points = Points()
    text = page(dict(results), points)
    with writing(directory, "the report"):
        directory.mkdir(parents=True, exist_ok=True)
        points.write(directory)
        replace_text(directory / PAGE, text)
        points.remove_stale(directory)  # last: the page before this one may still refer to them
    return directory / PAGE
