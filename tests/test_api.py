"""The Python API: the same checks, files and objects as the commands, without torch at import."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

import rlhf_pipeline
from rlhf_pipeline.cli.main import main
from rlhf_pipeline.errors import ConfigError, UnknownReference
from tests.conftest import DEFAULTS

README = Path(__file__).parents[1] / "README.md"
NAMES = ("sft", "train_rm", "ppo", "dpo", "collect", "compare", "run", "load")


def printed(capsys, *words):
    assert main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def settings(stage, **changes):
    return {key: value for key, value in {**DEFAULTS[stage], **changes}.items() if value is not None}


def test_the_import_loads_no_library() -> None:
    heavy = ("torch", "transformers", "pydantic", "rlhf_pipeline.config")
    code = (
        f"import sys; from rlhf_pipeline import {', '.join(NAMES)}; print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.check
@pytest.mark.parametrize("before", ["", "import rlhf_pipeline.compare.verdict;"])
def test_compare_can_be_called_whatever_was_imported_before(before) -> None:
    code = f"{before}from rlhf_pipeline import compare\ntry: compare(armz=[])\nexcept Exception as e: print(e.kind)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "config"


def test_every_function_is_annotated() -> None:
    for name in NAMES:
        function = getattr(rlhf_pipeline.api, name)
        signature = inspect.signature(function)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values()), name


def test_a_stage_returns_what_its_command_prints(lab, capsys, tmp_path) -> None:
    path = tmp_path / "dpo.yaml"
    path.write_text(yaml.safe_dump(settings("dpo")))
    expected = printed(capsys, "dpo", "--config", str(path), "max_steps=2", "--home", str(lab.home))
    for config in (settings("dpo"), str(path), path):
        found = rlhf_pipeline.dpo(config, home=lab.home, quiet=True, max_steps=2)
        assert found.keys() == expected.keys() and found["stage"] == "dpo"
        assert found["metrics"] == expected["metrics"]
    assert found["model"] == "dpo@v4"
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(("name", "stage"), [("sft", "sft"), ("train_rm", "train-rm"), ("ppo", "ppo")])
def test_every_stage_has_its_function(lab, name, stage) -> None:
    found = getattr(rlhf_pipeline, name)(settings(stage), home=lab.home, quiet=True, max_steps=1)
    assert found["model"] == f"{DEFAULTS[stage]['output_name']}@v1" and Path(found["path"]).is_dir()


def test_faults_of_dict_and_keywords_are_told_together(lab) -> None:
    before = sorted((lab.home / "runs").glob("*"))
    with pytest.raises(ConfigError) as caught:
        rlhf_pipeline.dpo({**settings("dpo"), "betta": 1}, home=lab.home, max_steps="x")
    faults = {fault.key: fault.where for fault in caught.value.faults}
    assert faults == {"betta": "dpo: betta", "max_steps": "dpo: max_steps"}
    with pytest.raises(UnknownReference, match="no model 'stf'"):
        rlhf_pipeline.dpo(settings("dpo"), home=lab.home, model_name_or_path="stf")
    assert sorted((lab.home / "runs").glob("*")) == before


def test_a_keyword_wins_over_the_alias_in_the_config(lab) -> None:
    values = {**settings("ppo", kl_coef=None), "beta": 0.25}
    found = rlhf_pipeline.ppo(values, home=lab.home, quiet=True, max_steps=1, kl_coef=0.75)
    assert lab.registry.resolve(found["model"]).manifest.config["kl_coef"] == 0.75


def test_collect_and_load(lab) -> None:
    found = rlhf_pipeline.collect(settings("collect"), home=lab.home, quiet=True, num=8)
    assert found["model"] == "collected@v1" and found["metrics"]["records"] <= 8
    model, tokenizer, manifest = rlhf_pipeline.load("reward", home=lab.home)
    assert manifest.stage == "reward" and model.config.num_labels == 1 and not model.training
    model, tokenizer, manifest = rlhf_pipeline.load(lab.registry.resolve("sft").path, home=lab.home)
    stored = lab.weights("sft")
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items() if name in stored)
    assert len(tokenizer) == model.config.vocab_size
    with pytest.raises(UnknownReference):
        rlhf_pipeline.load("nothing", home=lab.home)


def test_an_adapter_is_loaded_on_its_base_with_the_weights_of_the_best_evaluation(lab) -> None:
    pytest.importorskip("peft")
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": "all-linear", "learning_rate": 0.3}
    best = {"eval_steps": 1, "max_steps": 4, "load_best_model_at_end": True, "snapshot_steps": 1}
    result = rlhf_pipeline.sft(settings("sft", **lora, **best), home=lab.home, quiet=True)
    step = result["metrics"]["best"]["step"]
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        found, kept, start = (
            rlhf_pipeline.load(name, home=lab.home).model(ids).logits
            for name in (result["model"], f"{result['model']}#{step}", "sft")
        )
    assert torch.allclose(found, kept, atol=1e-5) and not torch.allclose(found, start, atol=1e-2)


def test_an_experiment_as_a_dict_then_its_results(lab, undrawn) -> None:
    shared = settings("dpo", output_name=None)
    stages = {"first": {"stage": "dpo", **shared}, "second": {"stage": "dpo", **shared, "model_name_or_path": "first"}}
    compare = {"arms": ["first"], "baseline": "sft", "max_prompts": 2, "samples": 2, "exact": False, "use_cpu": True}
    experiment: dict = {"name": "pair", "stages": stages, "compare": compare}
    options = {"home": lab.home, "quiet": True}
    found = rlhf_pipeline.run(experiment, **options, **{"first.beta": 1e-6, "second.max_steps": 1, "seeds": [3]})
    assert {name: entry["model"] for name, entry in found["stages"].items()} == {
        "first": "first@v1",
        "second": "second@v1",
    }
    made = lab.registry.resolve("first").manifest
    assert made.config["beta"] == 1e-6 and made.seed == 3
    assert found["comparison"]["name"] == "pair"
    json.dumps(found, allow_nan=False)
    again = rlhf_pipeline.run(experiment, **options, **{"first.beta": 1e-6, "second.max_steps": 1, "seeds": [3]})
    assert [entry["skipped"] for entry in again["stages"].values()] == [True, True]
    with pytest.raises(ConfigError, match=r"experiment: stages\.first"):
        rlhf_pipeline.run({"name": "x", "stages": {"first": {"stage": "dpp"}}}, **options)
    results = rlhf_pipeline.load(lab.home / "reports" / "pair")
    assert results.name == "pair" and results.rows[0].name
    compared = rlhf_pipeline.compare(
        {"arms": ["first@v1"], "baseline": "sft", "samples": 2, "exact": False, "use_cpu": True},
        name="again",
        max_prompts=2,
        home=lab.home,
        quiet=True,
    )
    assert compared["prompts"] == 2 and (lab.home / "reports" / "again" / "results.json").is_file()


def test_the_example_of_the_readme_runs(lab, monkeypatch, tmp_path, undrawn) -> None:
    """Its code, on the tiny laboratory: the demo's files are replaced by settings of a second."""
    text = README.read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_HOME", str(lab.home))
    for name, stage in (("reward", "train-rm"), ("ppo", "ppo"), ("dpo", "dpo")):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(settings(stage, output_name=name, max_steps=2)))
    example = example.replace("configs/demo/", "").replace(
        '["ppo", "dpo"]', '["ppo", "dpo"], exact=False, use_cpu=True'
    )
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)  # the project's own text
    assert names["results"]["rows"]
