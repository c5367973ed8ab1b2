"""`rlhf cache ...`: what the home keeps so that it need not be computed again."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rlhf_pipeline.cli.options import Common, command
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table

if TYPE_CHECKING:
    from rlhf_pipeline.disk.cache import Entry

app = typer.Typer(no_args_is_help=True, help="List and clean the cache of the home directory.")

DAY = 24 * 3600


@command(app, "list")
def list_cache(common: Common) -> None:
    """Everything in the cache, the least recently used first."""
    from rlhf_pipeline.disk.cache import entries

    found = entries(common.home_path / "cache")
    if common.json:
        emit_json({"home": str(common.home_path), "bytes": sum(one.size for one in found), "entries": _plain(found)})
    elif not found:
        emit_lines([f"nothing in {common.home_path / 'cache'}"])
    else:
        _show(common, found)


@command(app, "clean", dry_run=True)
def clean(
    common: Common,
    unused_for: Annotated[
        float, typer.Option("--unused-for", metavar="DAYS", min=0, help="Days since the last use; 0: everything.")
    ] = 30,
) -> None:
    """Remove what was not used for some days, except answers of language models; it is made again when needed."""
    from rlhf_pipeline.disk.cache import ANSWERS, entries, remove

    limit = time.time() - unused_for * DAY
    old = [one for one in entries(common.home_path / "cache") if one.used <= limit and one.kind != ANSWERS]
    for one in old if not common.dry_run else ():
        remove(one)
    size = sum(one.size for one in old)
    if common.json:
        emit_json({"removed": [] if common.dry_run else _plain(old), "bytes": size, "entries": _plain(old)})
        return
    if old:
        _show(common, old)
    said = "would be removed" if common.dry_run else "removed"
    emit_lines([f"{said}: {len(old)} entries, {_megabytes(size)} MB"])


def _plain(found: Sequence[Entry]) -> list[dict[str, Any]]:
    return [asdict(one) | {"path": str(one.path)} for one in found]


def _show(common: Common, found: Sequence[Entry]) -> None:
    """Print a table of entries."""
    cache = common.home_path / "cache"
    rows = [
        (
            str(one.path.relative_to(cache)),
            one.kind,
            _megabytes(one.size),
            f"{max(0.0, time.time() - one.used) / DAY:.1f}",
            one.source or "-",
        )
        for one in found
    ]
    title = f"{cache}: {_megabytes(sum(one.size for one in found))} MB"
    emit_table(title, ("entry", "what", "MB", "days unused", "source"), rows, folds=("source",))


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f}"
