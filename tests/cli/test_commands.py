"""Every command of the contract on tiny models: what it prints and what it leaves behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlhf_pipeline.cli.main import main

COMMON = {
    "max_prompt_length": 6,
    "response_length": 4,
    "use_cpu": True,
    "num_threads": 1,
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "learning_rate": 1e-3,
}
STAGES = {
    "sft": ("sft", {"dataset_name": "world:verdicts", "model_name_or_path": "sft", "max_train_samples": 50}),
    "train-rm": ("reward", {"dataset_name": "collected:pairs", "model_name_or_path": "sft"}),
    "dpo": ("dpo", {"dataset_name": "collected:pairs", "model_name_or_path": "sft"}),
    "ppo": (
        "ppo",
        {
            "dataset_name": "collected:pairs",
            "model_name_or_path": "sft",
            "reward_model_path": "reward",
            "rollout_batch_size": 16,
            "num_mini_batches": 2,
            "num_ppo_epochs": 1,
        },
    ),
}
PROMPT = "the plot of this drama was"


def json_of(capsys: pytest.CaptureFixture, *words: str, code: int = 0) -> dict:
    """Run with --json: the exit code, and exactly one JSON object on stdout."""
    assert main([*words, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.mark.parametrize("stage", STAGES)
def test_a_training_command(capsys, lab, tmp_path: Path, stage: str) -> None:
    manifest_stage, values = STAGES[stage]
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({**COMMON, **values, "output_name": "made"}))
    result = json_of(capsys, "--home", str(lab.home), stage, "--config", str(config), "seed=3")
    assert set(result) == {"stage", "model", "path", "run", "metrics", "cost"}
    assert (result["stage"], result["model"]) == (manifest_stage, "made@v1")
    folder = Path(result["path"])
    assert folder == lab.home / "models/made/v1"
    assert {p.name for p in folder.iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["stage"] == manifest_stage and manifest["seed"] == 3
    assert manifest["parents"]["base"]["ref"] == "sft@v1"
    assert manifest["data"][0]["rows"] > 0 and len(manifest["data"][0]["digest"]) == 64
    assert {
        "wall_seconds",
        "flops",
        "tokens_trained",
        "tokens_generated",
        "optimizer_steps",
        "peak_memory_bytes",
    } <= set(manifest["cost"])
    assert manifest["cost"]["optimizer_steps"] == (4 if stage == "ppo" else 2)
    run = Path(result["run"])
    assert {p.name for p in run.iterdir()} >= {"config.yaml", "metrics.jsonl", "log.txt"}
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 3
    # The resolved config is a config: given back, it is the same run, which is finished, so a new version.
    again = json_of(capsys, "--home", str(lab.home), stage, "--config", str(run / "config.yaml"))
    assert again["model"] == "made@v2" and again["run"] == f"{run}-2"


def test_dry_run_trains_and_writes_nothing(capsys, lab, tmp_path: Path) -> None:
    for stage, (_, values) in STAGES.items():
        config = tmp_path / f"{stage}.yaml"
        config.write_text(yaml.safe_dump({**COMMON, **values, "output_name": "made"}))
        before = sorted(lab.home.rglob("*"))
        result = json_of(capsys, stage, "--config", str(config), "--home", str(lab.home), "--dry-run")
        assert result["model"] == "sft@v1" and result["parameters"] > 1000
        assert result["optimizer_steps"] == (4 if stage == "ppo" else 2)
        assert sorted(lab.home.rglob("*")) == before


@pytest.mark.check
def test_run_does_everything_once(capsys, request, tmp_path: Path) -> None:
    from tests.conftest import TINY_LLAMA

    home = tmp_path / "home"
    tiny = {key: value for key, value in COMMON.items() if key != "max_steps"}
    files = {
        "sft": {
            **tiny,
            "max_steps": 5,
            "model_init": TINY_LLAMA,
            "tokenizer_init": "world",
            "dataset_name": "world:verdicts",
        },
        "pairs": {
            "prompts": "world:verdicts",
            "judge": "world",
            "num": 100,
            "max_prompt_length": 6,
            "response_length": 4,
        },
        "reward": {**tiny, "max_steps": 2},
        "dpo": {**tiny, "max_steps": 2, "beta": 0.5},
        "compare": {"samples": 2, "best_of": [2], "max_new_tokens": 2},  # few responses in all
    }
    for name, values in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "experiment.yaml").write_text(
        """
