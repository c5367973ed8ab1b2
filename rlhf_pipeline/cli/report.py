"""`rlhf report`: the page of a comparison, made again from its results.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_pipeline.cli.options import Common, command
from rlhf_pipeline.cli.output import emit
from rlhf_pipeline.errors import DamagedFile, UnknownReference, did_you_mean

RESULTS = "results.json"


def _results(home: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The folder of a report and what its results.json holds.

    Raises:
        UnknownReference: no such report. DamagedFile: its results.json cannot be read.
    """
    names = sorted(path.parent.name for path in (home / "reports").glob(f"*/{RESULTS}"))
    if name not in names:
        there = f"there are {', '.join(names)}" if names else "there are none yet: rlhf compare makes one"
        near = did_you_mean(name, names)
        raise UnknownReference("; ".join(filter(None, (f"no report {name!r} in {home / 'reports'}", near or there))))
    directory = home / "reports" / name
    path = directory / RESULTS
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedFile(f"{path}: found no JSON ({error}), expected what rlhf compare wrote; compare again") from None
    if not isinstance(found, dict):
        raise DamagedFile(f"{path}: found {type(found).__name__}, expected an object; compare again")
    return directory, found


def report(
    common: Common,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the comparison.", show_default=False)],
) -> None:
    """Make reports/NAME/index.html again from its results.json."""
    directory, results = _results(common.home_path, name)
    from rlhf_pipeline.report import write_report

    path = write_report(results, directory)
    emit({"path": str(path)}, [f"report  {path}"], json=common.json)


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    command(app, "report")(report)
