"""Words of a command line: models, overrides, files and options that are not known, and what is said about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.cli.options import one_reference, references_and_overrides
from rlhf_pipeline.errors import BadInput

PROMPT = "the plot of this drama was"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def said(capsys: pytest.CaptureFixture, *words: str, code: int = 2) -> str:
    """Run, expect an exit code, and return stderr, its lines in one."""
    assert main(list(words)) == code
    return " ".join(capsys.readouterr().err.split())


def json_of(capsys: pytest.CaptureFixture, *words: str) -> dict:
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_models_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.yaml").write_text("")
    words = ["sft", "samples=2", "runs/lr=1/model", "a=b/c", "ppo.yaml", "sft.yaml"]
    assert references_and_overrides(words) == (
        ["sft", "runs/lr=1/model", "ppo.yaml"],  # there is no such file: it may be a name
        ["samples=2", "a=b/c", "sft.yaml"],
    )
    (tmp_path / "lr=1e-5").mkdir()
    assert one_reference("evaluate", ["lr=1e-5", "samples=2"]) == ("lr=1e-5", ["samples=2"])
    assert one_reference("generate", ["seed=1", "sft"]) == ("sft", ["seed=1"])
    for words in (["seed=1"], ["sft", "dpo"]):
        with pytest.raises(BadInput, match="expected one model"):
            one_reference("generate", words)


def test_rows_that_are_skipped_by_an_override(capsys, write, tiny) -> None:
    rows = [{"prompt": PROMPT, "split": "test"}, {"prompt": None, "split": "test"}]
    rows.append({"prompt": "the plot of this film was", "split": "train"})
    prompts = write("prompts.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    words = ("generate", "sft", "--prompts", prompts, "--home", str(tiny.home))
    assert "skip_bad_rows: true" in said(capsys, *words)
    result = json_of(capsys, *words, "skip_bad_rows=true")
    assert [row["prompt"] for row in result["responses"]] == [PROMPT]


@pytest.mark.parametrize("command", ["evaluate", "generate", "exact", "compare"])
def test_overrides_win_over_options(capsys, tiny, command: str) -> None:
    models = ["sft", "sft@v1"] if command == "compare" else ["sft"]
    words = [command, "max_prompts=3", *models, "--max-prompts", "5", "--home", str(tiny.home), "--dry-run"]
    assert json_of(capsys, *words)["config"]["max_prompts"] == 3
    assert "did you mean 'max_prompts'" in said(capsys, *words, "max_promts=2")


@pytest.mark.parametrize("name", ["dpo.yaml", "dpo.yml", "dpo.txt"])
def test_a_config_without_its_option(capsys, write, tiny, name: str) -> None:
    config = write(name, "beta: 1\n")
    error = said(capsys, "dpo", config, "--home", str(tiny.home))
    assert f"did you mean --config {config}?" in error and "missing" not in error
    error = said(capsys, "dpo", "--config", config, config, "--home", str(tiny.home))
    assert "only one config is read" in error and "dataset_name: missing" in error


def test_a_config_beside_a_model(capsys, write, tiny) -> None:
    config = write("evaluate.yaml", "samples: 1\n")
    for command in ("evaluate", "generate", "compare", "exact"):
        error = said(capsys, command, "sft", config, "--home", str(tiny.home))
        assert f"did you mean --config {config}?" in error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["dpo", "--lr", "3"], "keys of the config are given without dashes, as in learning_rate=1e-5"),
        (["dpo", "--learning-rate", "3"], "keys of the config are given without dashes: learning_rate=3"),
        (["ppo", "--kl-coef=0.1", "seed=1"], "keys of the config are given without dashes: kl_coef=0.1"),
        (["generate", "sft", "--skip-bad-rows"], "without dashes: skip_bad_rows=VALUE"),
        (["run", "x.yaml", "--lr", "3"], "after the name of their stage: dpo.learning_rate=1e-5"),
    ],
)
def test_keys_as_options(capsys, words: list[str], line: str) -> None:
    error = said(capsys, *words)
    assert "No such option" in error and line in error


def test_other_unknown_options_are_not_taken_for_keys(capsys) -> None:
    assert "keys of the config" not in said(capsys, "models", "list", "--lr", "3")
    assert "keys of the config" not in said(capsys, "evaluate", "sft", "--samplez", "3")


def test_a_prompt_that_is_cut_is_said(capsys, tiny) -> None:
    words = ("generate", "sft", "--prompt", PROMPT, "--prompt", f"the {PROMPT}", "--home", str(tiny.home), "--json")
    assert main(list(words)) == 0
    captured = capsys.readouterr()
    # The model was trained with prompts of up to 6 tokens; the second one has 7.
    assert [row["prompt_truncated"] for row in json.loads(captured.out)["responses"]] == [False, True]
    assert f"note: --prompt 'the {PROMPT}': longer than max_prompt_length 6" in captured.err
    assert main([*words, "max_prompt_length=7"]) == 0
    captured = capsys.readouterr()
    assert "cut on the left" not in captured.err
    assert not any(row["prompt_truncated"] for row in json.loads(captured.out)["responses"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["generate", "sft", "--prompt", PROMPT], "error: interrupted: no result of this generate was"),
        (["compare", "sft", "dpo"], "error: interrupted: this compare wrote no result; the same"),
        (["run", "experiment.yaml"], "error: interrupted; finished stages are kept"),
        (["dpo"], "error: interrupted before the run had saved anything"),
    ],
)
def test_an_interrupt_says_what_is_kept(capsys, monkeypatch, words: list[str], line: str) -> None:
    def interrupt(*_words, **_options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_pipeline.cli.options.common_of", interrupt)
    assert line in said(capsys, *words, code=130)
