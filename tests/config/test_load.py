from __future__ import annotations

import subprocess
import sys

import pytest

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import BadInput, ConfigError

DPO = "model_name_or_path: sft\ndataset_name: org/data\noutput_name: dpo\nbeta: .2\n"


def refused(*args, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(*args, **kwargs)
    return [str(fault) for fault in caught.value.faults]


def test_file_then_extra_then_overrides(write):
    path = write("dpo.yaml", DPO)
    config = load_config("dpo", path, ["beta=.4", "seed=3"], extra={"seed": 2, "model_name_or_path": "sft@v2"}).config
    assert (config.beta, config.seed, config.model_name_or_path, config.dataset_name) == (
        0.4,
        3,
        "sft@v2",
        "org/data",
    )


def test_overrides_reach_into_mappings_and_lists(load, valid):
    values = {**valid["ppo"], "reward_functions": [{"source": "world", "weight": 1}]}
    del values["reward_model_path"]
    config = load_config("ppo", None, ["reward_functions.0.weight=2"], extra=values).config
    assert config.reward_functions[0].weight == 2
    overrides = ["split_fractions.train=.7", "split_fractions.test=.18"]
    config = load_config("dpo", None, overrides, extra=valid["dpo"]).config
    assert config.split_fractions == {"train": 0.7, "judge": 0.08, "validation": 0.04, "test": 0.18}
    overrides = ["model_init.model_type=llama", "tokenizer_init=world", "model_name_or_path=null"]
    assert load_config("sft", None, overrides, extra=valid["sft"]).config.model_init == {"model_type": "llama"}


def test_an_override_inside_does_not_change_the_defaults(valid):
    load_config("dpo", None, ["split_fractions.train=.7", "split_fractions.test=.18"], extra=valid["dpo"])
    assert load_config("dpo", None, extra=valid["dpo"]).config.split_fractions["train"] == 0.8


def test_overrides_that_are_none(valid):
    messages = refused("dpo", None, ["seed", "=3", "beta=[1", "seed.x=1", "datasets.5=a"], extra=valid["dpo"])
    for expected in (
        "override seed: not an override; expected key=value; write seed=VALUE",
        "override =3: not an override; expected key=value",
        "override beta=[1: the value is not YAML",
        "override seed.x=1: found {'x': 1}; expected a whole number",
        "override datasets.5=a: found {5: 'a'}; expected a list",
    ):
        assert any(message.startswith(expected) for message in messages)


def test_all_faults_at_once_in_the_order_of_their_lines(write):
    path = write(
        "dpo.yaml",
        "output_name: dpo\nbeta: -0.1\nlearning_rte: 1e-5\nlearning_rate: 0\nlr_scheduler_type: liner\n"
        "max_length: 10\nmax_prompt_length: 5\nresponse_length: 6\nsplit_fractions: {train: .5, test: .6}\n",
    )
    assert refused("dpo", path, ["seed=x"]) == [
        f"{path}:2: beta: found -0.1; expected a number > 0",
        f"{path}:3: learning_rte: dpo has no such key; did you mean 'learning_rate'?",
        f"{path}:4: learning_rate: found 0; expected a number > 0",
        f"{path}:5: lr_scheduler_type: found 'liner'; "
        "expected one of linear, cosine, constant, constant_with_warmup, cosine_with_restarts, polynomial, "
        "inverse_sqrt, cosine_with_min_lr, cosine_warmup_with_min_lr, warmup_stable_decay, reduce_lr_on_plateau, "
        "greedy; did you mean 'linear'?",
        f"{path}:6: max_length: max_prompt_length 5 + response_length 6 is not max_length 10; "
        "expected max_length 11; give two of the three lengths; they determine the third",
        f"{path}:9: split_fractions: the fractions sum to 1.1; expected a sum of 1",
        f"{path}: model_name_or_path: missing; expected the model to start from: name, directory or hub id",
        f"{path}: dataset_name: missing; expected dataset_name: SOURCE, or datasets: for a mixture",
        "override seed=x: found 'x'; expected a whole number",
    ]


def test_checks_between_fields_skip_fields_that_are_wrong_by_themselves(valid):
    extra = {**valid["ppo"], "num_mini_batches": 0, "rollout_batch_size": 7}
    assert refused("ppo", None, extra=extra) == ["ppo: num_mini_batches: found 0; expected a number >= 1"]


def test_an_unreadable_file_is_not_followed_by_missing_keys(tmp_path):
    (message,) = refused("dpo", tmp_path / "absent.yaml")
    assert message == f"{tmp_path / 'absent.yaml'}: there is no such file; expected a YAML file"


def test_a_duplicate_key_stops_with_its_line(write):
    path = write("dpo.yaml", DPO + "beta: .3\n")
    (message,) = refused("dpo", path)
    assert message.startswith(f"{path}:5: beta: given twice, first on line 4")


def test_an_unknown_stage():
    assert refused("train_rm", None)[0].endswith("did you mean 'train-rm'?")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("seed", True, "a number or text, not true or false"),
        ("dtype", True, "one of float32, bfloat16, float16, auto"),
        ("split_fractions", True, "a mapping"),
        ("datasets", True, "a list"),
        ("seed", 1.5, "a whole number"),
        ("seed", -1, "a number >= 0"),
        ("learning_rate", None, "a number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", "fast", "a number"),
        ("bf16", "maybe", "true or false"),
        ("output_name", "a b", "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"),
        ("output_name", "../up", "1 to 64 letters, digits, '.', '_' or '-', the first a letter or digit"),
        ("output_name", 7, "text"),
        ("model_name_or_path", "", "text that is not empty"),
        ("split_fractions", [1], "a mapping"),
        ("split_fractions", {"train": "x"}, "a number"),
        ("datasets", [], "at least one entry"),
        ("snapshot_steps", [0], "a whole number >= 1 (every n steps) or a list of them (at these steps)"),
        ("warmup_steps", 1.5, "a whole number of steps, or a fraction below 1 of all steps"),
    ],
)
def test_what_was_expected_is_said(valid, key, value, expected):
    with pytest.raises(ConfigError) as caught:
        load_config("dpo", None, extra={**valid["dpo"], key: value})
    fault = next(fault for fault in caught.value.faults if fault.where.startswith(f"dpo: {key}"))
    assert fault.expected == expected


