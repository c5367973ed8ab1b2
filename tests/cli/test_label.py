"""`rlhf label`: its words, what it makes without a browser, and what it says of mistakes."""

from __future__ import annotations

import json
import signal
import socket
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.label import rewritten
from rlhf_pipeline.cli.main import main
from rlhf_pipeline.errors import BadInput
from tests.faults import children


def test_words_without_a_command_are_those_of_new() -> None:
    cases: list[tuple[str, str]] = [
        ("--policies a b --prompts p --k 4", "new --policies a,b --prompts p --k 4"),
        ("new --policies a b", "new --policies a,b"),
        ("--policies a --k 4 --policies=b c", "new --k 4 --policies a,b,c"),
        ("--arena a b c k=2 num=3", "new --arena a,b,c k=2 num=3"),
        ("--policies=a b --json", "new --policies=a,b --json".replace("=", " ", 1)),
        ("--policies runs/x=1/model b", "new --policies runs/x=1/model,b"),
        ("--policies a --policies b", "new --policies a,b"),
        ("--config f.yaml k=3", "new --config f.yaml k=3"),
        ("serve demo --port 0", "serve demo --port 0"),
        ("--help", "--help"),
        ("", ""),
    ]
    for given, expected in cases:
        assert rewritten(given.split()) == expected.split(), given


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
    assert (code, plan["items"]) == (0, 3)
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
        ([*home, "label", "serv", "demo"], "'serve'"),
        ([*home, "label", "exprot", "demo", "--as", "pairs"], "'export'"),
        ([*home, "label", "--policies", "a", "--dtype", "bfloat16"], "dtype=bfloat16"),
    ):
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert said in error, (words, error)
        assert "Traceback" not in error
    assert not (tmp_path / "labels").exists() or not list((tmp_path / "labels").iterdir())


def test_a_port_that_is_taken_is_said_before_anything_is_sampled(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("fastapi", reason="the extra label is not installed")
    source = write(tmp_path / "r.jsonl")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        for words in (["--policies", "nobody", "--prompts", "world:verdicts"], ["--responses", source]):
            assert main(["--home", str(tmp_path), "label", *words, "--port", port]) == 2
            assert f"127.0.0.1:{port}: Address already in use; expected a free address" in capsys.readouterr().err
    assert not list((tmp_path / "labels").glob("*"))


def test_an_address_that_another_process_gets_meanwhile(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra label is not installed")
    from rlhf_pipeline.labelling.project import named
    from rlhf_pipeline.labelling.serving import bound, serve

    words = ["--home", str(tmp_path), "label", "--responses", write(tmp_path / "r.jsonl"), "--no-serve", "--name", "r"]
    assert main(words) == 0
    with bound("127.0.0.1", 0) as first, bound("127.0.0.1", first.getsockname()[1]) as second:
        second.listen()
        with named(tmp_path, "r") as store, pytest.raises(BadInput, match="Address already in use; expected a free"):
            serve(store, first, host="127.0.0.1", token=None, ready=lambda _: None)


def test_commands_on_a_project_that_is_not_there(tmp_path: Path, capsys: Any) -> None:
    assert main(["--home", str(tmp_path), "label", "serve", "none"]) == 2
    assert "no project 'none'" in capsys.readouterr().err


def test_damaged_projects_are_listed(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "labels/torn").mkdir(parents=True)
    (tmp_path / "labels/torn/labels.sqlite").write_bytes(b"x" * 4096)
    code, listed = answer(capsys, "label", "list", "--home", str(tmp_path), "--json")
    assert (code, [one["name"] for one in listed["projects"]]) == (0, ["torn"])
    assert "not a database" in listed["projects"][0]["damaged"]


@pytest.mark.check
@pytest.mark.slow
def test_a_project_is_served_until_it_is_interrupted(tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="the extra label is not installed")
    source = write(tmp_path / "r.jsonl")
    words = ["--home", str(tmp_path), "label", "--responses", source, "--port", "0", "--json"]
    server = children.fresh(words, tmp_path / "said")
    until = time.monotonic() + 120
    while not server.out.read_text().endswith("\n") and not server.ended() and time.monotonic() < until:
        time.sleep(0.05)
    said = json.loads(server.out.read_text())
    assert said["items"] == 3
    with urllib.request.urlopen(said["address"]) as answered:
        assert answered.status == 200
    server.send(signal.SIGINT)
    ended = server.wait()
    assert (ended.code, ended.out.count("\n")) == (0, 1)
    assert "every label is saved" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.check
def test_responses_of_two_models_become_a_project(lab: Any, tmp_path: Path, capsys: Any) -> None:
    small = ("use_cpu=true", "num_threads=1", "max_prompt_length=6", "response_length=4", "num=5")
    words = ["--home", str(lab.home), "label", "--policies", "sft", str(lab.registry.resolve("sft").path)]
    words += ["--prompts", "world:verdicts", "--k", "3", "--name", "two", "--no-serve", "--json", *small]
    code, plan = answer(capsys, *words, "--dry-run")
    assert (code, plan["items"], plan["responses"], len(plan["models"])) == (0, 5, 15, 2)
    code, made = answer(capsys, *words)
    assert (code, made["items"]) == (0, 5)
    from rlhf_pipeline.labelling.store import LabelStore

    with LabelStore.open(Path(made["path"]) / "labels.sqlite") as store:
        assert len({one.source for item in store.items() for one in item.responses}) == 2
        assert store.origin.tokenizer_digest is not None
    yaml = tmp_path / "label.yaml"
    yaml.write_text("policies: [sft, reward]\nprompts: world:verdicts\nname: three\n")
    code, failed = answer(capsys, "--home", str(lab.home), "label", "--config", str(yaml), "--no-serve", "--json")
    assert (code, failed["error"]["kind"]) == (2, "mismatch")  # a reward model does not respond
