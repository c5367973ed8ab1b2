"""A config declares which models and data its stage comes from; the manifest, what is done and the dry run agree."""

from __future__ import annotations

import json

import pytest

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.mentions import mentions
from rlhf_pipeline.config.stages import STAGES
from rlhf_pipeline.errors import UnknownReference
from rlhf_pipeline.experiment.done import expected_data, find_done
from rlhf_pipeline.experiment.estimate import estimate_stage
from tests.conftest import TINY_LLAMA

WORLD, PAIRS = "world:verdicts", "collected:pairs@v1"
SCRATCH = {"model_name_or_path": None, "model_init": TINY_LLAMA, "tokenizer_init": {"type": "world"}}
TWO = [{"dataset_name": "collected:pairs"}, {"dataset_name": WORLD, "dataset_config": "prompts"}]
REWARDS = [{"source": name} for name in ("reward", "world", "second")]
BASE, BOTH = {"base": "sft@v1"}, {"base": "sft@v1", "reference": "sft@v1"}
CASES = {
    "fresh sft": ("sft", {**SCRATCH, "dataset_name": WORLD}, {}, [WORLD]),
    "sft": ("sft", {"dataset_name": WORLD}, BASE, [WORLD]),
    "reward model": ("train-rm", {"reward_centering": "none"}, BASE, [PAIRS]),
    "dpo": ("dpo", {}, BOTH, [PAIRS]),
    "dpo, another reference": ("dpo", {"ref_model": "other"}, BASE | {"reference": "other@v1"}, [PAIRS]),
    "dpo, fresh pairs": (
        "dpo",
        {"dataset_name": WORLD, "max_train_samples": 1, "response_length": 2},
        BOTH,
        [f"{WORLD} population (mixture)"],
    ),
    "ppo": ("ppo", {}, BOTH | {"reward_model": "reward@v1"}, [PAIRS]),
    "ppo, a function": ("ppo", {"reward_model_path": None, "reward_functions": ["world"]}, BOTH, [PAIRS]),
    "ppo, several rewards, a judge, a mixture": (
        "ppo",
        {
            "reward_model_path": None,
            "reward_functions": REWARDS,
            "judge": "third",
            "dataset_name": None,
            "datasets": TWO,
            "value_init": "sft",
        },
        BOTH | {"reward_model": "reward@v1", "reward_model_2": "second@v1", "judge": "third@v1"},
        [PAIRS, WORLD],
    ),
    "collect": ("collect", {}, {"policy": "sft@v1"}, [WORLD]),
    "collect, a reward model": ("collect", {"judge": "reward"}, {"policy": "sft@v1", "judge": "reward@v1"}, [WORLD]),
}


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """The tiny laboratory with another policy and two more reward models."""
    lab = tiny.copy(tmp_path_factory.mktemp("several") / "home")
    lab.run("sft", output_name="other", max_steps=1)
    for seed, name in enumerate(("second", "third"), start=1):
        lab.run("train-rm", output_name=name, max_steps=1, seed=seed, reward_centering="none")
    return lab


def test_every_stage_has_a_case():
    assert {stage for stage, *_ in CASES.values()} == set(STAGES)


@pytest.mark.check
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_manifest_has_the_parents_and_data_that_its_config_declares(several, case):
    stage, changes, parents, sources = CASES[case]
    changes = {"output_name": f"made{list(CASES).index(case)}"} | changes
    changes |= {"num": 8} if stage == "collect" else {"max_steps": 1}
    config = several.config(stage, **changes)
    registry = several.registry

    declared = {role: registry.resolve(named.reference).label for role, named in config.parents().items()}
    assert declared == parents
    told = estimate_stage(config, several.home)
    shown = {"base": "model"}
    assert {role: told[shown.get(role, role)] for role in parents if role != "reference"} == {
        role: label for role, label in parents.items() if role != "reference"
    }
    found = list(mentions(config))
    assert {named.reference for named in config.parents().values()} == {m.text for m in found if m.role != "data"}
    files = {m.text for m in found if m.role == "data"}
    assert {source.source for source in config.sources()} - {WORLD} == files

    made = several.run(stage, **changes)
    name = made.model if stage != "collect" else f"collected:{made.model}"
    resolved = registry.resolve_data(made.model) if stage == "collect" else registry.resolve(name)
    manifest = resolved.manifest
    assert {role: parent.ref for role, parent in manifest.parents.items()} == parents
    assert list(dict.fromkeys(entry.source for entry in manifest.data)) == sources
    assert [entry.digest for entry in manifest.data] == expected_data(config, several.home)
    assert find_done(config, registry).label == made.model


def test_a_dry_run_looks_for_every_model_of_a_config(lab):
    for stage, key in (("dpo", "ref_model"), ("ppo", "judge"), ("collect", "judge")):
        with pytest.raises(UnknownReference, match="nowhere"):
            estimate_stage(lab.config(stage, **{key: "nowhere"}), lab.home)


def test_a_part_of_a_source_is_that_of_its_own_entry():
    datasets = [{"dataset_name": "org/a", "dataset_config": "en"}, {"dataset_name": "org/b"}]
    values = {"model_name_or_path": "org/model", "output_name": "x", "datasets": datasets}
    config = load_config("sft", None, extra=values).config
    found = {mention.text: mention.part for mention in mentions(config) if mention.role == "data"}
    assert found == {"org/a": "en", "org/b": None}
    assert config.sources() == [("org/a", "en", None, (), None), ("org/b", None, None, (), None)]


def test_paths_of_exact_figures_are_looked_for_beside_their_file(tmp_path, monkeypatch):
    (tmp_path / "configs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "configs" / "exact.yaml"
    file.write_text(json.dumps({"reward": "./model", "long_run": "./model"}))
    config = load_config("exact", file).config
    assert config.reward == config.long_run == str(tmp_path / "configs" / "model")
