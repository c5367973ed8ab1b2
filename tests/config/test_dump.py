from __future__ import annotations

import pytest

from rlhf_pipeline.config.dump import config_digest, dump_yaml
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.stages import SCHEMAS

RICH = {
    "ppo": {"snapshot_steps": [1, 2], "warmup_steps": 3, "split_fractions": {"train": 0.9, "test": 0.1}},
    "dpo": {"output_name": "1e5", "warmup_steps": 0.1, "eval_steps": 4},
    "evaluate": {"best_of": [1, 4]},
}


@pytest.mark.parametrize("stage", SCHEMAS)
def test_a_dumped_config_reads_back_equal_and_with_the_same_digest(load, write, stage):
    config = load(stage, **RICH.get(stage, {}))
    again = load_config(stage, write("config.yaml", dump_yaml(config))).config
    assert again == config
    assert config_digest(again) == config_digest(config)


def test_the_digest_ignores_how_a_run_is_watched(load):
    digest = config_digest(load("sft"))
    assert len(digest) == 64
    watched = {"logging_steps": 3, "save_steps": 5, "save_total_limit": 1, "num_threads": 2}
    assert config_digest(load("sft", **watched)) == digest
    for changes in ({"seed": 1}, {"output_name": "other"}, {"learning_rate": 3e-5}, {"max_length": 1024}):
        assert config_digest(load("sft", **changes)) != digest


def test_the_digest_knows_the_stage(load):
    assert config_digest(load("evaluate")) != config_digest(load("compare"))


def test_defaults_that_are_written_out_do_not_change_the_digest(load):
    digest = config_digest(load("ppo"))
    assert config_digest(load("ppo", value_init="reward_model", gradient_accumulation_steps=2)) == digest
    assert config_digest(load("ppo", warmup_steps=0.0, stop_token="eos")) == digest
