"""Keys of TRL and alignment-handbook that stand for several keys."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.foreign.table import name_of

BASE = {"model_name_or_path": "sft", "output_name": "model"}


def load(stage: str, **values):
    return load_config(stage, None, extra={**BASE, **values})


def entries(config) -> list[tuple]:
    return [(entry.dataset_name, entry.dataset_config, entry.split, entry.fraction) for entry in config.datasets]


def test_a_mixer_of_one_source_is_that_source():
    loaded = load("dpo", dataset_mixer={"org/a": 1.0}, dataset_splits=["train_prefs", "test_prefs"])
    config = loaded.config
    assert (config.dataset_name, config.dataset_train_split, config.dataset_test_split, config.datasets) == (
        "org/a",
        "train_prefs",
        "test_prefs",
        None,
    )
    assert loaded.notes == ("dpo: dataset_mixer: read as dataset_train_split, dataset_test_split, dataset_name",)


def test_a_mixer_of_several_sources_joins_their_fractions():
    mixer = {"org/a": 0.5, "org/b": 1}
    config = load("dpo", dataset_mixer=mixer, dataset_configs=["en", None]).config
    assert entries(config) == [("org/a", "en", None, 0.5), ("org/b", None, None, 1.0)]
    assert (config.dataset_train_split, config.dataset_test_split) == ("train", "test")


def test_a_mixer_without_a_test_split_trains_on_the_whole_split():
    config = load("sft", dataset_mixer={"org/a": 1.0}, dataset_splits=["train"], dataset_configs=["tiny"]).config
    assert entries(config) == [("org/a", "tiny", "train", 1.0)]


def test_a_mixture_names_splits_and_shares():
    sources = [{"id": "org/a", "config": "en", "split": "train_sft", "columns": ["messages"], "weight": 0.25}]
    given = {"datasets": [*sources, {"id": "org/b"}], "test_split_size": 100, "seed": 0}
    config = load("sft", dataset_mixture=given, eval_strategy="epoch").config
    assert entries(config) == [("org/a", "en", "train_sft", 0.25), ("org/b", None, "train", 1.0)]
    assert config.test_split_size == 100


def test_the_sources_of_trl():
    config = load("sft", datasets=[{"path": "org/a", "name": "en", "split": "train[:9]"}, {"path": "org/b"}]).config
    assert entries(config) == [("org/a", "en", "train[:9]", 1.0), ("org/b", None, "train", 1.0)]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"dataset_mixer": ["org/a"]}, "dataset_mixer"),
        ({"dataset_mixer": {"org/a": 1}, "dataset_splits": ["train", "dev"]}, "dataset_splits"),
        ({"dataset_mixer": {"org/a": 1}, "dataset_splits": ["train_a", "train_b"]}, "dataset_splits"),
        ({"dataset_mixer": {"org/a": 1}, "dataset_configs": ["a", "b"]}, "dataset_configs"),
        ({"dataset_mixture": {"sources": []}}, "dataset_mixture"),
        ({"dataset_mixture": {"datasets": ["org/a"]}}, "dataset_mixture"),
        ({"dataset_mixture": {"datasets": [{"id": "org/a"}], "shuffle": True}}, "dataset_mixture"),
    ],
)
def test_a_shorthand_of_another_form_is_refused(faults, values, key):
    assert faults("sft", dataset_name=None, **values)[key].found == "found another form"


def test_a_fraction_is_at_most_one_and_excludes_weights(faults):
    assert "datasets.0.fraction" in faults("sft", dataset_name=None, datasets=[{"dataset_name": "a", "fraction": 1.5}])
    mixed = [{"dataset_name": "a", "fraction": 0.5}, {"dataset_name": "b", "weight": 2}]
    assert "fractions or weights" in faults("sft", dataset_name=None, datasets=mixed)["datasets.1.weight"].expected


def test_evaluation_needs_rows_that_are_not_trained_on(faults):
    whole = [{"dataset_name": "a", "split": "train"}]
    refused = faults("sft", dataset_name=None, datasets=whole, eval_strategy="epoch")
    assert "test_split_size" in refused["eval_strategy"].expected


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("data/zephyr-7b-dpo-full", "zephyr-7b-dpo-full"),
        ("saves/llama3 8b/lora+sft/", "lora-sft"),
        ("C:\\models\\new", "new"),
        ("/", ""),
        ("..", ""),
        ("x" * 80, "x" * 64),
    ],
)
def test_the_name_that_a_folder_gives(folder, name):
    assert name_of(folder) == name


def test_the_output_folder_gives_the_name_unless_there_is_one():
    without = {"model_name_or_path": "sft", "dataset_name": "org/a"}
    assert load_config("dpo", None, extra={**without, "output_dir": "out/mine"}).config.output_name == "mine"
    assert load("dpo", dataset_name="org/a", output_dir="out/mine").config.output_name == "model"


def test_the_rollout_of_trl_follows_from_its_batch_keys():
    ppo = {"dataset_name": "org/a", "reward_model_path": "rm", "total_episodes": 640}
    batch = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "num_mini_batches": 2}
    loaded = load("ppo", **ppo, **batch)
    assert (loaded.config.rollout_batch_size, loaded.config.gradient_accumulation_steps) == (32, 8)
    assert "rollout_batch_size is 2 x 8 x num_mini_batches 2 = 32" in loaded.notes[0]
    assert load("ppo", **ppo, gradient_accumulation_steps=2).config.rollout_batch_size == 64


def test_flash_attention_2_by_its_old_name():
    assert load("sft", dataset_name="a", use_flash_attention_2=True).config.attn_implementation == "flash_attention_2"
    assert load("sft", dataset_name="a", use_flash_attention_2=False).config.attn_implementation is None


@pytest.mark.parametrize(("value", "kept"), [(100, 100), (0.5, 0.5), (2.0, 2)])
def test_cadences_are_steps_or_fractions(value, kept):
    assert load("sft", dataset_name="a", save_steps=value).config.save_steps == kept


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "x"])
def test_a_cadence_is_positive(faults, value):
    for key in ("save_steps", "eval_steps", "test_split_size"):
        assert key in faults("sft", **{key: value})
