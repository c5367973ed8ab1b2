"""`rlhf label export` and `rlhf label import`: labels as data, and projects of Argilla and Label Studio."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlhf_pipeline.cli.label import NameArgument, app
from rlhf_pipeline.cli.options import Common, command
from rlhf_pipeline.cli.output import emit
from rlhf_pipeline.errors import BadInput, visible

if TYPE_CHECKING:
    from rlhf_pipeline.labelling.export import Kind, Several
    from rlhf_pipeline.labelling.importing import Tool
    from rlhf_pipeline.labelling.store import LabelStore
    from rlhf_pipeline.labelling.tools.form import Imported

__all__ = ["app"]

OutputOption = Annotated[
    Path | None, typer.Option("--output", "-o", metavar="PATH", help="File of the rows, or new folder of the project.")
]
SeveralOption = Annotated[
    Literal["mean", "each"],
    typer.Option(
        "--several",
        help="Several labelers of an item: their mean rank (Borda), with less noise than one labeler's label has, or a "
        "row for each, by which probabilities are those of a labeler drawn at random.",
    ),
]
BadOption = Annotated[
    list[str] | None,
    typer.Option("--bad", metavar="QUESTION[=no]", help="For labels: an answer that makes a response bad; repeatable."),
]


@command(app, "export")
def export_project(
    common: Common,
    name: NameArgument,
    kind: Annotated[
        Literal["rankings", "pairs", "ratings", "labels", "argilla", "label-studio"],
        typer.Option("--as", help="Rows to train on (labels: for KTO), or a project of another tool."),
    ] = "rankings",
    output: OutputOption = None,
    publish: Annotated[
        str | None, typer.Option("--publish", metavar="NAME", help="Publish the rows as collected:NAME.")
    ] = None,
    several: SeveralOption = "mean",
    bad: BadOption = None,
    users: Annotated[
        list[str] | None,
        typer.Option(
            "--user", metavar="UUID", help="Argilla's id of labeler 1, 2, ...; without it no answers go along."
        ),
    ] = None,
    models: Annotated[
        bool, typer.Option("--with-models", help="Tell the other tool which model gave each response: not blind.")
    ] = False,
) -> None:
    """Write the labels as JSONL, publish them as collected data, or write a project of Argilla or Label Studio."""
    from rlhf_pipeline.labelling.project import named

    with named(common.home_path, name) as store:
        if kind == "argilla" or kind == "label-studio":  # `in` would not narrow the type
            _export_project(common, store, kind, output, publish, users or (), models)
        else:
            _export(common, store, name, kind, output, publish, several, bad)


@command(app, "import")
def import_project(
    common: Common,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder or file of the project.", show_default=False)],
    name: Annotated[str | None, typer.Option("--name", help="The new labelling project (default: as PATH).")] = None,
    tool: Annotated[
        Literal["argilla", "label-studio"] | None,
        typer.Option("--from", help="Whose project it is (default: by its files).", show_default=False),
    ] = None,
    interface: Annotated[
        Path | None, typer.Option("--interface", help="Labelling interface of Label Studio, if it is elsewhere.")
    ] = None,
    kind: Annotated[
        Literal["rankings", "pairs", "ratings", "labels"] | None,
        typer.Option("--as", help="Make no project, but write these rows to --output, or publish them."),
    ] = None,
    output: OutputOption = None,
    publish: Annotated[
        str | None, typer.Option("--publish", metavar="NAME", help="Publish the rows as collected:NAME.")
    ] = None,
    several: SeveralOption = "mean",
    bad: BadOption = None,
) -> None:
    """Make a labelling project of one of Argilla or Label Studio, with its judgements, or rows of it."""
    from rlhf_pipeline.labelling.importing import make_project, read_project

    if kind is None and (output is not None or publish is not None):
        raise BadInput("--output and --publish: expected --as rankings, pairs, ratings or labels beside them")
    found = read_project(path, tool, interface)
    called = name or found.form.name
    _tell(found.notes)
    if kind is not None:
        _tell([f"lost: {count} {reason}" for reason, count in (+found.lost).items()])
        _export(common, found, called, kind, output, publish, several, bad)
        return
    with make_project(called, path, common.home_path, found) as store:
        lost = dict(+found.lost)
        _tell([f"lost: {count} {reason}" for reason, count in lost.items()])
        counts = {"items": len(store.items()), "judgements": len(store.judgements()), "labelers": len(store.labelers())}
        made = {"project": called, "path": str(store.path.parent), **counts, "lost": lost, "notes": found.notes}
    said = ", ".join(f"{count} {what}" for what, count in counts.items())
    emit(made, [f"project   {called}: {said}", f"serve it  rlhf label serve {called}"], json=common.json)


def _export(
    common: Common,
    project: LabelStore | Imported,
    name: str,
    kind: Kind,
    output: Path | None,
    publish: str | None,
    several: Several,
    bad: list[str] | None,
) -> None:
    """Write rows of a project, or publish them."""
    from rlhf_pipeline.labelling.export import export, publish_rows, read_answer, write_rows
    from rlhf_pipeline.labelling.store import LabelStore

    if (output is None) == (publish is None):
        raise BadInput(f"--as {kind}: expected --output FILE or --publish NAME, one of them")
    answers = None if bad is None else dict(map(read_answer, bad))
    if isinstance(project, LabelStore):
        items, judgements, fields = project.items(), project.judgements(), _origin(project)
    else:
        items, judgements, fields = project.items, project.judgements, {}
    found = export(items, judgements, kind, several=several, bad=answers)
    left_out = dict(sorted(found.left_out.items()))
    counted = ", ".join(f"{reason} {count}" for reason, count in left_out.items())
    _tell([*found.notes, *([f"left out: {counted}"] if counted else [])])
    result: dict[str, Any] = {"as": kind, "rows": len(found.rows), "left_out": left_out, "notes": found.notes}
    if publish is not None:
        made = publish_rows(common.registry, publish, found, project=name, several=several, bad=answers, **fields)
        result |= {"data": f"collected:{made.label}", "path": str(made.path)}
    elif output is not None:
        write_rows(output, found.rows)
        result |= {"data": str(output), "path": str(output)}
    emit(result, [f"{len(found.rows)} {kind}: {result['data']}"], json=common.json)


def _export_project(
    common: Common,
    store: LabelStore,
    tool: Tool,
    output: Path | None,
    publish: str | None,
    users: Sequence[str],
    models: bool,
) -> None:
    """Write a project of another tool, whose labelers are 0, 1, ..."""
    from rlhf_pipeline.labelling.importing import form_of

    if output is None or publish is not None:
        raise BadInput(f"--as {tool}: expected --output FOLDER, and no --publish: it is a project, not data")
    items, form = store.items(), form_of(store.config)
    given = store.judgements()
    labelers = sorted({judgement.labeler for judgement in given})
    judgements = [one.model_copy(update={"labeler": labelers.index(one.labeler)}) for one in given]
    if tool == "argilla":
        from rlhf_pipeline.labelling.tools.argilla_write import write_argilla

        lost = write_argilla(output, items, judgements, form, users=users, models=models)
    else:
        from rlhf_pipeline.labelling.tools.label_studio_write import write_label_studio

        lost = write_label_studio(output, items, judgements, form, models=models)
    lost["judgements, of which the time and the order on the page are not kept"] += len(judgements)
    _tell([f"lost: {count} {reason}" for reason, count in (+lost).items()])
    written = {"path": str(output), "items": len(items), "lost": dict(+lost)}
    emit(written, [f"wrote {len(items)} items to {output}"], json=common.json)


def _origin(store: LabelStore) -> dict[str, Any]:
    """Return the fields of a manifest that say where the responses come from."""
    from rlhf_pipeline.registry.manifest import Parent

    parents = {
        f"policy_{number}" if number > 1 else "policy": Parent(ref=reference, digest=digest)
        for number, (reference, digest) in enumerate(store.origin.parents.items(), start=1)
    }
    return {
        "parents": parents,
        "seed": store.config.seed,
        "tokenizer_digest": store.origin.tokenizer_digest,
        "chat_template_digest": store.origin.chat_template_digest,
    }


def _tell(lines: Sequence[str]) -> None:
    sys.stderr.write("".join(f"{visible(line)}\n" for line in lines))
