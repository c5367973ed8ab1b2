"""The `rlhf` command: the app, and how errors are reported."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.exceptions import Abort, TyperException

from rlhf_pipeline import __version__
from rlhf_pipeline.api import DEFAULT_HOME, HOME_VARIABLE
from rlhf_pipeline.cli import cache, config, data, label, label_files, models
from rlhf_pipeline.cli.compare import COMPARE_KEYS, compare, report
from rlhf_pipeline.cli.doctor import doctor
from rlhf_pipeline.cli.evaluate import MEASURING_KEYS, SAMPLING_KEYS, evaluate, generate
from rlhf_pipeline.cli.exact import EXACT_KEYS, exact
from rlhf_pipeline.cli.imports import import_file
from rlhf_pipeline.cli.init import init
from rlhf_pipeline.cli.options import (
    Common,
    DebugOption,
    DryRunOption,
    HomeOption,
    JsonOption,
    command,
)
from rlhf_pipeline.cli.output import emit_json
from rlhf_pipeline.cli.train import STAGES, run, train
from rlhf_pipeline.errors import Fault, RlhfError, faults_of, first_line, visible

app = typer.Typer(
    name="rlhf",
    no_args_is_help=True,
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


command(app, "init")(init)
command(app, "import")(import_file)
for _stage, _help in STAGES.items():
    command(app, _stage, dry_run=True, config=_stage, help=_help)(train)
command(app, "run", dry_run=True)(run)
command(app, "evaluate", dry_run=True, config="evaluate", keys=MEASURING_KEYS)(evaluate)
command(app, "generate", dry_run=True, config="generate", keys=SAMPLING_KEYS)(generate)
command(app, "compare", dry_run=True, config="compare", keys=COMPARE_KEYS)(compare)
command(app, "exact", dry_run=True, config="exact", keys=EXACT_KEYS)(exact)
command(app, "report")(report)
command(app, "doctor")(doctor)
app.add_typer(models.app, name="models")
app.add_typer(data.app, name="data")
app.add_typer(label_files.app, name="label")
app.add_typer(cache.app, name="cache")
app.add_typer(config.app, name="config")


@functools.cache
def _command() -> Callable[..., Any]:
    """The parser of the app, built once per process: building takes nine tenths of the time of a short command."""
    return typer.main.get_command(app)


def prepare_environment() -> None:
    """Set the environment that libraries read when they are imported; settings of the user take precedence."""
    # Progress bars and advice of libraries are not part of the result.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # No library sends usage reports.
    for variable in ("HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(variable, "1")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed, 2 bad input, 130 / 143 interrupted."""
    prepare_environment()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        result = _command()(args=words, standalone_mode=False, prog_name="rlhf")
        if result == INTERRUPTED:  # typer turns Ctrl-C into an exit code without a message
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        failure = described(error, words)
        if "--json" in words and os.environ.get("RANK", "0") == "0":  # one object, even if several processes fail
            with contextlib.suppress(OSError):  # writing to stdout may be what failed
                faults = [fault.as_dict() for fault in failure.faults]
                emit_json({"error": {"kind": failure.kind, "faults": faults}})
                sys.stdout.flush()
        if "--debug" in words and failure.kind not in ("arguments", "interrupted"):
            raise
        if show := getattr(error, "show", None):  # usage errors of the argument parser print themselves
            show(file=sys.stderr)
            sys.stderr.write("".join(f"{visible(fault.fix)}\n" for fault in failure.faults if fault.fix))
        else:
            for line in visible(failure.message).split("\n"):
                sys.stderr.write(f"error: {line}\n")
        return failure.code


@dataclass(frozen=True)
class Failure:
    """How a command failed: exit code, kind, and message; `faults` has the parts of the message."""

    code: int
    kind: str
    message: str
    faults: Sequence[Fault] = ()


