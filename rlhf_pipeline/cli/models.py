"""`rlhf models ...`: the registry."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common, command
from rlhf_pipeline.cli.output import emit, emit_json, emit_lines, emit_table, flat_metrics, printer
from rlhf_pipeline.errors import BadInput, UnknownReference

app = typer.Typer(no_args_is_help=True, help="List, show, alias, export, push, remove and verify registered models.")

RefArgument = Annotated[str, typer.Argument(metavar="REF", help="name, name@vN or name@alias.", show_default=False)]


@command(app, "list")
def list_models(common: Common) -> None:
    """All models and their versions."""
    registry = common.registry
    entries: list[dict[str, Any]] = []
    for item in registry.models.all():
        aliases = sorted(
            alias for alias, version in registry.models.aliases(item.name).items() if version == item.version
        )
        made = item.manifest
        entries.append(
            {
                "model": item.label,
                "stage": made.stage if made else "damaged",
                "aliases": aliases,
                "parents": {role: parent.ref for role, parent in made.parents.items()} if made else {},
                "created": made.created if made else None,
                "digest": item.digest,
                "path": str(item.path),
            }
        )
    if common.json:
        emit_json({"home": str(common.home_path), "models": entries})
        return
    if not entries:
        emit_lines([f"no models in {common.home_path}"])
        return
    rows = [
        (
            entry["model"],
            entry["stage"],
            ", ".join(entry["aliases"]) or "-",
            ", ".join(sorted(set(entry["parents"].values()))) or "-",
            entry["created"] or "-",
            (entry["digest"] or "-")[:12],
        )
        for entry in entries
    ]
    columns = ("model", "stage", "aliases", "from", "created", "digest")
    emit_table(str(common.home_path), columns, rows, folds=("aliases", "from"))


@command(app, "show")
def show(common: Common, reference: RefArgument) -> None:
    """One model's manifest."""
    resolved = common.registry.resolve(reference)
    if resolved.manifest is None:
        raise UnknownReference(f"{resolved.label}: no manifest; only registered models have one")
    content = resolved.manifest.model_dump(mode="json")
    if common.json:
        emit_json({"path": str(resolved.path), **content})
        return
    keys = ("stage", "parents", "adapter", "seed", "created", "config", "moves_optimum", "metrics", "cost")
    shown = {key: content[key] for key in keys}
    emit_table(f"{resolved.label}  {resolved.path}", ("what", "value"), flat_metrics(shown))
    findings = resolved.manifest.metrics.get("health") or []
    emit_lines([f"health: {one['cause']} since step {one['since_step']}: {one['message']}" for one in findings])


@command(app, "lineage")
def lineage(common: Common, reference: RefArgument) -> None:
    """Show the lineage of a model, down to the digests of its data."""
    from rlhf_pipeline.registry.lineage import lineage_of, render

    registry = common.registry
    node = lineage_of(registry, registry.resolve(reference))
    if common.json:
        emit_json(asdict(node))
    else:
        printer().print(render(node))


@command(app, "alias")
def alias(
    common: Common,
    reference: RefArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The alias, as in name@ALIAS.", show_default=False)],
) -> None:
    """Point the alias NAME to a version."""
    resolved = common.registry.alias(reference, name)
    emit(
        {"alias": f"{resolved.name}@{name}", "model": resolved.label},
        [f"{resolved.name}@{name} is {resolved.label}"],
        json=common.json,
    )


@command(app, "export")
def export(
    common: Common,
    reference: RefArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.", show_default=False)],
    merge: Annotated[bool, typer.Option("--merge", help="Add adapters to the weights they stand on.")] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="With --merge: float32, bfloat16 or float16 (default: of training).")
    ] = None,
) -> None:
    """Copy a model into a directory that transformers can load; an adapter needs its base there, or --merge."""
    if dtype is not None and not merge:
        raise BadInput("--dtype: found without --merge; files are copied as they are: add --merge, or leave it out")
    if merge:
        load_libraries()
        from rlhf_pipeline.stages.export import export_merged

        done = export_merged(common.registry, reference, directory, dtype)
        emit(done, [f"exported to {done['path']} in {done['dtype']}", done["summary"]], json=common.json)
        return
    target = common.registry.export(reference, directory)
    emit({"path": str(target)}, [f"exported to {target}"], json=common.json)


@command(app, "push")
def push(
    common: Common,
    reference: RefArgument,
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository on the hub.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
) -> None:
    """Upload a model with its card and manifest to the hub; local paths in them become names of files."""
    from rlhf_pipeline.registry.hub import push as upload

    done = upload(common.registry, reference, name, private=private)
    emit(done, [f"uploaded {done['model']} to {done['url']}"], json=common.json)


@command(app, "remove")
def remove(
    common: Common,
    reference: RefArgument,
    force: Annotated[bool, typer.Option("--force", help="Also if it has descendants or aliases.")] = False,
) -> None:
    """Remove one version."""
    resolved = common.registry.remove(reference, force=force)
    emit({"removed": resolved.label}, [f"removed {resolved.label}"], json=common.json)


@command(app, "verify")
def verify(
    common: Common,
    reference: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="One model, or collected:NAME; all if not given.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move damaged versions to HOME/quarantine; nothing is deleted.")
    ] = False,
) -> None:
    """Check sizes and digests of all files; exit 2 if something is wrong and was not repaired."""
    from rlhf_pipeline.registry.repair import registry_faults
    from rlhf_pipeline.registry.repair import repair as mend

    registry = common.registry
    done = mend(registry, reference) if repair else []
    # After a repair the reference may name another version, or none.
    faults = [] if reference is not None and done else registry_faults(registry, reference)
    if common.json:
        result = {"ok": not faults, "faults": [str(fault) for fault in faults]}
        emit_json(result | ({"repaired": [asdict(one) for one in done]} if repair else {}))
    else:
        emit_lines([str(one) for one in done])
        emit_lines([str(fault) for fault in faults] or (["all files match their manifests"] if not done else []))
    if faults:
        raise typer.Exit(2)
