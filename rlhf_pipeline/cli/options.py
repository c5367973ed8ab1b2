"""Commands and their options: those of every command, and those that set keys of a config."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from rlhf_pipeline.api import HOME_VARIABLE, home_directory
from rlhf_pipeline.errors import BadInput

if TYPE_CHECKING:
    from rlhf_pipeline.config.load import Loaded
    from rlhf_pipeline.registry.store import Registry


@dataclass(frozen=True)
class Common:
    """The values of the common options."""

    home: Path | None = None
    json: bool = False
    dry_run: bool = False
    debug: bool = False

    @property
    def home_path(self) -> Path:
        """The home directory: --home, else $RLHF_HOME, else ./rlhf_home."""
        return home_directory(self.home)

    @property
    def registry(self) -> Registry:
        """The registry in the home directory."""
        from rlhf_pipeline.registry.store import Registry

        return Registry(self.home_path)


@dataclass(frozen=True)
class Settings:
    """The config part of a command line: its command, its file, and the options that set its keys."""

    stage: str
    path: Path | None
    given: dict[str, Any]

    def load(self, overrides: Iterable[str] | None, **more: Any) -> Loaded:
        """Read and check the config: options override the file, KEY=VALUE overrides both.

        Raises:
            ConfigError: one or more faults, all of them listed.
        """
        from rlhf_pipeline.config.load import load_config

        given = {key: value for key, value in (self.given | more).items() if value is not None}
        return load_config(self.stage, self.path, overrides or (), extra=given)


HomeOption = Annotated[
    Path | None,
    typer.Option(
        "--home", help=f"Home directory of models, runs and data (default: ${HOME_VARIABLE}, else ./rlhf_home)."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object to stdout.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Resolve, validate and estimate; train nothing and write nothing.")
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
    bool, typer.Option("--resume/--no-resume", help="Resume an unfinished run of the same config, or start a new one.")
]
JobsOption = Annotated[
    int,
    typer.Option(
        "--jobs",
        min=1,
        metavar="N",
        help="Number of processes that run stages, or measure models, each with the usable cores // N threads.",
    ),
]
ExecutorOption = Annotated[
    Literal["local", "ray"],
    typer.Option("--executor", help="Where stages run: on this machine, or on a Ray cluster that shares the home."),
]
ProcessesOption = Annotated[
    int,
    typer.Option(
        "--num-processes",
        min=1,
        metavar="N",
        help="Number of processes that train together, one per GPU; on a CPU each has the usable cores // N threads.",
    ),
]
_COMMON: dict[str, tuple[Any, Any]] = {
    "home": (HomeOption, None),
    "json": (JsonOption, False),
    "dry_run": (DryRunOption, False),
    "debug": (DebugOption, False),
}


def command(
    app: typer.Typer, name: str, *, dry_run: bool = False, config: str = "", keys: Sequence[str] = (), help: str = ""
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a function to an app, as a command that has the common options; they also work before the command.

    Args:
        dry_run: whether the command has --dry-run.
        config: the command whose config is read; adds --config, and the function gets `Settings`.
        keys: names of the config's keys, or their aliases, that are options too; type, default and help are those of
            the pydantic field. An option that is not given is not in `Settings.given`.
        help: the help text; by default the function's docstring.

    The function takes `Common`, then `Settings` where it has a config, then its own arguments and options.
    """
    common = {key: option for key, option in _COMMON.items() if dry_run or key != "dry_run"}

    def add(function: Callable[..., None]) -> Callable[..., None]:
        def run(context: typer.Context, **values: Any) -> None:
            merged = common_of(context, **{key: values.pop(key) for key in common})
            if merged.dry_run and not dry_run:
                raise BadInput(f"rlhf {context.command_path.partition(' ')[2]}: there is no --dry-run; leave it out")
            settings = [Settings(config, values.pop("config"), context.meta.get(_GIVEN, {}))] if config else []
            function(merged, *settings, **values)

        kept = list(inspect.signature(function, eval_str=True).parameters.values())[2 if config else 1 :]
        added = common if not config else {"config": (ConfigOption, None), **common}
        _takes(run, [inspect.Parameter("context", _KEYWORD, annotation=typer.Context), *kept], added)
        app.command(name, help=help or inspect.getdoc(function), cls=_with_keys(config, keys) if keys else None)(run)
        return function

    return add


_KEYWORD = inspect.Parameter.KEYWORD_ONLY
_GIVEN = "rlhf_pipeline.given"


def _takes(function: Any, parameters: Iterable[inspect.Parameter], options: dict[str, tuple[Any, Any]]) -> None:
    """Give a function a signature for typer to read: parameters, then {name: (annotation, default)}."""
    more = [inspect.Parameter(name, _KEYWORD, default=d, annotation=a) for name, (a, d) in options.items()]
    every = [parameter.replace(kind=_KEYWORD) for parameter in parameters] + more
    function.__signature__ = inspect.Signature(every)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in every}


def _with_keys(config: str, keys: Sequence[str]) -> type[TyperCommand]:
    """Return a class of commands that have keys of a config as options.

    The options are made when the command is parsed or shows its help: config classes need pydantic, which takes longer
    to import than all of `rlhf --help`.
    """

    class WithKeys(TyperCommand):
        @cached_property
        def options(self) -> list[Any]:
            return key_options(config, keys)

        def get_params(self, ctx: Any) -> list[Any]:
            params = super().get_params(ctx)
            place = [param.name for param in params].index("home")
            return [*params[:place], *self.options, *params[place:]]

        def invoke(self, ctx: Any) -> Any:
            values = {option.name: ctx.params.pop(option.name) for option in self.options}
            ctx.meta[_GIVEN] = {name: value for name, value in values.items() if value is not None}
            return super().invoke(ctx)

    return WithKeys


def key_options(config: str, names: Sequence[str]) -> list[Any]:
    """Return the options of a config's keys, as click knows them; the value is None where an option is not given."""
    from rlhf_pipeline.config.fields import keys_of
    from rlhf_pipeline.config.keys import canonical

    known = keys_of(config)
    options = {}
    for name in names:
        key = known[canonical(config, name)]
        word = f"--{name.replace('_', '-')}"
        default = "" if key.default in (None, []) or key.default is False else f" (default: {key.default_text})"
        names_of = f"{word}/--no-{word[2:]}" if key.value is bool and key.default else word
        text = f"{key.description[:1].upper()}{key.description[1:]}{default}."
        info = typer.Option(names_of, help=text, show_default=False)
        kind: Any = key.value
        options[key.name] = (Annotated[kind | None, info], None)
    stand_in = typer.Typer(add_completion=False)

    def takes_options(**_values: Any) -> None: ...

    _takes(takes_options, (), options)
    stand_in.command()(takes_options)
    return list(typer.main.get_command(stand_in).params)


def references_and_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of a command that takes models and overrides: an override has `=` and a key that is no path."""

    def is_override(word: str) -> bool:
        if "=" in word and Path(word).is_dir():
            return False
        key, equals, _ = word.partition("=")
        # A YAML file is not a model either: as an override, its error message names --config.
        return "/" not in key if equals else word.endswith((".yaml", ".yml")) and Path(word).is_file()

    return [word for word in words if not is_override(word)], [word for word in words if is_override(word)]


def one_reference(command: str, words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the only model of a command, and its overrides.

    Raises:
        BadInput: no model or several models are named.
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
    root = context.find_root()
    before = root.obj if isinstance(root.obj, Common) else Common()
    merged = Common(home or before.home, json or before.json, dry_run or before.dry_run, debug or before.debug)
    root.obj = merged
    return merged
