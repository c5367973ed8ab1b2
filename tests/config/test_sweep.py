"""The keys `sweep`, `seeds` and `seed_resamples`: how they are read, overridden and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.grid import expand
from rlhf_pipeline.errors import ConfigError
from tests.config.test_grid import FILES, change, labels, nodes_of


@pytest.fixture
def demo(write) -> Path:
    for name, text in FILES.items():
        path = write(name, text)
    return path.parent / "experiment.yaml"


def refused(path: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, list(overrides))
    return [str(fault).replace(f"{path.parent}/", "") for fault in caught.value.faults]


def test_nested_keys_and_aliases(demo):
    change(demo, "  ppo.kl_coef: [.1, .5]\n", "  ppo.beta: [.2, 1]\n  sft.model_init.hidden_size: [8, 16]\n")
    experiment = load_experiment(demo, ["seeds=[0]"])
    assert not experiment.notes
    nodes = expand(experiment)
    assert [node.spec.config.model_init["hidden_size"] for node in nodes if node.name == "sft"] == [8, 16]
    assert nodes[0].spec.config.model_init["model_type"] == "llama"
    found = [(node.spec.config.kl_coef, node.setting) for node in nodes if node.name == "ppo"]
    assert found == [
        (beta, {"beta": beta, "sft.model_init.hidden_size": size}) for beta in (0.2, 1) for size in (8, 16)
    ]


def test_labels_tell_close_values_apart(demo):
    found = labels(demo, "seeds=[0]", "sweep={}", "sweep.dpo.beta=[0.1234567, 0.1234568]")
    assert found[-2:] == ["dpo beta=0.1234567", "dpo beta=0.1234568"]


@pytest.mark.parametrize(("override", "key"), [("ppo.kl_coef=.3", "ppo.kl_coef"), ("ppo.beta=.3", "ppo.kl_coef")])
def test_an_override_replaces_the_sweep_of_its_key(demo, override, key):
    experiment = load_experiment(demo, [override])
    assert experiment.notes[0] == f"override {override}: replaces the sweep of {key}"
    found = [node for node in expand(experiment) if node.name == "ppo"]
    assert [(node.spec.config.kl_coef, node.seed, node.setting) for node in found] == [(0.3, s, {}) for s in (0, 1, 2)]
    assert len([node for node in expand(experiment) if node.name == "dpo"]) == 6


@pytest.mark.parametrize("override", ["sweep.ppo.kl_coef=[.2, .7, .9]", "sweep.ppo.beta=[.2, .7, .9]"])
def test_an_override_of_the_sweep_changes_one_key_of_it(demo, override):
    nodes = nodes_of(demo, override, "seeds=[0]")
    assert [node.spec.config.kl_coef for node in nodes if node.name == "ppo"] == [0.2, 0.7, 0.9]
    assert [node.spec.config.beta for node in nodes if node.name == "dpo"] == [0.1, 0.5]


def test_an_override_may_begin_a_sweep(demo):
    text = demo.read_text()
    demo.write_text(text[: text.index("sweep:")])
    found = labels(demo, "seeds=[0]", "sweep.dpo.beta=[.2, .4]")
    assert found[-2:] == ["dpo beta=0.2", "dpo beta=0.4"]


def test_all_faults_of_a_sweep_at_once_with_their_lines(demo):
    change(
        demo,
        "  ppo.kl_coef: [.1, .5]\n  dpo.beta: [.1, .5]\n",
        """\
  ppo.kl_coff: [.1]
  dop.beta: [.1]
  dpo.beta:
    - .1
    - -1
    - .1
    - big
  dpo: [1]
  ppo.lam: .9
  ppo.gamma: []
  ppo.seed: [1, 2]
  ppo.output_name: [a, b]
  ppo.logging_steps: [1, 2]
  ppo.load_in_8bit: [true]
  ppo.output_dir: [a]
  ppo.cliprange: [.1]
  sft.learning_rate: [-1, -2]