def described(error: BaseException, words: Sequence[str]) -> Failure:
    """Describe an error for the user."""
    if isinstance(error, RlhfError):
        return Failure(error.exit_code, error.kind, str(error), faults_of(error))
    if isinstance(error, KeyboardInterrupt):
        return _said(INTERRUPTED, "interrupted", _interrupted(words))
    if isinstance(error, MemoryError):
        return _said(1, "run", "out of memory: lower per_device_train_batch_size or max_length")
    if isinstance(error, TyperException):
        fault = Fault("", error.format_message(), fix=_advice_on_option(error, words))
        return Failure(error.exit_code, "arguments", fault.found, [fault])
    if isinstance(error, Abort):
        return _said(1, "interrupted", "aborted")
    return _unexpected(error, words)


def _said(code: int, kind: str, message: str) -> Failure:
    return Failure(code, kind, message, [Fault.read(line) for line in message.split("\n")])


INTERRUPTED = 130
# These commands write their result at the end, in one step, and keep nothing on the way.
MEASURING = ("evaluate", "generate")


def _interrupted(words: Sequence[str]) -> str:
    flags = [place for place, word in enumerate(words) if word == "--home"]
    commands = [word for place, word in enumerate(words) if place - 1 not in flags and not word.startswith("-")]
    command = commands[0] if commands else None
    if command == "run":
        return "interrupted; finished stages are kept, and the same command continues after them"
    if command in ("compare", "exact"):
        return f"interrupted: this {command} wrote no result; the same command continues with what it had measured"
    if command in MEASURING:
        return f"interrupted: no result of this {command} was kept; the same command starts again from the beginning"
    return "interrupted before the run had saved anything"


def _advice_on_option(error: Any, words: Sequence[str]) -> str:
    """How to pass keys of a config, for an unknown option of a command that reads a config; else an empty string."""
    option, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if option is None or context is None:
        return ""
    from rlhf_pipeline.config.keys import ALIASES, SCHEMAS

    stage = {"run": "experiment", label.NEW: "label"}.get(context.info_name, context.info_name)
    if stage not in SCHEMAS:
        return ""
    key = option.lstrip("-").replace("-", "_")
    if stage == "experiment":
        return "keys of the config are given without dashes, after the name of their stage: dpo.learning_rate=1e-5"
    if key not in SCHEMAS[stage].model_fields and key not in ALIASES[stage]:
        known = "learning_rate" in SCHEMAS[stage].model_fields  # the other commands have options for most keys
        return "keys of the config are given without dashes, as in learning_rate=1e-5" if known else ""
    value = "VALUE"
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word.partition("=")[0] == option:
            value = word.partition("=")[2] or following or value
    return f"keys of the config are given without dashes: {key}={value}"


def _unexpected(error: BaseException, words: Sequence[str]) -> Failure:
    """Describe an error of Python, of the system or of a library for the user."""
    from rlhf_pipeline.disk.storage import failure_of

    if "torch" in sys.modules:  # without torch no model is in memory
        from rlhf_pipeline.models.memory import ADVICE, ran_out

        if ran_out(error):
            return _said(1, "run", f"out of memory: {first_line(error)}; {ADVICE}")
    if failure := failure_of(error, _home_of(words)):
        return _said(1, "system", failure)
    if isinstance(error, OSError) and error.errno is not None:
        place = f"{error.filename}: " if error.filename else ""
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            return _said(2, "input", f"{place}{error.strerror}; expected a path that can be opened")
        return _said(1, "system", f"{place}{error.strerror or error}; nothing that was registered is damaged")
    if isinstance(error, ValueError) and "embedded null" in str(error):
        return _said(2, "input", "found a path with a NUL character; expected a path that can be opened")
    text = f"unexpected {type(error).__name__}: {error}; run it again with --debug for the traceback"
    return _said(1, "unexpected", text)


def _home_of(words: Sequence[str]) -> str:
    """The home directory of a command that failed early."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "--home" or word.startswith("--home="):
            return word.partition("=")[2] or following
    return os.environ.get(HOME_VARIABLE) or DEFAULT_HOME


def entry() -> None:
    """Console script: `main`, then exit with its code."""
    sys.exit(main())


if __name__ == "__main__":
    entry()
