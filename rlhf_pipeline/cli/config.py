"""`rlhf config ...`: the keys that a command's YAML may have."""

from __future__ import annotations

from typing import Annotated

import typer

from rlhf_pipeline.cli.options import Common, command
from rlhf_pipeline.cli.output import emit_json, emit_table

app = typer.Typer(no_args_is_help=True, help="Show the keys of a command's YAML file.")

StageArgument = Annotated[
    str,
    typer.Argument(metavar="STAGE", help="A command, as in dpo; `experiment` for rlhf run.", show_default=False),
]


@command(app, "keys")
def keys(common: Common, stage: StageArgument) -> None:
    """Name, type, default and description of every key."""
    from rlhf_pipeline.config.fields import keys_of

    found = keys_of(stage)
    if common.json:
        listed = [
            {"name": key.name, "type": key.words, "default": key.default, "required": key.required}
            | {"description": key.description}
            for key in found.values()
        ]
        emit_json({"stage": stage, "keys": listed})
        return
    rows = [(key.name, key.words, key.default_text, key.description) for key in found.values()]
    emit_table(stage, COLUMNS, rows, folds=COLUMNS[1:])


COLUMNS = ("key", "type", "default", "what it does")


@command(app, "schema")
def schema(common: Common, stage: StageArgument) -> None:
    """The JSON schema of the YAML file, for editors and other programs; always JSON."""
    from rlhf_pipeline.config.fields import schema_of

    emit_json(schema_of(stage))