name: small
stages:
  sft:    {stage: sft, config: sft.yaml}
  pairs:  {stage: collect, config: pairs.yaml, policy: sft}
  reward: {stage: train-rm, config: reward.yaml, model_name_or_path: sft, dataset_name: pairs}
  dpo:    {stage: dpo, config: dpo.yaml, model_name_or_path: sft, dataset_name: pairs}
compare: {arms: [dpo], baseline: sft, config: compare.yaml}
"""
    )
    words = ("run", str(tmp_path / "experiment.yaml"), "--home", str(home))
    dry = json_of(capsys, *words, "--dry-run")
    assert dry["stages"]["sft"] == "sft: to run" and not home.exists()
    first = json_of(capsys, *words)
    assert [entry["skipped"] for entry in first["stages"].values()] == [False] * 4
    assert [row["name"] for row in first["comparison"]["rows"]] == ["sft@v1", "dpo@v1", "best of 2 of sft@v1"]
    assert Path(first["comparison"]["path"]) == home / "reports/small/results.json"
    assert (home / "reports/small/index.html").is_file()
    request.getfixturevalue("undrawn")  # one page is enough
    second = json_of(capsys, *words)
    assert [entry["skipped"] for entry in second["stages"].values()] == [True] * 4
    assert second["comparison"]["rows"][0]["metrics"] == first["comparison"]["rows"][0]["metrics"]
    third = json_of(capsys, *words, "dpo.beta=.3")
    assert {name: entry["model"] for name, entry in third["stages"].items()}["dpo"] == "dpo@v2"
    assert [entry["skipped"] for entry in third["stages"].values()] == [True, True, True, False]


def test_generate(capsys, tiny) -> None:
    home = ("--home", str(tiny.home))
    result = json_of(capsys, "generate", "sft", "--prompt", PROMPT, "--samples", "3", "--reward-model", "world", *home)
    (entry,) = result["responses"]
    assert entry["prompt"] == PROMPT and len(entry["responses"]) == 3
    assert all(isinstance(response["score"], float) for response in entry["responses"])
    again = json_of(capsys, "generate", "sft", "--prompt", PROMPT, "--samples", "3", "--reward-model", "world", *home)
    assert again == result
    assert main(["generate", "sft", "--max-prompts", "2", *home]) == 0
    assert capsys.readouterr().out.count("> the ") == 2


def test_evaluate_a_policy_and_a_reward_model(capsys, tiny) -> None:
    result = json_of(capsys, "evaluate", "sft", "--samples", "2", "--home", str(tiny.home))
    assert {"true_reward", "well_formed", "length", "ended", "kl"} <= set(result["metrics"])
    assert result["metrics"]["kl"]["mean"] == 0.0  # the SFT model is its own reference
    assert result["prompts"] == 8
    scored = json_of(capsys, "evaluate", "sft", "--samples", "2", "--reward-model", "reward", "--home", str(tiny.home))
    assert scored["reward_model"] == "reward@v1" and "score" in scored["metrics"]
    reward = json_of(capsys, "evaluate", "reward", "--home", str(tiny.home))
    assert 0 <= reward["metrics"]["accuracy"] <= 1 and set(reward["metrics"]["baselines"]) == {"longer_wins", "tfidf"}
    assert main(["evaluate", "sft", "--samples", "2", "--home", str(tiny.home)]) == 0
    assert "true reward" in capsys.readouterr().out


@pytest.mark.check
def test_compare_by_references(capsys, lab, request) -> None:
    lab.run("dpo", output_name="dpo")
    words = ["compare", "dpo", "--baseline", "sft", "--samples", "2", "--best-of", "1,2", "--home", str(lab.home)]
    words += ["--max-new-tokens", "2"]
    result = json_of(capsys, *words)
    assert [row["name"] for row in result["rows"]] == ["sft@v1", "dpo@v1", "best of 1 of sft@v1", "best of 2 of sft@v1"]
    assert json.loads(Path(result["path"]).read_text()) == result
    assert Path(result["report"]).is_file()
    request.getfixturevalue("undrawn")  # one page is enough
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "dpo@v1" in out and "true reward" in out and result["path"] in out


def test_a_comparison_says_each_thing_once_and_nothing_of_what_is_not_there(capsys, lab, undrawn) -> None:
    lab.run("dpo", output_name="dpo", max_steps=1)
    shared = ("--samples", "1", "--max-prompts", "2", "--home", str(lab.home), "use_cpu=true", "exact=false")
    assert main(["compare", "dpo", "--baseline", "sft", "--reference", "sft", *shared]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("'sft' is the registry's sft@v1") == 1
    assert "judge -" not in captured.out and "score by -" not in captured.out
    assert "KL to sft@v1, nats per response" in captured.out


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_sampled(capsys, lab) -> None:
    (lab.home / "reports").write_text("in the way")
    (lab.home / "models/other").symlink_to(lab.home / "models/sft")
    words = ["compare", "other", "--baseline", "sft", "--samples", "1", "--max-prompts", "2", "use_cpu=true"]
    words += ["--home", str(lab.home)]
    assert main(words) != 0
    error = capsys.readouterr().err
    assert "reports" in error.splitlines()[-1] and error.splitlines()[-1].startswith("error: ")
    assert "measured" not in error and "prompts of the split" not in error


def test_exact(capsys, lab) -> None:
    lab.run("dpo", max_steps=2)
    short = ["--max-new-tokens", "2", "--max-prompts", "3"]
    result = json_of(capsys, "exact", "sft", "reward", "dpo", *short, "--home", str(lab.home))
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ["sft@v1", "reward@v1", "dpo@v1", "optimum"]
    assert (result["responses"], result["prompts"], rows["dpo@v1"]["beta"]) == (993, 3, 0.5)
    assert main(["exact", "sft", "reward", "dpo", *short, "--home", str(lab.home), "--beta", "0.25"]) == 0
    out = capsys.readouterr().out
    assert "all 993 responses to 3 prompts" in out and "optimum under reward@v1" in out and "0.25" in out
    planned = json_of(capsys, "exact", "sft", "--beta", "1", "--dry-run", "--home", str(lab.home))
    assert planned["models"] == "sft@v1" and planned["config"]["beta"] == 1.0


def test_mistakes_of_exact(capsys, lab) -> None:
    home = ["--home", str(lab.home)]
    for words, said in (
        (["sft"], "--beta"),
        (["sft", "--beta", "-1"], "a number > 0"),
        (["nobody", "--beta", "1"], "nobody"),
        (["sft", "--beta", "1", "--max-new-tokens", "5"], "can be enumerated"),
        (["sft", "--beta", "1", "--reward", "sft"], "expected a reward model"),
    ):
        assert main(["exact", *words, *home]) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and said in printed.err and "Traceback" not in printed.err


def test_models(capsys, lab, tmp_path: Path) -> None:
    home = ("--home", str(lab.home))
    listed = json_of(capsys, "models", "list", *home)
    assert [entry["model"] for entry in listed["models"]] == ["reward@v1", "sft@v1"]
    assert json_of(capsys, "models", "show", "reward", *home)["stage"] == "reward"
    tree = json_of(capsys, "models", "lineage", "reward", *home)
    assert main(["models", "lineage", "reward", *home]) == 0
    text = capsys.readouterr().out
    assert tree["ref"] == "reward@v1"
    assert "sft@v1" in text and "collected:pairs@v1" in text and "world:verdicts" in text
    assert json_of(capsys, "models", "alias", "sft@v1", "best", *home)["alias"] == "sft@best"
    assert json_of(capsys, "models", "show", "sft@best", *home)["version"] == 1
    exported = json_of(capsys, "models", "export", "sft", str(tmp_path / "out"), *home)["path"]
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(exported).config.vocab_size == 32
    assert json_of(capsys, "models", "verify", *home) == {"ok": True, "faults": []}
    assert main(["models", "remove", "sft", *home]) == 2  # the reward model comes from it
    assert "reward@v1" in capsys.readouterr().err
    assert json_of(capsys, "models", "remove", "reward", *home) == {"removed": "reward@v1"}


def test_data(capsys, lab, tmp_path: Path) -> None:
    home = ("--home", str(lab.home))
    assert json_of(capsys, "data", "list", *home)["data"][0]["data"] == "collected:pairs@v1"
    report = json_of(capsys, "data", "check", "collected:pairs", *home)
    assert (
        report["faulty_rows"] == 0
        and report["splits_from"] == "source"
        and set(report["splits"])
        == {
            "train",
            "test",
            "validation",
            "judge",
        }
    )
    assert len(json_of(capsys, "data", "preview", "world:verdicts", "-n", "2", *home)["rows"]) == 2
    words = ["sft", "--prompts", "world:verdicts", "--judge", "reward", "--num", "20", "--name", "more"]
    collected = json_of(capsys, "data", "collect", *words, "max_prompt_length=6", "response_length=4", *home)
    assert collected["model"] == "more@v1" and collected["metrics"]["judge"] == "reward"
    rows = (lab.home / "data/more/v1/records.jsonl").read_text().splitlines()
    assert len(rows) == collected["metrics"]["records"]
    world = json_of(capsys, "data", "export-world", str(tmp_path / "world"), *home)
    assert (world["demonstrations"], world["prompts"]) == (36_000, 36)
    exported = json_of(capsys, "data", "check", str(tmp_path / "world/demonstrations.jsonl"), *home)
    assert (exported["faulty_rows"], exported["usable"], exported["splits_from"]) == (0, 36_000, "source")


def test_data_check_measures_tokens_and_labels(capsys, tiny) -> None:
    limits = ("--max-prompt-length", "6", "--response-length", "2")
    words = ["data", "check", "collected:pairs", "--tokenizer", "sft", *limits]
    report = json_of(capsys, *words, "--home", str(tiny.home))
    policy = report["length_policy"]
    assert (policy["max_prompt_length"], policy["response_length"], policy["max_length"]) == (6, 2, 8)
    dropped = sum(policy["dropped"].values())
    assert 0 < dropped == report["usable"] - policy["examples"]
    assert report["round_trip"]["different"] == report["round_trip"]["white_space_only"]
    noise = report["label_noise"]
    assert noise["pairs"] == report["usable"] and 0 <= noise["tfidf"]["accuracy"] <= 1 and noise["expected_noise"] < 0.5
    assert main([*words, "--home", str(tiny.home)]) == 0
    assert "label_noise longer_wins accuracy" in capsys.readouterr().out


def test_data_check_lists_faults_and_exits_2(capsys, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "b"}\nnot json\n')
    assert main(["data", "check", str(path)]) == 2
    out = capsys.readouterr().out
    assert "rows.jsonl:2" in out and "rows.jsonl:3" in out


def test_options_work_before_and_after_the_subcommand(capsys, tiny) -> None:
    assert main(["--home", str(tiny.home), "--json", "models", "list"]) == 0
    before = capsys.readouterr().out
    assert main(["models", "list", "--json", "--home", str(tiny.home)]) == 0
    assert capsys.readouterr().out == before


def test_the_home_comes_from_the_environment(capsys, tiny, monkeypatch) -> None:
    monkeypatch.setenv("RLHF_HOME", str(tiny.home))
    assert len(json_of(capsys, "models", "list")["models"]) == 2


def test_the_console_script_and_its_exit_codes(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("rlhf")
    done = subprocess.run([script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert all(name in done.stdout for name in ("sft", "train-rm", "ppo", "dpo", "run", "compare", "models", "data"))
    done = subprocess.run([script, "dpo", "beta=-0.1"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "" and "Traceback" not in done.stderr
    assert subprocess.run([script, "--version"], capture_output=True, text=True).stdout.startswith("rlhf ")
