"""The options of every command: none disappears, changes its type or its default."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from rlhf_pipeline.cli.compare import COMPARE_KEYS
from rlhf_pipeline.cli.evaluate import SAMPLING_KEYS
from rlhf_pipeline.cli.exact import EXACT_KEYS
from rlhf_pipeline.cli.main import app, main
from rlhf_pipeline.cli.options import key_options
from rlhf_pipeline.config.stages import SCHEMAS

GOLDEN = Path(__file__).with_name("options.txt")


def commands(command: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command below a group, by its words."""
    if not hasattr(command, "commands"):
        yield name, command
        return
    for word, inner in command.commands.items():
        yield from commands(inner, f"{name} {word}".strip())


def described() -> list[str]:
    """One line for each parameter: command, names, type, default."""
    root = typer.main.get_command(app)
    context = typer.Context(root)
    lines = []
    for name, command in commands(root):
        for parameter in command.get_params(context):
            if parameter.name != "help":
                names = "/".join([*parameter.opts, *parameter.secondary_opts])
                kind = getattr(parameter.type_descriptor.annotation, "__name__", "list")
                lines.append(f"{name}: {names} {kind} {parameter.default}")
    return sorted(lines)


def test_the_options_of_every_command() -> None:
    assert described() == GOLDEN.read_text().splitlines()


@pytest.mark.parametrize(
    ("stage", "names"), [("compare", COMPARE_KEYS), ("generate", SAMPLING_KEYS), ("exact", EXACT_KEYS)]
)
def test_an_option_says_what_its_key_says(stage: str, names: tuple[str, ...]) -> None:
    fields = SCHEMAS[stage].model_fields
    for option in key_options(stage, names):
        field = fields[option.name]
        text = f"{field.description[0].upper()}{field.description[1:]}"
        assert option.help.startswith(text)
        shown = option.help.removeprefix(text)
        if field.default is None or field.default is False or field.default == ():
            assert shown == "."
        else:
            assert shown == f" (default: {'true' if field.default is True else field.default})."


def test_an_option_may_have_the_alias_of_its_key() -> None:
    (option,) = key_options("collect", ["name"])
    assert (option.name, option.opts) == ("output_name", ["--name"])


def planned(capsys: pytest.CaptureFixture, *words: str) -> dict[str, Any]:
    assert main([*words, "--dry-run", "--json"]) == 0
    return json.loads(capsys.readouterr().out)["config"]


def test_an_option_wins_over_the_file_and_an_override_over_both(capsys, tiny, tmp_path: Path) -> None:
    config = tmp_path / "exact.yaml"
    config.write_text("max_prompts: 7\nbeta: 0.5\ntraining_loss: false\nsplit: validation\n")
    words = ["exact", "sft", "--home", str(tiny.home), "--config", str(config)]
    found = planned(capsys, *words)
    assert (found["max_prompts"], found["beta"], found["training_loss"], found["split"]) == (
        7,
        0.5,
        False,
        "validation",
    )
    found = planned(capsys, *words, "--max-prompts", "5", "--beta", "0.25", "--training-loss", "beta=2")
    assert (found["max_prompts"], found["beta"], found["training_loss"], found["split"]) == (5, 2.0, True, "validation")
    config.write_text("training_loss: true\n")
    assert planned(capsys, *words, "--no-training-loss")["training_loss"] is False
    assert planned(capsys, *words)["training_loss"] is True


def test_generate_reads_few_responses_unless_it_is_told_otherwise(capsys, tiny, tmp_path: Path) -> None:
    words = ["generate", "sft", "--home", str(tiny.home)]
    found = planned(capsys, *words)
    assert (found["max_prompts"], found["samples"]) == (8, 1)
    found = planned(capsys, *words, "--max-prompts", "256", "samples=4")
    assert (found["max_prompts"], found["samples"]) == (256, 4)


def test_options_of_several_kinds(capsys, tiny) -> None:
    words = ["compare", "sft", "--baseline", "reward", "--home", str(tiny.home), "--dry-run"]
    assert main(words) == 2  # the baseline is no policy: the option has reached the config
    assert "expected a policy" in capsys.readouterr().err
    found = planned(capsys, "evaluate", "sft", "--best-of", "1,4, 16", "--temperature", ".7", "--home", str(tiny.home))
    assert (found["best_of"], found["temperature"]) == ([1, 4, 16], 0.7)


def test_a_command_without_a_dry_run_does_nothing_in_one(capsys, lab) -> None:
    assert main(["--dry-run", "models", "remove", "reward", "--home", str(lab.home)]) == 2
    assert "rlhf models remove: there is no --dry-run" in capsys.readouterr().err
    assert main(["models", "show", "reward", "--home", str(lab.home)]) == 0
