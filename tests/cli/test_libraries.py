"""What is imported and when: no library that a command does not use, and the collector at rest meanwhile."""

from __future__ import annotations

import gc
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.cli.libraries import load_libraries

SCRIPTS = Path(__file__).parents[2] / "scripts"
HEAVY = ("torch", "transformers", "accelerate", "datasets", "trl", "peft", "matplotlib", "sklearn", "scipy", "pandas")
# What the baselines of a reward model, the chat templates, the hub's data and the reports are made with.
ELSEWHERE = ("datasets", "trl", "matplotlib", "sklearn", "pandas", "pyarrow", "scipy.stats", "sacrebleu")
RUN = """
import contextlib, gc, io, json, sys
from rlhf_pipeline.cli.main import main
codes, found, said = [], [], []
for words in {runs!r}:
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        codes.append(main(words))
    found.append([name for name in {names!r} if name in sys.modules])
    said.append(stderr.getvalue())
collector = {{"collecting": gc.isenabled(), "frozen": gc.get_freeze_count()}}
print(json.dumps({{"codes": codes, "found": found, "said": said, **collector}}))
"""
TINY = {
    "max_prompt_length": 6,
    "response_length": 4,
    "use_cpu": True,
    "num_threads": 1,
    "model_name_or_path": "sft",
    "dataset_name": "collected:pairs",
    "per_device_train_batch_size": 8,
    "max_steps": 2,
    "output_name": "made",
}


def imported(names: tuple[str, ...], *runs: list[str]) -> dict[str, Any]:
    """Run command lines one after the other in a new process; which of `names` are imported after each."""
    code = RUN.format(runs=list(runs), names=names)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def command(home: Path, stage: str, **values: Any) -> list[str]:
    """A run of two updates from the tiny SFT model."""
    return ["--home", str(home), stage, *(f"{key}={value}" for key, value in {**TINY, **values}.items())]


def test_help_and_listings_import_no_library(tiny) -> None:
    home = ["--home", str(tiny.home)]
    runs = [["--help"], ["dpo", "--help"], [*home, "models", "list"], [*home, "data", "preview", "collected:pairs"]]
    runs += [["label", "--help"], [*home, "label", "list"]]
    found = imported((*HEAVY, "fastapi", "uvicorn", "krippendorff"), *runs)
    assert found["codes"] == [0] * 6
    assert found["found"] == [[]] * 6


def test_the_help_page_does_not_wait_for_the_config_classes() -> None:
    found = imported(("pydantic", "rlhf_pipeline.config"), ["--help"], ["compare", "--help"])
    assert found["codes"] == [0, 0]
    assert found["found"] == [[], ["pydantic", "rlhf_pipeline.config"]]


@pytest.mark.check
def test_checking_data_imports_what_its_estimate_of_noise_needs_and_no_torch(tiny) -> None:
    found = imported(HEAVY, ["--home", str(tiny.home), "data", "check", "collected:pairs"])
    assert found["codes"] == [0]
    assert not {"torch", "transformers", "accelerate", "trl"} & set(found["found"][0])


def test_a_model_that_cannot_be_used_is_told_before_any_library_is_imported(tiny) -> None:
    found = imported(
        HEAVY,
        command(tiny.home, "dpo", model_name_or_path="stf"),
        command(tiny.home, "dpo", ref_model="reward"),
        command(tiny.home, "ppo", reward_model_path="sft"),
    )
    assert found["codes"] == [2, 2, 2]
    assert found["found"] == [[], [], []]
    for said, expected in zip(
        found["said"], ("no model 'stf'", "expected a policy", "expected a reward model"), strict=True
    ):
        assert expected in said


@pytest.mark.check
@pytest.mark.slow
def test_training_on_token_ids_imports_only_what_it_uses_and_no_other_room(lab) -> None:
    ppo = {"reward_model_path": "reward", "rollout_batch_size": 16, "num_mini_batches": 2, "num_ppo_epochs": 1}
    rooms = ("experiment.run", "report", "compare", "measure", "stages.ppo", "stages.collect", "stages.reward")
    found = imported(
        ("torch", *ELSEWHERE, *(f"rlhf_pipeline.{name}" for name in rooms)),
        command(lab.home, "dpo"),
        command(lab.home, "ppo", **ppo),
        command(lab.home, "sft"),
    )
    assert found["codes"] == [0, 0, 0]
    assert found["found"] == [["torch"], *[["torch", "rlhf_pipeline.stages.ppo"]] * 2]
    manifest = lab.registry.resolve("made@v1").manifest
    assert manifest.metrics["eval_prompts"] < 50  # Student's interval, for which scipy.stats is not needed
    # The modules' objects are out of the collector's sight, and it is at work again.
    assert found["collecting"]
    assert found["frozen"] > 100_000


