"""`rlhf label ...`: preferences from people, on a page in the browser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common, OverridesArgument, Settings, command
from rlhf_pipeline.cli.output import emit, emit_json, emit_lines, emit_plan, emit_table

if TYPE_CHECKING:
    from socket import socket

    from rlhf_pipeline.config.labelling import LabelConfig
    from rlhf_pipeline.labelling.store import LabelStore

NEW = "new"
SEVERAL = ("--policies", "--arena")
"""Options that take several values: `--policies REF REF`."""
KEYS = (
    *("policies", "arena", "responses", "prompts", "name", "k", "num", "overlap", "repeat_share", "mode", "order"),
    *("reward_model", "instructions", "temperature", "response_length", "seed", "host", "port", "token"),
)


class Labelling(TyperGroup):
    """A group whose words are those of `new` where they begin with an option or a key."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, rewritten(args))


def rewritten(words: Sequence[str]) -> list[str]:
    """Return the words with the command `new` in front if they begin with none, and with one value for each option.

    `--policies A B --k 4` becomes `new --policies A,B --k 4`. A word with `=` sets a key of the config, unless it is a
    path.
    """
    found = list(words)
    if found and found[0] not in ("--help", "-h") and (found[0].startswith("-") or "=" in found[0]):
        found.insert(0, NEW)
    if not found or found[0] != NEW:
        return found
    made: list[tuple[str, list[str]]] = []  # a word, and the values that follow it
    for word in found:
        name, equals, value = word.partition("=")
        is_value = not word.startswith("-") and (not equals or "/" in name)
        if made and made[-1][0] in SEVERAL and is_value:
            made[-1][1].append(word)
        elif name in SEVERAL:  # a second `--policies` adds to the first
            earlier = [one for known, values in made if known == name for one in values]
            made = [one for one in made if one[0] != name]
            made.append((name, earlier + ([value] if equals else [])))
        else:
            made.append((word, []))
    return [word for name, values in made for word in ([name, ",".join(values)] if values else [name])]


app = typer.Typer(
    cls=Labelling,
    no_args_is_help=True,
    help="Collect preferences from people: rlhf label --policies REF REF --prompts SOURCE --k 4 samples responses and "
    "serves a page on which people rank them.",
)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Labelling project.", show_default=False)]
HostOption = Annotated[
    str | None, typer.Option("--host", help="Address to serve at; any other than loopback needs a token.")
]
PortOption = Annotated[int | None, typer.Option("--port", min=0, max=65535, help="Port; 0: any free one.")]
TokenOption = Annotated[str | None, typer.Option("--token", help="Token for hosts other than loopback (default: new).")]
ServeOption = Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the page, or make the project only.")]


@command(app, NEW, dry_run=True, config="label", keys=KEYS)
def new(common: Common, settings: Settings, serve: ServeOption = True, overrides: OverridesArgument = None) -> None:
    """Make a project, or open it again, and serve its page; the word `new` may be left out."""
    from rlhf_pipeline.config.labelling import LabelConfig
    from rlhf_pipeline.labelling.items import settled

    lists = {key: settings.given[key].split(",") for key in ("policies", "arena") if key in settings.given}
    loaded = settings.load(overrides, **lists)
    config = settled(loaded.of(LabelConfig), settings.path.parent if settings.path else None)
    if common.dry_run:
        from rlhf_pipeline.labelling.outlook import outlook

        emit_plan(outlook(config, common.home_path), "nothing was sampled", json=common.json)
        return
    # What is missing, and an address that is taken, are said before anything is sampled.
    with _bound(config) if serve else nullcontext() as listener:
        from rlhf_pipeline.labelling.project import open_or_make
        from rlhf_pipeline.labelling.store import database

        if config.models and not database(common.home_path, config.name).is_file():
            _check_models(config, common)
            load_libraries()
        say = _say()
        for note in loaded.notes:
            say(f"note: {note}")
        with open_or_make(config, common.home_path, say) as store:
            if listener is None:
                _made(common, store, config.name, None)
            else:
                _run(common, store, config.name, listener, config)


