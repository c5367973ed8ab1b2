"""`rlhf import`: the config of another tool as a config of this package."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from rlhf_pipeline.cli.options import Common
from rlhf_pipeline.cli.output import emit_json
from rlhf_pipeline.errors import visible

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="YAML file, or a shell script that starts the tool.", show_default=False)
]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="TOOL",
        help="llamafactory, axolotl, openrlhf, torchtune, verl, open-instruct or trl (default: by its keys).",
        show_default=False,
    ),
]
StageOption = Annotated[
    str | None,
    typer.Option(metavar="STAGE", help="sft, train-rm, ppo or dpo (default: by the keys).", show_default=False),
]


def import_file(common: Common, file: FileArgument, tool: FromOption = None, stage: StageOption = None) -> None:
    """Write the config of another tool as YAML of this package to stdout, and what is lost to stderr."""
    from rlhf_pipeline.config.importing import import_config
    from rlhf_pipeline.config.yaml import dump

    found = import_config(file, tool, stage)
    if common.json:
        losses = [asdict(loss) for loss in found.lost]
        emit_json(
            {"tool": found.tool, "stage": found.stage, "config": found.config, "lost": losses, "notes": found.notes}
        )
        return
    lines = [f"{file}: a config of {found.tool}, for `rlhf {found.stage} --config FILE`"]
    idle: dict[str, list[str]] = {}
    for loss in found.lost:
        if not loss.changes_training:
            idle.setdefault(loss.why, []).append(loss.key)
            continue
        text = str(loss.value)
        shown = text if len(text) <= 60 else f"{text[:57]}..."
        lines.append(f"lost, which changes what is trained: {loss.key}: {shown}: {loss.why}")
    lines += [f"no effect here: {', '.join(names)}: {why}" for why, names in idle.items()]
    lines += [f"note: {note}" for note in found.notes]
    sys.stderr.write("".join(f"{visible(line)}\n" for line in lines))
    sys.stdout.write(dump(found.config))