""",
    )
    assert refused(demo) == [
        "experiment.yaml:12: sweep.ppo.kl_coff: ppo has no such key; did you mean 'kl_coef'?",
        "experiment.yaml:13: sweep.dop.beta: the experiment has no stage 'dop'; "
        "expected stage.key: [value, ...]; did you mean 'dpo'?",
        "experiment.yaml:16: sweep.dpo.beta.1: found -1; expected a number > 0",
        "experiment.yaml:17: sweep.dpo.beta.2: 0.1 is given twice; expected each value once; remove one",
        "experiment.yaml:18: sweep.dpo.beta.3: found 'big'; expected a number",
        "experiment.yaml:19: sweep.dpo: 'dpo' names no key of a stage; expected stage.key: [value, ...]",
        "experiment.yaml:20: sweep.ppo.lam: found 0.9; expected a list of values",
        "experiment.yaml:21: sweep.ppo.gamma: found []; expected a list of values",
        "experiment.yaml:22: sweep.ppo.seed: a seed is not a setting; expected seeds: [...] of the experiment",
        "experiment.yaml:23: sweep.ppo.output_name: points are versions of one name; "
        "expected no sweep of output_name; remove it",
        "experiment.yaml:24: sweep.ppo.logging_steps: logging_steps does not change the result of a run; "
        "expected a key that does; remove it",
        "experiment.yaml:25: sweep.ppo.load_in_8bit: this key is not available yet in this version; remove it",
        "experiment.yaml:26: sweep.ppo.output_dir: output_dir does not change the result of a run; "
        "expected a key that does; remove it",
        "experiment.yaml:28: sweep.sft.learning_rate.0: found -1; expected a number > 0",
        "experiment.yaml:28: sweep.sft.learning_rate.1: found -2; expected a number > 0",
    ]


def test_points_are_checked_as_whole_configs_before_anything_runs(demo):
    overrides = ["sweep={}", "sweep.ppo.rollout_batch_size=[64, 96]", "sweep.ppo.num_mini_batches=[4, 5]"]
    messages = refused(demo, *overrides, "ppo.per_device_train_batch_size=1")
    assert messages == [
        f"override sweep.ppo.num_mini_batches=[4, 5]: rollout_batch_size {size} is not a multiple of "
        "num_mini_batches 5; expected a divisor of rollout_batch_size"
        for size in (64, 96)
    ]


def test_values_that_mean_the_same_are_given_twice(demo):
    messages = refused(demo, "sweep={}", "sweep.dpo.loss_type=[ipo, [ipo]]", "sweep.dpo.beta=[1, 1.0, 2]")
    assert messages == [
        "override sweep.dpo.beta=[1, 1.0, 2]: 1.0 is given twice; expected each value once; remove one",
        "override sweep.dpo.loss_type=[ipo, [ipo]]: ['ipo'] is given twice; expected values that differ; remove one",
    ]


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("ppo.kl_coef: [.1]", "ppo.beta: [.2]", "sweep.ppo.beta: the same key as ppo.kl_coef"),
        (
            "sft.model_init: [{model_type: llama}]",
            "sft.model_init.hidden_size: [8]",
            "sweep.sft.model_init.hidden_size: the same key as sft.model_init",
        ),
    ],
)
def test_a_key_swept_twice(demo, first, second, expected):
    change(demo, "  ppo.kl_coef: [.1, .5]\n  dpo.beta: [.1, .5]\n", f"  {first}\n  {second}\n")
    (message,) = refused(demo)
    assert message.startswith(f"experiment.yaml:13: {expected}; expected one of the two")


def test_swept_links_are_checked_like_all_others(demo):
    (message,) = refused(demo, "sweep={}", "sweep.ppo.reward_model_path=[reward, sft]")
    assert "the stage 'sft' is a sft stage, which does not make a reward model" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seeds=[1, 2, 1]", "1 is given twice; expected each seed once"),
        (
            "seed_resamples=dpo",
            "found 'dpo'; expected arms, all, or a list of stages; write [dpo] for this stage only",
        ),
        ("seed_resamples=[]", "found []; expected arms, all, or a list of stages"),
        ("seed_resamples=3", "found 3; expected arms, all, or a list of stages"),
        (
            "seed_resamples=[dpo, pop]",
            "there is no stage 'pop'; expected stages of this experiment: sft, pairs, judge, reward, ppo, dpo; "
            "did you mean 'ppo'",
        ),
    ],
)
def test_faults_of_seeds(demo, override, expected):
    (message,) = refused(demo, override)
    assert message.startswith(f"override {override}: {expected}")


def test_notes_of_a_swept_stage_come_once(demo):
    change(demo, "  dpo:    {stage: dpo, ", "  dpo:    {stage: dpo, torch_dtype: float32, ")
    notes = load_experiment(demo, ["sweep.dpo.warmup_ratio=[.1, .2]"]).notes
    assert [note.split(": ", 1)[1] for note in notes] == ["stages.dpo.torch_dtype: an old name of dtype"]
