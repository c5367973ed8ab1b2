"""What `rlhf data check` refuses is what a stage refuses, and its first lines say what the figures mean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.data.splits import split_of

GOOD = {"prompt": "the plot of this drama was", "chosen": " great", "rejected": " dull"}
DPO = ("model_name_or_path=sft", "output_name=x", "max_prompt_length=6", "response_length=4", "use_cpu=true")


@pytest.fixture
def rows(tmp_path: Path):
    def write(*values: dict) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(value) + "\n" for value in values))
        return str(path)

    return write


@pytest.mark.parametrize("blank", ["", "  "])
def test_an_empty_prompt_is_refused_by_the_check_and_by_a_stage(capsys, rows, lab, blank) -> None:
    assert split_of(blank) == "validation" and split_of(GOOD["prompt"]) == "train"
    source = rows(*[GOOD] * 4, GOOD | {"prompt": blank}, GOOD)
    home = ("--home", str(lab.home))
    for words in ((), ("--tokenizer", "sft"), ("--tokenizer", "sft", "--max-length", "10")):
        assert main(["data", "check", source, "--json", *words, *home]) == 2
        found = json.loads(capsys.readouterr().out)
        assert (found["faulty_rows"], found["faults"]) == (1, {"empty_prompt": 1})
        assert "rows.jsonl:5: empty_prompt" in found["fault_list"][0]
        assert "1 of 6 rows stop a stage (empty_prompt 1)" in found["findings"][0]
    assert main(["dpo", *DPO, f"dataset_name={source}", *home]) == 2
    error = capsys.readouterr().err
    assert "1 of 6 rows cannot be used (empty_prompt 1)" in error and "rows.jsonl:5: empty_prompt" in error


def test_the_first_lines_say_what_the_figures_mean(capsys, rows) -> None:
    film = [GOOD | {"prompt": f"film {number}", "chosen": " great, truly great"} for number in range(40)]
    assert main(["data", "check", rows(*film, film[0])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("length alone predicts 100% of the labels (the longer response is preferred)")
    assert lines[2].startswith("0 of 40 prompts have labels with a finite best reward for each response")
    assert lines[3].startswith("1 of 41 rows repeat an earlier one exactly: ") and "rows.jsonl:41 as " in lines[3]
    assert lines[4].startswith("rows of the splits: train ")


def test_a_misspelt_prompt_is_named(capsys, rows) -> None:
    row = {"promt": "What is the capital of Italy?", "chosen": "The city is Rome", "rejected": "The city is Bari"}
    assert main(["data", "check", rows(row, row | {"chosen": "Rome", "rejected": "Bari"})]) == 2
    out = capsys.readouterr().out
    assert out.count("the column 'promt' is not read; did you mean prompt?") == 2  # of the source, and of its line


def test_data_check_and_a_stage_find_the_same_in_splits_of_any_name(capsys, rows, tiny) -> None:
    good = {"chosen": " great", "rejected": " dull"}
    prompts = [f"the {aspect} of this {genre} was" for aspect in ("plot", "music") for genre in ("horror", "drama")]
    train = [{**good, "prompt": prompt, "split": "train_prefs"} for prompt in prompts]
    leaked = [{**row, "split": "test_prefs"} for row in train[:2]]
    other = [{"prompt": "music", "chosen": " great", "rejected": " great", "split": "train_sft"}]
    splits = ["dataset_train_split=train_prefs", "dataset_test_split=test_prefs"]
    stage = ["dpo", "model_name_or_path=sft", "output_name=x", *splits, "--dry-run", "--home", str(tiny.home)]
    lengths = ["max_prompt_length=6", "response_length=4"]

    source = rows(*train, *leaked)
    assert main(["data", "check", source, "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["leaked_rows"], found["leaks"]) == (2, {"leaked_row": 2})
    assert main([*stage, *lengths, f"dataset_name={source}"]) == 2
    assert "2 of 2 rows of the evaluation splits are also in split 'train_prefs'" in capsys.readouterr().err

    source = rows(*train[1:], {**train[0], "split": "test_prefs"}, *other)
    assert main(["data", "check", source]) == 2  # of the whole source
    assert "identical_pair" in capsys.readouterr().out
    assert main([*stage, *lengths, f"dataset_name={source}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 3


def test_columns_are_renamed_in_check_and_preview(capsys, rows) -> None:
    source = rows({"q": "who", "a": "me"}, {"q": "where", "a": "here"})
    words = ["--column-mapping", "prompt=q", "--column-mapping", "completion=a", "--json"]
    assert main(["data", "check", source, *words]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == {"demonstration": 2}
    assert main(["data", "preview", source, *words]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["completions"] == ["me"]
    assert main(["data", "check", source, "--column-mapping", "prompt"]) == 2
    assert "--column-mapping prompt: expected OURS=THEIRS" in capsys.readouterr().err
    assert main(["data", "check", source]) == 2
    assert "column_mapping" in capsys.readouterr().err