def test_a_faulty_entry_of_a_list_is_one_fault(valid):
    extra = {**valid["dpo"], "dataset_name": None, "datasets": [{"dataset_nam": "x", "dataset_name": "y"}]}
    assert refused("dpo", None, extra=extra) == [
        "dpo: datasets.0.dataset_nam: there is no such key; did you mean 'dataset_name' or 'dataset_config'?"
    ]


def test_local_files_are_found_from_here_and_from_the_config_folder(write, tmp_path, monkeypatch):
    write("configs/rows.jsonl", "{}")
    path = write("configs/dpo.yaml", DPO.replace("org/data", "rows.jsonl"))
    monkeypatch.chdir(tmp_path)
    assert load_config("dpo", "configs/dpo.yaml").config.dataset_name == "configs/rows.jsonl"
    write("rows.jsonl", "{}")
    assert load_config("dpo", path).config.dataset_name == "rows.jsonl"
    assert load_config("dpo", path, [f"dataset_name={tmp_path}/rows.jsonl"]).config.dataset_name == str(
        tmp_path / "rows.jsonl"
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dataset_name", "absent.jsonl"),
        ("dataset_name", "absent.jsonl.gz"),
        ("dataset_name", "./absent"),
        ("datasets", [{"dataset_name": "absent.csv"}]),
        ("model_name_or_path", "../absent"),
        ("ref_model", "/absent"),
    ],
)
def test_local_paths_that_do_not_exist(valid, key, value):
    extra = {**valid["dpo"], key: value}
    if key == "datasets":
        del extra["dataset_name"]
    (message,) = refused("dpo", None, extra=extra)
    assert "there is no " in message and "looked for" in message


@pytest.mark.parametrize("source", ["imdb", "org/name", "collected:pairs@v1", "world:verdicts"])
def test_sources_that_are_not_local_paths_are_left_alone(load, source):
    assert load("ppo", dataset_name=source).dataset_name == source


def test_an_error_is_bad_input():
    with pytest.raises(BadInput) as caught:
        load_config("dpo", None)
    assert caught.value.exit_code == 2


def test_nothing_heavy_is_imported():
    code = (
        "import sys, rlhf_pipeline.config\n"
        "heavy = {'torch', 'transformers', 'datasets', 'trl', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("experiment", {"seed_resamples": "\ud800"}),  # quoted in an error of pydantic's, which takes no half pairs
        ("dpo", {"\ud800": 1}),
        ("dpo", {"output_name": "\udce9"}),
        ("dpo", {"split_fractions": {"²": -1.0, "train": 2.0}}),  # a digit that `int` refuses, in a dotted key
        ("compare", {"prompts": "./" + "x" * 5000}),
    ],
)
def test_awkward_characters_are_faults_like_others(valid, stage, changes):
    messages = refused(stage, None, extra={**valid[stage], **changes})
    assert all(message.encode() for message in messages)
