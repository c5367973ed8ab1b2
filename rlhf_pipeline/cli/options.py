"""Options that every command has; they work before and after the subcommand."""

from __future__ import annotations

import os
from collections.abc import Sequence
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
WordsArgument = Annotated[
    list[str],
    typer.Argument(metavar="REF|KEY=VALUE", help="The model; overrides of the config.", show_default=False),
]
ResumeOption = Annotated[
    bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished run of the same config, or start afresh.")
]


def references_and_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of a command that takes models and overrides: an override has `=` and a key that is no path."""

    def is_override(word: str) -> bool:
        if "=" in word and Path(word).is_dir():
            return False
        key, equals, _ = word.partition("=")
        # A YAML file is no model either: as an override it is told where a config belongs.
        return "/" not in key if equals else word.endswith((".yaml", ".yml")) and Path(word).is_file()

    return [word for word in words if not is_override(word)], [word for word in words if is_override(word)]


def one_reference(command: str, words: Sequence[str]) -> tuple[str, list[str]]:
    """The one model that a command takes, and the overrides beside it.

    Raises:
        BadInput: none is named, or several are.
    """
    references, overrides = references_and_overrides(words)
    if len(references) != 1:
        found = " and ".join(map(repr, references)) or "no model"
        raise BadInput(f"rlhf {command}: found {found}, expected one model; write rlhf {command} REF [KEY=VALUE]...")
    return references[0], overrides


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
