"""`rlhf label`: its words, what it makes without a browser, and what it says of mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_pipeline.cli.label import rewritten
from rlhf_pipeline.cli.main import main

COMMANDS = ("new", "serve", "list")


def test_words_without_a_command_are_those_of_new() -> None:
    cases: list[tuple[str, str]] = [
        ("--policies a b --prompts p --k 4", "new --policies a,b --prompts p --k 4"),
        ("new --policies a b", "new --policies a,b"),
        ("--arena a b c k=2 num=3", "new --arena a,b,c k=2 num=3"),
        ("--policies=a b --json", "new --policies=a,b --json".replace("=", " ", 1)),
        ("--policies runs/x=1/model b", "new --policies runs/x=1/model,b"),
        ("--policies a --policies b", "new --policies a --policies b"),
        ("--config f.yaml k=3", "new --config f.yaml k=3"),
        ("serve demo --port 0", "serve demo --port 0"),
        ("--help", "--help"),
        ("", ""),
    ]
    for given, expected in cases:
        assert rewritten(given.split(), COMMANDS) == expected.split(), given


def write(path: Path) -> str:
    rows = [{"prompt": f"p{n}", "completions": ["x", "y", "z"], "ranks": [1, 2, 3]} for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def answer(capsys: Any, *words: str) -> tuple[int, dict[str, Any]]:
    code = main(list(words))
    return code, json.loads(capsys.readouterr().out)


def test_a_project_of_given_responses_is_made_listed_and_kept(tmp_path: Path, capsys: Any) -> None:
    source = write(tmp_path / "r.jsonl")
    words = ["--home", str(tmp_path), "label", "--responses", source, "--name", "mine", "--no-serve", "--json"]
    code, plan = answer(capsys, *words, "--dry-run")
    assert (code, plan["items"], plan["rows"]) == (0, 3, 3)
    assert not (tmp_path / "labels").exists()
    code, made = answer(capsys, *words, "num=2")
    assert (code, made["project"], made["items"], made["address"]) == (0, "mine", 2, None)
    assert (tmp_path / "labels/mine/labels.sqlite").is_file()
    assert answer(capsys, *words, "num=2") == (0, made)
    code, failed = answer(capsys, *words, "num=3")
    assert (code, failed["error"]["kind"]) == (2, "config")
    assert [fault["key"] for fault in failed["error"]["faults"]] == ["num"]
    code, listed = answer(capsys, "label", "list", "--home", str(tmp_path), "--json")
    assert [(one["name"], one["items"], one["judgements"]) for one in listed["projects"]] == [("mine", 2, 0)]


def test_mistakes_are_said_without_a_traceback(tmp_path: Path, capsys: Any) -> None:
    home = ["--home", str(tmp_path)]
    for words, said in (
        ([*home, "label", "--policies", "nobody", "--prompts", "world:verdicts", "--no-serve"], "no model 'nobody'"),
        ([*home, "label", "--policies", "a", "b"], "prompts"),
        ([*home, "label", "--no-serve"], "policies"),
        ([*home, "label", "--responses", "none.jsonl", "--no-serve"], "none.jsonl"),
        ([*home, "label", "list", "--name", "x"], "--name"),
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert said in error, (words, error)
        assert "Traceback" not in error
    assert not (tmp_path / "labels").exists() or not list((tmp_path / "labels").iterdir())


def test_commands_on_a_project_that_is_not_there(tmp_path: Path, capsys: Any) -> None:
    assert main(["--home", str(tmp_path), "label", "serve", "none"]) == 2
    assert "no project 'none'" in capsys.readouterr().err