@pytest.mark.slow
@pytest.mark.check
def test_an_experiment_that_is_done_imports_no_library(lab, tmp_path) -> None:
    """Its stages and its comparison are looked up; torch comes with the first thing that is to be made."""
    cpu = {"use_cpu": True, "num_threads": 1}
    init = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    init |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": 16}
    new = {"dataset_name": "world:verdicts", "max_train_samples": 64, "model_init": init}
    training = {key: value for key, value in TINY.items() if key != "model_name_or_path"}
    stages = {
        "new": {"stage": "sft", **training, **new, "tokenizer_init": {"type": "world"}, "output_name": "new"},
        "dpo": {"stage": "dpo", **TINY, "output_name": "dpo"},
    }
    compare = {"arms": ["dpo"], "baseline": "sft", "samples": 1, "max_prompts": 2, "exact": False, **cpu}
    path = tmp_path / "experiment.json"
    path.write_text(json.dumps({"name": "trial", "stages": stages, "compare": compare}))
    words = ["--home", str(lab.home), "run", str(path)]
    first = imported(HEAVY, words)
    assert first["codes"] == [0] and "torch" in first["found"][0]
    second = imported(HEAVY, words)
    assert second["codes"] == [0] and second["found"] == [[]]
    assert "already compared" in second["said"][0]


def test_where_torch_is_imported_the_collector_is_left_alone() -> None:
    import torch  # noqa: F401

    before = gc.get_freeze_count()
    load_libraries()
    assert gc.get_freeze_count() == before
    assert gc.isenabled()


@pytest.mark.parametrize("collecting", [True, False])
def test_an_import_that_fails_leaves_the_collector_as_it_was(monkeypatch: pytest.MonkeyPatch, collecting: bool) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)  # what makes an import of it fail
    before = gc.get_freeze_count()
    if not collecting:
        gc.disable()
    try:
        with pytest.raises(ImportError):
            load_libraries()
        assert gc.isenabled() is collecting
        assert gc.get_freeze_count() == before
    finally:
        gc.enable()


@pytest.fixture
def startup(monkeypatch: pytest.MonkeyPatch):
    """scripts/startup.py."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("startup")


def test_the_table_shows_medians_ranges_and_the_share_of_the_imports(startup) -> None:
    taken = {startup.HELP: [0.2, 0.1, 0.3], startup.PLAIN: [2.0, 1.0, 9.0], "rlhf dpo": [4.0, 5.0, 3.0]}
    rows = [line.split() for line in startup.table(taken).splitlines()]
    assert rows[1] == ["rlhf", "--help", "0.20", "0.10", "-", "0.30"]
    assert rows[2][-4:] == ["2.00", "1.00", "-", "9.00"]
    assert rows[3] == ["rlhf", "dpo", "4.00", "3.00", "-", "5.00", "50%"]


def test_an_unknown_stage_is_refused(startup, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as left:
        startup.main(["--stages", "dpo,rlaif"])
    assert left.value.code == 2
    assert "--stages rlaif: expected some of sft, train-rm, dpo, ppo" in capsys.readouterr().err


def test_a_command_that_fails_is_told_with_what_it_said(
    startup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    failing = [sys.executable, "-c", "import sys; print('no such model', file=sys.stderr); sys.exit(2)"]
    monkeypatch.setattr(startup, "commands", lambda stages, home: {"rlhf dpo": failing})
    assert startup.main(["--home", str(tmp_path), "--stages", "dpo"]) == 1
    error = capsys.readouterr().err
    assert "ended with exit code 2" in error and error.endswith("no such model\n")


@pytest.mark.slow
@pytest.mark.check
def test_a_quick_measurement(startup, lab, capsys: pytest.CaptureFixture) -> None:
    assert startup.main(["--quick", "--home", str(lab.home), "--stages", "dpo", "--threads", "1"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row[:8].strip() for row in rows[1:]] == ["rlhf --h", "import t", "import w", "rlhf dpo"]
    assert rows[-1].endswith("%")
    assert lab.registry.models.numbers("startup-dpo") == [1]