@command(app, "serve")
def serve_project(
    common: Common, name: NameArgument, host: HostOption = None, port: PortOption = None, token: TokenOption = None
) -> None:
    """Serve the page of a project that is there."""
    from rlhf_pipeline.labelling.project import named

    given = {key: value for key, value in (("host", host), ("port", port), ("token", token)) if value is not None}
    with named(common.home_path, name) as store:
        config = store.config.model_copy(update=given)
        with _bound(config) as listener:
            _run(common, store, name, listener, config)


@command(app, "report")
def report(common: Common, name: NameArgument) -> None:
    """Quality of the labels of a project, and which models people prefer; writes report.html."""
    from rlhf_pipeline.labelling.arena import arena_of
    from rlhf_pipeline.labelling.arena_tables import arena_tables
    from rlhf_pipeline.labelling.project import named
    from rlhf_pipeline.labelling.quality_tables import quality_tables
    from rlhf_pipeline.labelling.report_page import write_report

    with named(common.home_path, name) as store:
        found = write_report(store, store.path.parent, name)
        arena = arena_of(name, store.items(), store.judgements())
        page = str(store.path.parent / "report.html")
    if common.json:
        people = None if arena is None else arena.judged().model_dump(mode="json")
        emit_json(found.model_dump(mode="json") | {"arena": people, "report": page})
        return
    emit_lines(found.findings)
    for one in [*([] if arena is None else arena_tables(arena.judged())), *quality_tables(found)]:
        emit_table(one.title, one.columns, one.texts())
        if one.note:
            emit_lines([one.note])
    emit_lines([f"report   {page}"])


@command(app, "list")
def list_projects(common: Common) -> None:
    """Labelling projects."""
    from rlhf_pipeline.labelling.project import projects

    found = list(projects(common.home_path))
    if common.json:
        listed = [
            {"name": one.name, "kind": one.kind, "items": one.items, "labelers": one.labelers}
            | {"judgements": one.judgements, "skipped": one.skipped, "damaged": one.damaged or None}
            | {"path": str(one.path)}
            for one in found
        ]
        emit_json({"home": str(common.home_path), "projects": listed})
    elif not found:
        emit_lines([f"no labelling projects in {common.home_path}"])
    else:
        columns = ("project", "kind", "items", "labelers", "judgements", "skipped")
        rows = [
            (one.name, one.kind or "damaged", *map(str, (one.items, one.labelers, one.judgements, one.skipped)))
            for one in found
        ]
        emit_table(str(common.home_path), columns, rows)
        emit_lines([f"{one.name}: {one.damaged}" for one in found if one.damaged])


def _say() -> Callable[[str], None]:
    from rlhf_pipeline.training.tracking import console

    return partial(console.print, markup=False)


def _bound(config: LabelConfig) -> socket:
    """A socket that holds the address of the page.

    Raises:
        BadInput: what serves it is not installed, or the address cannot be had.
    """
    from rlhf_pipeline.labelling.serving import bound

    return bound(config.host, config.port)


def _check_models(config: LabelConfig, common: Common) -> None:
    """Check that the models are there, before libraries are loaded.

    Raises:
        UnknownReference, MismatchError: a model is missing, or cannot play its role.
    """
    from rlhf_pipeline.registry.roles import check_role

    for named in config.parents().values():
        check_role(common.registry.resolve(named.reference, revision=named.revision), named.role)


def _made(common: Common, store: LabelStore, name: str, address: str | None) -> None:
    """Print what there is, and where the page is."""
    found = {"project": name, "path": str(store.path.parent), "items": len(store.items()), "address": address}
    lines = [f"project   {name}: {found['items']} items", f"path      {found['path']}"]
    lines += [f"page      {address} (end with Ctrl-C)"] if address else [f"serve it  rlhf label serve {name}"]
    emit(found, lines, json=common.json)


def _run(common: Common, store: LabelStore, name: str, listener: socket, config: LabelConfig) -> None:
    """Serve a project until it is interrupted."""
    import secrets
    import sys

    from rlhf_pipeline.labelling.security import is_loopback
    from rlhf_pipeline.labelling.serving import serve

    token = config.token or (None if is_loopback(config.host) else secrets.token_urlsafe(24))

    def ready(address: str) -> None:
        _made(common, store, name, address)
        sys.stdout.flush()

    with suppress(KeyboardInterrupt):  # the way to end it; where a shell has switched SIGINT off, `serve` returns
        serve(store, listener, host=config.host, token=token, ready=ready)
    _say()("stopped; every label is saved")
