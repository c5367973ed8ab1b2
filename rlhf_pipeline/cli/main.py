"""The `rlhf` command: the app, and how errors end."""

from __future__ import annotations

import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from rlhf_pipeline import __version__
from rlhf_pipeline.cli import compare, data, evaluate, exact, init, models, report, train
from rlhf_pipeline.cli.options import (
    DEFAULT_HOME,
    HOME_VARIABLE,
    Common,
    DebugOption,
    DryRunOption,
    HomeOption,
    JsonOption,
)
from rlhf_pipeline.errors import RlhfError, visible

app = typer.Typer(
    name="rlhf",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a language model by RLHF (SFT, reward model, PPO) and by DPO on the same preference data, and compare.",
)


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"rlhf {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    context: typer.Context,
    home: HomeOption = None,
    json: JsonOption = False,
    dry_run: DryRunOption = False,
    debug: DebugOption = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the subcommand; the same ones work after it."""
    context.obj = Common(home, json, dry_run, debug)


init.register(app)
train.register(app)
evaluate.register(app)
compare.register(app)
exact.register(app)
report.register(app)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")


@functools.cache
def _command() -> Callable[..., Any]:
    """The parser of the app, built once per process: nine tenths of the time of a short command."""
    return typer.main.get_command(app)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 bad input, 130 / 143 interrupted."""
    # Progress bars and advice of libraries do not belong into the result; the user's own settings win.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # No library reports what is done with it; they read this when they are imported.
    for variable in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(variable, "1")
    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    try:
        result = _command()(args=words, standalone_mode=False, prog_name="rlhf")
        if result == INTERRUPTED:  # typer makes a number of Ctrl-C, and says nothing
            return _fail(_interrupted(words), INTERRUPTED)
        return result if isinstance(result, int) else 0
    except RlhfError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail(_interrupted(words), INTERRUPTED)
    except MemoryError:
        return _fail("out of memory: lower per_device_train_batch_size or max_length", 1)
    except Exception as error:
        # Usage errors of the argument parser know how to show themselves.
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show(file=sys.stderr)
            sys.stderr.write(visible(_advice_on_option(error, words)))
            return int(error.exit_code)
        if type(error).__name__ == "Abort":
            return _fail("aborted", 1)
        if debug:
            raise
        return _unexpected(error, words)


INTERRUPTED = 130
# What they write is written at their end, and at once.
MEASURING = ("compare", "evaluate", "exact", "generate")


def _interrupted(words: Sequence[str]) -> str:
    flags = [place for place, word in enumerate(words) if word == "--home"]
    commands = [word for place, word in enumerate(words) if place - 1 not in flags and not word.startswith("-")]
    command = commands[0] if commands else None
    if command == "run":
        return "interrupted; the stages that are done are kept, and the same command goes on from there"
    if command in MEASURING:
        return f"interrupted: no result of this {command} was kept; the same command begins anew"
    return "interrupted before the run had anything to keep"


def _advice_on_option(error: Any, words: Sequence[str]) -> str:
    """A line on how keys of a config are given, where an option is unknown to a command that reads one."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if option is None or context is None:
        return ""
    from rlhf_pipeline.config.keys import ALIASES, SCHEMAS

    stage = {"generate": "evaluate", "run": "experiment"}.get(context.info_name, context.info_name)
    if stage not in SCHEMAS:
        return ""
    key = option.lstrip("-").replace("-", "_")
    if stage == "experiment":
        return "keys of the config are given without dashes, after the name of their stage: dpo.learning_rate=1e-5\n"
    if key not in SCHEMAS[stage].model_fields and key not in ALIASES[stage]:
        known = "learning_rate" in SCHEMAS[stage].model_fields  # the others have options for most of their keys
        return "keys of the config are given without dashes, as in learning_rate=1e-5\n" if known else ""
    value = "VALUE"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.partition("=")[0] == option:
            value = word.partition("=")[2] or following or value
    return f"keys of the config are given without dashes: {key}={value}\n"


def _unexpected(error: Exception, words: Sequence[str]) -> int:
    from rlhf_pipeline.registry.storage import failure_of

    if "torch" in sys.modules:  # without it there is no model whose memory could run out
        from rlhf_pipeline.training.memory import ADVICE, first_line, ran_out

        if ran_out(error):
            return _fail(f"out of memory: {first_line(error)}; {ADVICE}", 1)
    if failure := failure_of(error, _home_of(words)):
        return _fail(failure, 1)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _fail(f"{place}{error.strerror}; expected a path that can be opened", 2)
        return _fail(f"{place}{error.strerror or error}; nothing that was registered is damaged", 1)
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return _fail("a path with a NUL character; expected one that can be opened", 2)
    return _fail(f"unexpected {type(error).__name__}: {error}; run it again with --debug for the traceback", 1)


def _home_of(words: Sequence[str]) -> str:
    """The home of a command that ended before it could say so."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--home" or word.startswith("--home="):
            return word.partition("=")[2] or following
    return os.environ.get(HOME_VARIABLE) or DEFAULT_HOME


def _fail(message: str, code: int) -> int:
    for line in visible(message).split("\n"):
        sys.stderr.write(f"error: {line}\n")
    return code


def entry() -> None:
    """Console script: `main`, then exit with its code."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
