"""With --json a failed command prints one object with its faults; exit codes and stderr are those without it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.main import main

GOOD = {"prompt": "the plot of this drama was", "chosen": "great", "rejected": "dull"}
DPO = "model_name_or_path: sft\noutput_name: x\nmax_prompt_length: 6\nresponse_length: 4\nuse_cpu: true\n"


def failed(capsys: pytest.CaptureFixture, *words: str, code: int = 2) -> dict[str, Any]:
    """Run with and without --json: the same exit code and stderr; return what is in `error`."""
    assert main(list(words)) == code
    plain = capsys.readouterr()
    assert plain.out == ""
    assert main([*words, "--json"]) == code
    found = capsys.readouterr()
    assert found.err == plain.err
    assert found.out.count("\n") == 1
    result = json.loads(found.out)
    assert list(result) == ["error"] and list(result["error"]) == ["kind", "faults"]
    for fault in result["error"]["faults"]:
        assert list(fault) == ["where", "key", "found", "expected", "fix"]
        assert all(isinstance(value, str) for value in fault.values())
    return result["error"]


def test_a_config(capsys, tiny, tmp_path: Path) -> None:
    config = tmp_path / "dpo.yaml"
    config.write_text(DPO + "dataset_name: collected:pairs\nbeta: -0.1\nlerning_rate: 1e-4\ntorch_dtype: float8\n")
    error = failed(capsys, "dpo", "--config", str(config), "--home", str(tiny.home), "label_smoothing=2")
    assert error == {
        "kind": "config",
        "faults": [
            {"where": f"{config}:7", "key": "beta", "found": "-0.1", "expected": "a number > 0", "fix": ""},
            {
                "where": f"{config}:8",
                "key": "lerning_rate",
                "found": "dpo has no such key",
                "expected": "",
                "fix": "did you mean 'learning_rate'?",
            },
            {
                "where": f"{config}:9",
                "key": "torch_dtype",
                "found": "'float8'",
                "expected": "one of float32, bfloat16, float16, auto",
                "fix": "did you mean 'float32' or 'float16' or 'bfloat16'?",
            },
            {
                "where": "override label_smoothing=2",
                "key": "label_smoothing",
                "found": "2",
                "expected": "a number < 0.5",
                "fix": "",
            },
        ],
    }


def test_all_faults_of_a_config_are_there(capsys) -> None:
    words = [f"no_such_{number}=1" for number in range(30)]
    error = failed(capsys, "dpo", *words)
    keys = [fault["key"] for fault in error["faults"]]
    assert [f"no_such_{number}" for number in range(30)] == [key for key in keys if key.startswith("no_such")]


def test_data(capsys, tiny, tmp_path: Path) -> None:
    rows = [GOOD, GOOD | {"rejected": None}, GOOD | {"chosen": 3}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "dpo.yaml").write_text(DPO + "dataset_name: pairs.jsonl\n")
    error = failed(capsys, "dpo", "--config", str(tmp_path / "dpo.yaml"), "--home", str(tiny.home))
    assert error["kind"] == "data"
    assert [fault["where"].rpartition("/")[2] for fault in error["faults"]] == [
        "pairs.jsonl",
        "pairs.jsonl:2",
        "pairs.jsonl:3",
    ]
    assert error["faults"][0]["fix"] == "fix them, or set `skip_bad_rows: true` to drop them"
    assert (error["faults"][1]["found"], error["faults"][1]["expected"]) == ("null: 'rejected' is null", "a value")


def test_a_reference(capsys, tiny) -> None:
    error = failed(capsys, "models", "show", "rewrad", "--home", str(tiny.home))
    assert error["kind"] == "reference"
    (fault,) = error["faults"]
    assert "'rewrad'" in fault["found"] and "did you mean 'reward'?" in fault["found"]


def test_a_model_of_the_wrong_kind(capsys, tiny) -> None:
    words = ("dpo", *DPO.replace(": ", "=").split(), "dataset_name=collected:pairs", "ref_model=reward")
    error = failed(capsys, *words, "--home", str(tiny.home))
    assert error["kind"] == "mismatch" and "reward@v1" in error["faults"][0]["found"]


def test_arguments(capsys, tiny) -> None:
    error = failed(capsys, "evaluate", "sft", "--samples", "many", "--home", str(tiny.home))
    assert error["kind"] == "arguments" and "--samples" in error["faults"][0]["found"]
    error = failed(capsys, "dpo", "--learning-rate", "3")
    assert error["faults"][0]["fix"] == "keys of the config are given without dashes: learning_rate=3"
    assert failed(capsys, "no-such-command")["kind"] == "arguments"
    error = failed(capsys, "data", "check", "x.jsonl", "--max-length", "8")
    assert error == {
        "kind": "input",
        "faults": [
            {
                "where": "",
                "key": "",
                "found": "--max-length: lengths are in tokens",
                "expected": "--tokenizer MODEL beside it",
                "fix": "",
            }
        ],
    }


def test_a_run_that_fails(capsys, lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_reward.py").write_text("def f(prompts, completions, **columns):\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    words = ["data", "collect", "sft", "--prompts", "world:verdicts", "--num", "4", "--name", "x"]
    assert main([*words, "--judge", "broken_reward:f", "--home", str(lab.home), "--json"]) == 1
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["kind"] == "run" and "ZeroDivisionError" in error["faults"][0]["found"]


def test_a_full_disk_an_interrupt_and_what_nobody_expected(capsys, monkeypatch, tiny) -> None:
    def fails_with(error: BaseException) -> dict[str, Any]:
        def fail(*_args: Any, **_kwargs: Any) -> None:
            raise error

        monkeypatch.setattr("rlhf_pipeline.registry.store.Registry.alias", fail)
        code = {OSError: 1, KeyboardInterrupt: 130, RuntimeError: 1}[type(error)]
        return failed(capsys, "models", "alias", "sft", "best", "--home", str(tiny.home), code=code)

    assert fails_with(OSError(28, "No space left on device", "somewhere"))["kind"] == "system"
    assert fails_with(KeyboardInterrupt())["kind"] == "interrupted"
    error = fails_with(RuntimeError("a b c"))
    assert error["kind"] == "unexpected" and "RuntimeError: a b c" in error["faults"][0]["found"]


def test_one_object_however_many_processes_fail(capsys, monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["dpo", "beta=-1", "--json"]) == 2
    assert capsys.readouterr().out == ""
