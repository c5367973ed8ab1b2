"""Seeds and sweeps: the runs that an experiment comes to, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.grid import Experiment, Node, StageSpec, expand, resampled
from rlhf_pipeline.config.sft import SftConfig

FILES = {
    "experiment.yaml": """\
name: demo
seeds: [0, 1, 2]
stages:
  sft:    {stage: sft, config: sft.yaml}
  pairs:  {stage: collect, config: pairs.yaml, policy: sft}
  judge:  {stage: train-rm, model_name_or_path: sft, dataset_name: pairs, dataset_train_split: judge, seed: 99}
  reward: {stage: train-rm, model_name_or_path: sft, dataset_name: pairs}
  ppo:    {stage: ppo, config: ppo.yaml, model_name_or_path: sft, reward_model_path: reward, dataset_name: pairs}
  dpo:    {stage: dpo, model_name_or_path: sft, dataset_name: pairs}
compare:  {arms: [ppo, dpo], baseline: sft}
sweep:
  ppo.kl_coef: [.1, .5]
  dpo.beta: [.1, .5]
""",
    "sft.yaml": "dataset_name: world:verdicts\nmodel_init: {model_type: llama}\ntokenizer_init: world\n",
    "pairs.yaml": "prompts: world:verdicts\njudge: world\nnum: 100\n",
    "ppo.yaml": "total_episodes: 640\n",
}


@pytest.fixture
def demo(write) -> Path:
    for name, text in FILES.items():
        path = write(name, text)
    return path.parent / "experiment.yaml"


def nodes_of(path: Path, *overrides: str) -> tuple[Node, ...]:
    return expand(load_experiment(path, list(overrides)))


def labels(path: Path, *overrides: str) -> list[str]:
    return [node.label for node in nodes_of(path, *overrides)]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_is_shared_comes_first_then_seed_by_seed(demo):
    expected = ["sft", "pairs", "judge"]
    for seed in (0, 1, 2):
        expected.append(f"reward seed {seed}")
        expected += [f"ppo beta={beta} seed {seed}" for beta in (0.1, 0.5)]
        expected += [f"dpo beta={beta} seed {seed}" for beta in (0.1, 0.5)]
    assert labels(demo) == expected
    assert resampled(nodes_of(demo)) == ("reward", "ppo", "dpo")


def test_every_run_has_its_own_config_and_comes_from_runs_before_it(demo):
    nodes = nodes_of(demo)
    assert [node.spec.config.seed for node in nodes] == [0, 0, 99, *[0] * 5, *[1] * 5, *[2] * 5]
    # sft 0, pairs 1, judge 2, and for the seed s: reward 3 + 5 s, ppo 4 + 5 s, 5 + 5 s, dpo 6 + 5 s, 7 + 5 s
    assert nodes[1].inputs == {"sft": 0} and nodes[2].inputs == {"sft": 0, "pairs": 1}
    for seed in (0, 1, 2):
        start = 3 + 5 * seed
        assert nodes[start].inputs == {"sft": 0, "pairs": 1}
        for offset, beta in ((1, 0.1), (2, 0.5)):
            ppo, dpo = nodes[start + offset], nodes[start + offset + 2]
            assert ppo.inputs == {"sft": 0, "reward": start, "pairs": 1} and ppo.spec.config.kl_coef == beta
            assert dpo.inputs == {"sft": 0, "pairs": 1} and dpo.spec.config.beta == beta
            assert ppo.setting == dpo.setting == {"beta": beta} and ppo.seed == dpo.seed == seed
    assert all(node.spec.config.output_name == node.name for node in nodes)


def test_links_become_the_outputs_of_the_very_runs(demo):
    nodes = nodes_of(demo)
    outputs = {place: f"{node.name}@v{place}" for place, node in enumerate(nodes)}
    config = nodes[10].resolved(outputs)  # ppo, beta .5, seed 1
    assert (config.model_name_or_path, config.reward_model_path, config.dataset_name) == (
        "sft@v0",
        "reward@v8",
        "pairs@v1",
    )
    assert (config.kl_coef, config.seed) == (0.5, 1)
    with pytest.raises(KeyError):
        nodes[10].resolved({0: "sft@v0"})


def test_one_seed_without_a_sweep_is_one_run_of_each_stage(demo):
    nodes = nodes_of(demo, "seeds=[4]", "sweep={}")
    assert [node.label for node in nodes] == ["sft", "pairs", "judge", "reward", "ppo", "dpo"]
    assert {node.seed for node in nodes} == {None} and resampled(nodes) == ()
    assert [node.spec.config.seed for node in nodes] == [4, 4, 99, 4, 4, 4]
    change(demo, "seeds: [0, 1, 2]\n", "")
    assert labels(demo) == [
        "sft",
        "pairs",
        "judge",
        "reward",
        *(f"{a} beta={b}" for a in ("ppo", "dpo") for b in (0.1, 0.5)),
    ]


@pytest.mark.parametrize(
    ("resamples", "again", "seeds_of_second"),
    [
        ("arms", ["reward", "ppo", "dpo"], [1, 1, 1]),
        ("all", ["sft", "pairs", "judge", "reward", "ppo", "dpo"], [1, 1, 99, 1, 1, 1]),
        ("[dpo]", ["dpo"], [1]),
        ("[reward]", ["reward", "ppo"], [1, 1]),  # ppo is trained on the reward model
        ("[judge, dpo]", ["judge", "dpo"], [1, 1]),  # listed by name, the judge gives up its own seed
        ("[pairs]", ["pairs", "judge", "reward", "ppo", "dpo"], [1, 99, 1, 1, 1]),  # its input differs, its seed stays
    ],
)
def test_what_a_seed_draws_anew(demo, resamples, again, seeds_of_second):
    nodes = nodes_of(demo, "seeds=[0, 1]", "sweep={}", f"seed_resamples={resamples}")
    assert list(resampled(nodes)) == again
    shared = [name for name in ("sft", "pairs", "judge", "reward", "ppo", "dpo") if name not in again]
    assert [node.name for node in nodes] == [*shared, *again, *again]
    assert [node.seed for node in nodes] == [*[None] * len(shared), *[0] * len(again), *[1] * len(again)]
    assert [node.spec.config.seed for node in nodes[-len(again) :]] == seeds_of_second
    for node in nodes:
        assert {nodes[place].seed for place in node.inputs.values()} <= {None, node.seed}


def test_a_seed_by_override_is_kept(demo):
    nodes = nodes_of(demo, "dpo.seed=7", "sweep={}")
    assert [node.spec.config.seed for node in nodes if node.name == "dpo"] == [7]
    assert resampled(nodes) == ("reward", "ppo")


def test_two_keys_of_one_stage_are_crossed(demo):
    change(demo, "  dpo.beta: [.1, .5]", "  dpo.beta: [.1, .5]\n  dpo.learning_rate: [1e-5, 1e-4, 1e-3]")
    found = [node for node in nodes_of(demo, "seeds=[0]") if node.name == "dpo"]
    grid = [(beta, rate) for beta in (0.1, 0.5) for rate in (1e-5, 1e-4, 1e-3)]
    assert [(node.spec.config.beta, node.spec.config.learning_rate) for node in found] == grid
    assert [node.setting for node in found] == [{"beta": beta, "learning_rate": rate} for beta, rate in grid]
    assert found[0].label == "dpo beta=0.1 learning_rate=1e-05"
    assert len([node for node in nodes_of(demo, "seeds=[0]") if node.name == "ppo"]) == 2


def test_what_comes_from_a_swept_stage_is_replicated(demo):
    nodes = nodes_of(demo, "seeds=[0]", "sweep={}", "sweep.pairs.num=[50, 100]", "sweep.ppo.kl_coef=[.1, .5]")
    assert [node.label for node in nodes] == [
        "sft",
        "pairs num=50",
        "pairs num=100",
        "judge pairs.num=50",
        "judge pairs.num=100",
        "reward pairs.num=50",
        "reward pairs.num=100",
        "ppo beta=0.1 pairs.num=50",
        "ppo beta=0.1 pairs.num=100",
        "ppo beta=0.5 pairs.num=50",
        "ppo beta=0.5 pairs.num=100",
        "dpo pairs.num=50",
        "dpo pairs.num=100",
    ]
    # Both inputs of ppo come from the same pairs.
    assert [node.inputs["pairs"] for node in nodes if node.name == "ppo"] == [1, 2, 1, 2]
    assert [node.inputs["reward"] for node in nodes if node.name == "ppo"] == [5, 6, 5, 6]
    assert nodes[7].setting == {"beta": 0.1, "pairs.num": 50}


def test_a_sweep_over_stages_links_each_point_to_its_own(demo):
    nodes = nodes_of(demo, "seeds=[0, 1]", "sweep={}", "sweep.ppo.reward_model_path=[reward, judge, org/model]")
    assert [node.label for node in nodes if node.name == "ppo"] == [
        "ppo reward_model_path=reward seed 0",
        "ppo reward_model_path=judge seed 0",
        "ppo reward_model_path=org/model seed 0",
        "ppo reward_model_path=reward seed 1",
        "ppo reward_model_path=judge seed 1",
        "ppo reward_model_path=org/model seed 1",
    ]
    inputs = [node.inputs for node in nodes if node.name == "ppo"]
    assert [nodes[i["reward"]].seed for i in inputs if "reward" in i] == [0, 1]
    assert [nodes[i["judge"]].seed for i in inputs if "judge" in i] == [None, None]
    assert inputs[2] == {"sft": 0, "pairs": 1}


def test_runs_with_the_same_config_and_inputs_are_one(demo):
    config = SftConfig(model_name_or_path="a/b", dataset_name="imdb", output_name="sft", learning_rate=1e-5)
    specs = [StageSpec("sft", "sft", config, {}, {"value": value}) for value in (1, 2)]
    (node,) = expand(Experiment("e", demo, (), (specs[0],), swept={"sft": tuple(specs)}))
    assert node.setting == {"value": 1}
