"""A user's mistake is a short error with exit code 2 and no traceback, and stdout stays empty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main

DPO = "model_name_or_path: sft\noutput_name: x\nmax_prompt_length: 6\nresponse_length: 4\nuse_cpu: true\n"


@pytest.fixture
def write(tmp_path: Path):
    def write_file(name: str, text: str) -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write_file


def refused(capsys: pytest.CaptureFixture, *words: str) -> str:
    """Run, expect exit code 2, nothing on stdout, no traceback; return stderr."""
    code = main(list(words))
    captured = capsys.readouterr()
    assert code == 2, captured.err
    assert captured.out == ""
    assert "Traceback" not in captured.err
    return captured.err


def pairs(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


GOOD = {"prompt": "the plot of this drama was", "chosen": "great", "rejected": "dull"}


def test_a_misspelt_key(capsys, write, tiny) -> None:
    config = write("dpo.yaml", DPO + "dataset_name: collected:pairs\nlerning_rate: 1e-4\n")
    error = refused(capsys, "dpo", "--config", config, "--home", str(tiny.home))
    assert "dpo.yaml:7" in error and "lerning_rate" in error and "did you mean 'learning_rate'" in error


def test_a_negative_beta(capsys, write, tiny) -> None:
    config = write("dpo.yaml", DPO + "dataset_name: collected:pairs\nbeta: -0.1\n")
    error = refused(capsys, "dpo", "--config", config, "--home", str(tiny.home))
    assert "dpo.yaml:7: beta: found -0.1; expected a number > 0" in error


def test_a_missing_config_file(capsys, tmp_path) -> None:
    error = refused(capsys, "dpo", "--config", str(tmp_path / "nowhere.yaml"))
    assert "nowhere.yaml" in error


def test_a_missing_data_file(capsys, write, tiny) -> None:
    config = write("dpo.yaml", DPO + "dataset_name: nowhere.jsonl\n")
    error = refused(capsys, "dpo", "--config", config, "--home", str(tiny.home))
    assert "nowhere.jsonl" in error


def test_a_reward_model_as_the_policy(capsys, write, tiny) -> None:
    config = write("dpo.yaml", DPO + "dataset_name: collected:pairs\n")
    error = refused(capsys, "dpo", "--config", config, "model_name_or_path=reward", "--home", str(tiny.home))
    assert "reward@v1" in error and "expected a policy" in error


def test_a_policy_as_the_reward_model(capsys, write, tiny) -> None:
    config = write("ppo.yaml", DPO + "dataset_name: collected:pairs\nreward_model_path: sft\ntotal_episodes: 64\n")
    error = refused(capsys, "ppo", "--config", config, "--home", str(tiny.home))
    assert "sft@v1" in error and "expected a reward model" in error


def test_a_null_on_line_7(capsys, write, tiny) -> None:
    rows = [GOOD] * 6 + [GOOD | {"rejected": None}] + [GOOD] * 3
    data = write("pairs.jsonl", pairs(*rows))
    config = write("dpo.yaml", DPO + f"dataset_name: {data}\n")
    error = refused(capsys, "dpo", "--config", config, "--home", str(tiny.home))
    assert "pairs.jsonl:7" in error and "null" in error


def test_chosen_equal_to_rejected_throughout(capsys, write, tiny) -> None:
    data = write("pairs.jsonl", pairs(*[GOOD | {"rejected": "great"}] * 5))
    config = write("dpo.yaml", DPO + f"dataset_name: {data}\n")
    error = refused(capsys, "dpo", "--config", config, "--home", str(tiny.home))
    assert "pairs.jsonl:1" in error and "pairs.jsonl:5" in error
    error = refused(capsys, "dpo", "--config", config, "skip_bad_rows=true", "--home", str(tiny.home))
    assert "no rows left" in error


def test_an_unknown_registry_name_with_near_matches(capsys, write, tiny) -> None:
    config = write("dpo.yaml", DPO + "dataset_name: collected:pairs\n")
    error = refused(capsys, "dpo", "--config", config, "model_name_or_path=stf", "--home", str(tiny.home))
    assert "'stf'" in error and "did you mean 'sft'" in error
    error = refused(capsys, "models", "show", "rewrad", "--home", str(tiny.home))
    assert "did you mean 'reward'" in error


def test_several_faults_at_once(capsys, write, tiny) -> None:
    config = write("dpo.yaml", DPO + "dataset_name: collected:pairs\nbeta: 0\nlearning_rate: fast\nbta: 1\n")
    error = refused(capsys, "dpo", "--config", config, "--home", str(tiny.home))
    assert all(word in error for word in ("beta", "learning_rate", "bta"))
    assert len(error.splitlines()) == 3


def test_an_unknown_word_in_a_prompt_of_the_world(capsys, tiny) -> None:
    error = refused(capsys, "generate", "sft", "--prompt", "the blot of this drama was", "--home", str(tiny.home))
    assert "blot" in error


@pytest.mark.parametrize(
    "words",
    [
        ["dpo", "--no-such-option"],
        ["no-such-command"],
        ["models", "show"],
        ["evaluate", "sft", "--samples", "many"],
        ["evaluate", "sft", "--temperature", "0"],
        ["compare", "sft"],
    ],
)
def test_wrong_arguments(capsys, tiny, words: list[str]) -> None:
    assert refused(capsys, "--home", str(tiny.home), *words)


def test_a_damaged_model_is_named(capsys, lab) -> None:
    weights = lab.home / "models/sft/v1/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(bytes(content))
    error = refused(capsys, "generate", "sft", "--prompt", "the plot of this drama was", "--home", str(lab.home))
    assert "model.safetensors" in error
    assert main(["models", "verify", "--home", str(lab.home)]) == 2
    assert "model.safetensors" in capsys.readouterr().out


def test_debug_raises(write, tiny) -> None:
    from rlhf_pipeline.errors import ConfigError

    config = write("dpo.yaml", DPO + "dataset_name: collected:pairs\nbeta: -1\n")
    with pytest.raises(ConfigError):
        main(["dpo", "--config", config, "--debug"])


def test_a_read_only_home_is_one_line_and_exit_1(capsys, monkeypatch, tiny) -> None:
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device", "somewhere")

    monkeypatch.setattr("rlhf_pipeline.registry.store.Registry.alias", full)
    assert main(["models", "alias", "sft", "best", "--home", str(tiny.home)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "No space left" in captured.err


def test_a_refused_run_leaves_nothing_behind(capsys, write, lab) -> None:
    config = write("dpo.yaml", DPO + "dataset_name: collected:pairs\n")
    refused(capsys, "dpo", "--config", config, "model_name_or_path=reward", "--home", str(lab.home))
    assert not any((lab.home / "runs").glob("*"))


def test_arms_with_different_stop_tokens_are_not_compared(capsys, lab) -> None:
    lab.run("ppo", output_name="cut", stop_token="great", max_steps=1)
    lab.run("ppo", output_name="whole", max_steps=1)
    error = refused(capsys, "compare", "cut", "whole", "--home", str(lab.home))
    assert "stop token" in error and "great" in error


@pytest.mark.check
def test_values_that_an_architecture_refuses(capsys, write, tmp_path) -> None:
    base = "output_name: x\ntokenizer_init: world\ndataset_name: world:verdicts\nmax_length: 10\nuse_cpu: true\n"
    for values, word in (
        ("{model_type: nope}", "nope"),
        ("{model_type: t5}", "t5"),
        ("{model_type: llama, hiden_size: 4}", "hidden_size"),
        ("{model_type: llama, hidden_size: abc}", "llama"),
        ("{model_type: gpt2, resid_pdrop: 0.1}", "dropout: true"),
    ):
        config = write("sft.yaml", base + f"model_init: {values}\n")
        for dry in ([], ["--dry-run"]):
            assert word in refused(capsys, "sft", "--config", config, "--home", str(tmp_path / "home"), *dry)


def test_a_home_that_is_a_file(capsys, write) -> None:
    assert "found a file" in refused(capsys, "models", "list", "--home", write("file", "x"))


def test_more_tokens_than_positions(capsys, tiny) -> None:
    error = refused(capsys, "evaluate", "sft", "--max-new-tokens", "100", "--home", str(tiny.home))
    assert "at most 32" in error


def test_a_reward_function_that_fails_names_its_place(capsys, lab, tmp_path, monkeypatch) -> None:
    (tmp_path / "bad_reward.py").write_text("def f(prompts, completions, **columns):\n    return 1 / 0\n")
    monkeypatch.chdir(tmp_path)
    words = ["data", "collect", "sft", "--prompts", "world:verdicts", "--num", "4", "--name", "x"]
    assert main([*words, "--judge", "bad_reward:f", "--home", str(lab.home)]) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError" in error and "bad_reward.py:2" in error and "Traceback" not in error
    assert "no_such" in refused(capsys, *words, "--judge", "no_such:f", "--home", str(lab.home))


def test_what_a_reward_function_prints_is_not_on_stdout(capsys, lab, tmp_path, monkeypatch) -> None:
    text = "def f(prompts, completions, **columns):\n    print('hello')\n    return [0.0] * len(prompts)\n"
    (tmp_path / "loud_reward.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    words = ["data", "collect", "sft", "--prompts", "world:verdicts", "--num", "4", "--name", "x", "--json"]
    assert main([*words, "--judge", "loud_reward:f", "--home", str(lab.home)]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model"] == "x@v1" and "hello" in captured.err


def test_prompts_of_training_in_the_test_split(capsys, write, tiny) -> None:
    good = GOOD | {"chosen": " great", "rejected": " dull"}
    rows = [good | {"split": "train"}, good | {"split": "train", "prompt": "the plot of this horror was"}]
    rows.append(good | {"split": "test", "prompt": "The plot of this drama was:"})
    rows.append(good | {"split": "test", "prompt": "the plot of this comedy was"})
    data = write("pairs.jsonl", pairs(*rows))
    config = write("dpo.yaml", DPO + f"dataset_name: {data}\n")
    words = ("dpo", "--config", config, "--home", str(tiny.home), "--dry-run")
    error = refused(capsys, *words)
    assert "pairs.jsonl:3: leaked_similar_prompt" in error and "pairs.jsonl:1" in error and "allow_overlap" in error
    for override in ("allow_overlap=true", "skip_bad_rows=true"):
        assert main([*words, override]) == 0
    capsys.readouterr()


def test_limits_in_tokens_need_a_tokenizer(capsys, write) -> None:
    error = refused(capsys, "data", "check", write("pairs.jsonl", pairs(GOOD)), "--max-length", "8")
    assert "--tokenizer" in error
    error = refused(capsys, "data", "check", write("pairs.jsonl", pairs(GOOD)), "--max-length", "8",
                    "--max-prompt-length", "8")  # fmt: skip
    assert "leaves 8 tokens for the prompt and 0 for the response" in error


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
        OSError(12, "Cannot allocate memory"),
    ],
)
def test_memory_that_runs_out_while_a_model_is_loaded(capsys, monkeypatch, tiny, error) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    assert main(["generate", "sft", "--prompt", GOOD["prompt"], "--home", str(tiny.home)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: out of memory: ") and "allocate memory" in said and "a smaller model" in said
