"""`rlhf report`: make the page of a comparison again from its results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlhf_pipeline.cli.options import Common, command
from rlhf_pipeline.cli.output import emit
from rlhf_pipeline.errors import UnknownReference, did_you_mean

RESULTS = "results.json"


def _folder(home: Path, name: str) -> Path:
    """The folder of a report.

    Raises:
        UnknownReference: no such report.
    """
    names = sorted(path.parent.name for path in (home / "reports").glob(f"*/{RESULTS}"))
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "there is no report yet: run rlhf compare to make one"
        near = did_you_mean(name, names)
        raise UnknownReference("; ".join(filter(None, (f"no report {name!r} in {home / 'reports'}", near or there))))
    return home / "reports" / name


def report(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the comparison.", show_default=False)],
) -> None:
    """Make reports/NAME/index.html again from its results.json."""
    directory = _folder(common.home_path, name)
    from rlhf_pipeline.report import load, write_report

    path = write_report(load(directory / RESULTS), directory)
    emit({"path": str(path)}, [f"report  {path}"], json=common.json)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(app, "report")(report)
