"""Options that every command has; they work before and after the subcommand."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from rlhf_pipeline.errors import BadInput

HOME_VARIABLE = "RLHF_HOME"
DEFAULT_HOME = "rlhf_home"


@dataclass(frozen=True)
class Common:
    """What the common options say."""

    home: Path | None = None
    json: bool = False
    dry_run: bool = False
    debug: bool = False

    @property
    def home_path(self) -> Path:
        """The home directory: --home, else $RLHF_HOME, else ./rlhf_home."""
        home = self.home or Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
        if any(ord(char) < 32 or ord(char) == 127 for char in str(home)):
            raise BadInput(f"--home {str(home)!r}: expected a path without control characters")
        if home.exists() and not home.is_dir():
            raise BadInput(f"--home {home}: found a file, expected a directory (or a path where one can be made)")
        return home


HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", help=f"Home directory of models, runs and data (default: ${HOME_VARIABLE}, else ./rlhf_home)."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object to stdout.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Resolve, validate and estimate; train and write nothing.")
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file.", show_default=False)]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the config.", show_default=False)
]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished run of the same config, or start afresh.")
]


def common_of(
    context: typer.Context, home: Path | None = None, json: bool = False, dry_run: bool = False, debug: bool = False
) -> Common:
    """Merge the options given after the subcommand with those given before it, and remember the result."""
    before = context.find_root().obj
    before = before if isinstance(before, Common) else Common()
    merged = replace(
        before,
        home=home or before.home,
        json=json or before.json,
        dry_run=dry_run or before.dry_run,
        debug=debug or before.debug,
    )
    context.find_root().obj = merged
    return merged
