"""`rlhf models ...`: the registry."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from rlhf_pipeline.cli.options import DebugOption, HomeOption, JsonOption, common_of
from rlhf_pipeline.cli.output import emit_json, emit_lines, emit_table, flat_metrics, printer

app = typer.Typer(no_args_is_help=True, help="List, show, alias, export, remove and verify registered models.")

RefArgument = Annotated[str, typer.Argument(metavar="REF", help="name, name@vN or name@alias.", show_default=False)]


@app.command("list")
def list_models(
    context: typer.Context, home: HomeOption = None, json: JsonOption = False, debug: DebugOption = False
) -> None:
    """All models and their versions."""
    common = common_of(context, home, json, debug=debug)
    from rlhf_pipeline.registry import Registry

    registry = Registry(common.home_path)
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


@app.command("show")
def show(
    context: typer.Context,
    reference: RefArgument,
    home: HomeOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """One model's manifest."""
    common = common_of(context, home, json, debug=debug)
    from rlhf_pipeline.errors import UnknownReference
    from rlhf_pipeline.registry import Registry

    resolved = Registry(common.home_path).resolve(reference)
    if resolved.manifest is None:
        raise UnknownReference(f"{resolved.label}: no manifest; only registered models have one")
    content = resolved.manifest.model_dump(mode="json")
    if common.json:
        emit_json({"path": str(resolved.path), **content})
        return
    keys = ("stage", "parents", "seed", "created", "config", "moves_optimum", "metrics", "cost")
    shown = {key: content[key] for key in keys}
    emit_table(f"{resolved.label}  {resolved.path}", ("what", "value"), flat_metrics(shown))
    findings = resolved.manifest.metrics.get("health") or []
    emit_lines([f"health: {one['cause']} since step {one['since_step']}: {one['message']}" for one in findings])


@app.command("lineage")
def lineage(
    context: typer.Context,
    reference: RefArgument,
    home: HomeOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Where a model comes from, down to the digests of its data."""
    common = common_of(context, home, json, debug=debug)
    from rlhf_pipeline.registry import Registry
    from rlhf_pipeline.registry.lineage import lineage_of, render

    registry = Registry(common.home_path)
    node = lineage_of(registry, registry.resolve(reference))
    if common.json:
        emit_json(node.to_dict())
    else:
        printer().print(render(node))


@app.command("alias")
def alias(
    context: typer.Context,
    reference: RefArgument,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The alias, as in name@ALIAS.", show_default=False)],
    home: HomeOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Let NAME point to a version from now on."""
    common = common_of(context, home, json, debug=debug)
    from rlhf_pipeline.registry import Registry

    resolved = Registry(common.home_path).alias(reference, name)
    if common.json:
        emit_json({"alias": f"{resolved.name}@{name}", "model": resolved.label})
    else:
        emit_lines([f"{resolved.name}@{name} is {resolved.label}"])


@app.command("export")
def export(
    context: typer.Context,
    reference: RefArgument,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.", show_default=False)],
    home: HomeOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Copy a model into a directory that plain transformers loads."""
    common = common_of(context, home, json, debug=debug)
    from rlhf_pipeline.registry import Registry

    target = Registry(common.home_path).export(reference, directory)
    if common.json:
        emit_json({"path": str(target)})
    else:
        emit_lines([f"exported to {target}"])


@app.command("remove")
def remove(
    context: typer.Context,
    reference: RefArgument,
    force: Annotated[bool, typer.Option("--force", help="Also if others come from it or aliases name it.")] = False,
    home: HomeOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Remove one version."""
    common = common_of(context, home, json, debug=debug)
    from rlhf_pipeline.registry import Registry

    resolved = Registry(common.home_path).remove(reference, force=force)
    if common.json:
        emit_json({"removed": resolved.label})
    else:
        emit_lines([f"removed {resolved.label}"])


@app.command("verify")
def verify(
    context: typer.Context,
    reference: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="One model, or collected:NAME; all if not given.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put damaged versions into HOME/quarantine; nothing is deleted.")
    ] = False,
    home: HomeOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check sizes and digests of all files; exit 2 when something is wrong and was not mended."""
    common = common_of(context, home, json, debug=debug)
    from rlhf_pipeline.registry import Registry
    from rlhf_pipeline.registry.repair import faults_of
    from rlhf_pipeline.registry.repair import repair as mend

    registry = Registry(common.home_path)
    done = mend(registry, reference) if repair else []
    # After a repair the reference may name another version, or nothing.
    faults = [] if reference is not None and done else faults_of(registry, reference)
    if common.json:
        result = {"ok": not faults, "faults": [str(fault) for fault in faults]}
        emit_json(result | ({"repaired": [asdict(one) for one in done]} if repair else {}))
    else:
        emit_lines([str(one) for one in done])
        emit_lines([str(fault) for fault in faults] or (["all files are what their manifests say"] if not done else []))
    if faults:
        raise typer.Exit(2)
