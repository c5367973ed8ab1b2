from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.errors import ConfigError

FILES = {
    "experiment.yaml": """\
name: demo
seeds: [3]
stages:
  sft:    {stage: sft,      config: sft.yaml}
  pairs:  {stage: collect,  config: pairs.yaml, policy: sft}
  reward: {stage: train-rm, config: reward.yaml, model_name_or_path: sft, dataset_name: pairs}
  ppo: {stage: ppo, config: ppo.yaml, model_name_or_path: sft, reward_model_path: reward, dataset_name: pairs}
  dpo:    {stage: dpo,      config: dpo.yaml, model_name_or_path: sft, dataset_name: pairs}
compare:  {arms: [ppo, dpo], baseline: sft, config: compare.yaml}
""",
    "sft.yaml": "dataset_name: world:verdicts\nmodel_init: {model_type: llama}\ntokenizer_init: world\n",
    "pairs.yaml": "prompts: world:verdicts\njudge: world\nnum: 100\n",
    "reward.yaml": "learning_rate: 1e-4\nseed: 9\n",
    "ppo.yaml": "total_episodes: 640\noutput_name: ppo-demo\n",
    "dpo.yaml": "beta: .1\n",
    "compare.yaml": "samples: 2\n",
}


@pytest.fixture
def demo(write) -> Path:
    for name, text in FILES.items():
        path = write(name, text)
    return path.parent / "experiment.yaml"


def refused(path: Path, *overrides: str, **kwargs) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_experiment(path, list(overrides), **kwargs)
    return [str(fault).replace(f"{path.parent}/", "") for fault in caught.value.faults]


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_stages_in_order_with_their_links(demo):
    experiment = load_experiment(demo)
    assert (experiment.name, experiment.seeds) == ("demo", (3,))
    assert [(spec.name, spec.stage) for spec in experiment.stages] == [
        ("sft", "sft"),
        ("pairs", "collect"),
        ("reward", "train-rm"),
        ("ppo", "ppo"),
        ("dpo", "dpo"),
    ]
    ppo = experiment.stages[3]
    assert ppo.links == {
        ("model_name_or_path",): "sft",
        ("reward_model_path",): "reward",
        ("dataset_name",): "pairs",
    }
    assert experiment.compare.links == {("arms", 0): "ppo", ("arms", 1): "dpo", ("baseline",): "sft"}


def test_names_and_seeds_of_the_stages(demo):
    experiment = load_experiment(demo)
    names = [spec.config.output_name for spec in experiment.stages]
    assert names == ["sft", "pairs", "reward", "ppo-demo", "dpo"]
    assert {spec.config.seed for spec in experiment.stages} == {3}
    assert (experiment.compare.config.name, experiment.compare.config.samples) == ("demo", 2)
    change(demo, "seeds: [3]\n", "")
    experiment = load_experiment(demo)
    assert [spec.config.seed for spec in experiment.stages] == [0, 0, 9, 0, 0]


def test_stages_that_share_a_file_have_their_own_names(demo):
    links = "model_name_or_path: sft, reward_model_path: reward, dataset_name: pairs"
    again = f"  again: {{stage: ppo, config: ppo.yaml, {links}}}\n"
    other = f"  named: {{stage: ppo, config: ppo.yaml, output_name: other, {links}}}\n"
    change(demo, "  dpo:    {", again + other + "  dpo:    {")
    names = {spec.name: spec.config.output_name for spec in load_experiment(demo).stages}
    assert (names["ppo"], names["again"], names["named"]) == ("ppo", "again", "other")


def test_links_are_replaced_by_the_outputs(demo):
    experiment = load_experiment(demo)
    outputs = {
        "sft": "sft@v3",
        "pairs": "collected:pairs@v1",
        "reward": "reward@v2",
        "ppo": "ppo@v1",
        "dpo": "dpo@v1",
    }
    ppo = experiment.stages[3].resolved(outputs)
    assert (ppo.model_name_or_path, ppo.reward_model_path, ppo.dataset_name) == (
        "sft@v3",
        "reward@v2",
        "collected:pairs@v1",
    )
    assert experiment.stages[3].config.model_name_or_path == "sft"
    compare = experiment.compare.resolved(outputs)
    assert (compare.arms, compare.baseline) == (("ppo@v1", "dpo@v1"), "sft@v3")
    with pytest.raises(KeyError):
        experiment.stages[3].resolved({})


def test_links_inside_lists(demo):
    change(demo, "reward_model_path: reward, ", "reward_functions: [{source: world, weight: 2}, reward], ")
    ppo = load_experiment(demo).stages[3]
    assert ppo.links[("reward_functions", 1, "source")] == "reward"
    outputs = {"sft": "sft@v1", "pairs": "collected:pairs@v1", "reward": "reward@v7"}
    assert [term.source for term in ppo.resolved(outputs).rewards] == ["world", "reward@v7"]


def test_overrides_of_stages_of_the_comparison_and_of_the_experiment(demo):
    overrides = [
        "dpo.beta=.3",
        "sft.model_init.hidden_size=8",
        "compare.samples=9",
        "name=other",
        "seeds=[5]",
    ]
    experiment = load_experiment(demo, [*overrides, "ppo.seed=6"])
    assert experiment.stages[4].config.beta == 0.3
    assert experiment.stages[0].config.model_init == {"model_type": "llama", "hidden_size": 8}
    assert (experiment.compare.config.samples, experiment.compare.config.name) == (9, "other")
    assert [spec.config.seed for spec in experiment.stages] == [5, 5, 5, 6, 5]


def test_another_config_by_override(demo, write):
    write("other.yaml", "beta: .9\n")
    assert load_experiment(demo, ["dpo.config=other.yaml"]).stages[4].config.beta == 0.9


def test_overrides_that_reach_nothing(demo):
    assert refused(demo, "beta=.2", "seed=1", "dpoo.beta=1", "dpo=1") == [
        "override beta=.2: the experiment has no 'beta'; expected stage.key=value; "
        "write dpo.beta=VALUE for the stage dpo",
        "override seed=1: an experiment has seeds; expected seeds=[N]",
        "override dpoo.beta=1: the experiment has no 'dpoo'; expected stage.key=value; did you mean 'dpo'?",
        "override dpo=1: dpo is a stage; expected dpo.key=value",
    ]


def test_faults_of_all_files_together(demo, write):
    write("dpo.yaml", "# wrong\nbeta: -1\n")
    write("ppo.yaml", "lam: 2\n")
    change(demo, "config: reward.yaml", "config: absent.yaml")
    messages = refused(demo)
    assert "dpo.yaml:2: beta: found -1; expected a number > 0" in messages
    assert "ppo.yaml:1: lam: found 2; expected a number <= 1" in messages
    assert any(message.startswith("ppo.yaml: total_episodes: missing") for message in messages)
    (absent,) = [message for message in messages if "absent.yaml" in message]
    assert absent.startswith("experiment.yaml:6: stages.reward.config: absent.yaml: there is no such file")
    assert len(messages) == 4


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("pairs.policy=ppo", "'ppo' is a later stage"),
        ("ppo.model_name_or_path=ppo", "'ppo' is this stage itself"),
        (
            "dpo.model_name_or_path=reward",
            "the stage 'reward' is a train-rm stage, which does not make a policy",
        ),
        ("ppo.reward_model_path=sft", "the stage 'sft' is a sft stage, which does not make a reward model"),
        ("dpo.dataset_name=reward", "the stage 'reward' is a train-rm stage, which does not make data"),
        ("dpo.dataset_name=pair", "'pair' names no stage"),
        ("dpo.model_name_or_path=stf", "'stf' names no stage of the experiment and no model of the registry"),
        ("dpo.model_name_or_path=sft@v1", "'sft@v1' names no stage of the experiment and no model"),
        ("compare.baseline=reward", "the stage 'reward' is a train-rm stage, which does not make a policy"),
        ("compare.arms.0=ppoo", "'ppoo' names no stage of the experiment and no model of the registry"),
    ],
)
def test_values_that_name_no_fitting_earlier_stage(demo, override, found):
    (message,) = refused(demo, override)
    assert message.startswith(f"override {override}: {found}")


@pytest.mark.parametrize(
    "text", ["old-sft", "old-sft@v2", "old-sft@best", "old-sft@v1#100", "org/model", "org/model@main"]
)
def test_models_from_outside_the_experiment(demo, text):
    experiment = load_experiment(demo, [f"dpo.model_name_or_path={text}"], known_models=["old-sft"])
    assert experiment.stages[4].config.model_name_or_path == text
    assert ("model_name_or_path",) not in experiment.stages[4].links


def test_data_from_outside_the_experiment(demo, write):
    rows = write("rows.jsonl", "{}")
    change(demo, "dataset_name: pairs}\ncompare", "dataset_name: rows.jsonl}\ncompare")
    experiment = load_experiment(demo, ["reward.dataset_name=imdb"])
    assert experiment.stages[2].config.dataset_name == "imdb"
    assert experiment.stages[4].config.dataset_name == str(rows)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            "{stage: dpo, ",
            "{stage: dop, ",
            "experiment.yaml:8: stages.dpo.stage: found 'dop'; expected one of",
        ),
        ("{stage: dpo, ", "{", "experiment.yaml:8: stages.dpo.stage: missing; expected one of"),
        ("  dpo: ", "  a.b: ", "experiment.yaml:3: stages: 'a.b' is not a valid stage name"),
        ("  dpo: ", "  world: ", "experiment.yaml:8: stages.world: the name 'world' is reserved"),
        ("name: demo\n", "", "experiment.yaml: name: missing"),
        (
            "seeds: [3]",
            "seds: [3]",
            "experiment.yaml:2: seds: experiment has no such key; did you mean 'seeds'",
        ),
        ("seeds: [3]", "seeds: []", "experiment.yaml:2: seeds: found []; expected at least one entry"),
        ("config: dpo.yaml", "1: 2", "experiment.yaml:8: stages.dpo.1: 1 is not the name of a key"),
        (
            "config: dpo.yaml",
            "config: 3",
            "experiment.yaml:8: stages.dpo.config: found 3; expected a YAML file",
        ),
        ("arms: [ppo, dpo], ", "", "compare.yaml: arms: missing"),
        (
            "dataset_name: pairs}\nc",
            "dataset_name: pairs, x: 1}\nc",
            "experiment.yaml:8: stages.dpo.x: dpo has no such",
        ),
    ],
)
def test_faults_of_the_experiment_file(demo, old, new, expected):
    change(demo, old, new)
    assert any(message.startswith(expected) for message in refused(demo)), refused(demo)


def test_stages_that_do_not_fit_together(demo):
    overrides = ["ppo.output_name=dpo", "sft.split_fractions={train: .9, test: .1}"]
    messages = refused(demo, *overrides)
    assert any("the stages ppo and dpo both publish 'dpo'" in message for message in messages)
    assert any("split_fractions differ from those of sft" in message for message in messages)


def test_a_stage_without_a_file_and_an_experiment_without_a_comparison(write):
    path = write(
        "e.yaml",
        "name: e\nstages:\n  dpo: {stage: dpo, model_name_or_path: a/b, dataset_name: imdb, beta: 2}\n",
    )
    experiment = load_experiment(path)
    assert experiment.stages[0].config.beta == 2
    assert (experiment.compare, experiment.seeds) == (None, ())
    assert refused(path, "compare.samples=3") == ["override compare.samples=3: the experiment has no compare section"]


def test_a_missing_experiment_is_one_fault(tmp_path):
    (message,) = refused(tmp_path / "absent.yaml")
    assert message == "absent.yaml: there is no such file; expected a YAML file"


def test_notes_of_all_stages(demo, write):
    write("dpo.yaml", "torch_dtype: bfloat16\n")
    (note,) = load_experiment(demo).notes
    assert note.endswith("dpo.yaml:1: torch_dtype: an old name of dtype")


BEST = "makes one response to each prompt (labels best), and a {} stage reads preferences"


def test_preferences_of_the_best_responses_alone_are_refused(demo):
    (reward, dpo) = refused(demo, "pairs.labels=best", "pairs.k=4")
    assert reward.startswith("experiment.yaml:6: stages.reward.dataset_name: the stage 'pairs' ")
    assert BEST.format("train-rm") in reward and BEST.format("dpo") in dpo
    assert reward.endswith("expected data of a collect stage with labels bradley-terry or rank")


def test_a_mixture_with_the_best_responses_is_refused(demo):
    change(demo, "dataset_name: pairs}\ncompare", "datasets: [{dataset_name: x/y}, {dataset_name: pairs}]}\ncompare")
    faults = refused(demo, "pairs.labels=best")
    assert [BEST.format("dpo") in one for one in faults] == [False, True]
    assert "stages.dpo.datasets.1.dataset_name" in faults[1]


def test_one_value_of_a_sweep_makes_the_best_responses(demo):
    change(demo, "seeds: [3]", "seeds: [3]\nsweep: {pairs.labels: [rank, best]}")
    assert len(refused(demo)) == 2


def test_kto_on_rankings_is_refused_before_the_first_stage(demo):
    assert load_experiment(demo, ["dpo.loss_type=kto"]) and load_experiment(demo, ["pairs.k=4"])
    (fault,) = refused(demo, "dpo.loss_type=kto", "pairs.k=4")
    assert "the stage 'pairs' makes rankings of 4 responses (k 4), and loss_type kto reads pairs or single" in fault


def test_demonstrations_and_prompts_may_be_the_best_responses(demo):
    raft = "  raft: {stage: sft, config: sft.yaml, model_name_or_path: sft, model_init: null, tokenizer_init: null"
    change(demo, "  reward:", f"{raft}, dataset_name: pairs, output_name: raft}}\n  reward:")
    change(
        demo,
        "config: reward.yaml, model_name_or_path: sft, dataset_name: pairs",
        "config: reward.yaml, model_name_or_path: sft, dataset_name: x/y",
    )
    change(
        demo,
        "config: dpo.yaml, model_name_or_path: sft, dataset_name: pairs",
        "config: dpo.yaml, model_name_or_path: sft, dataset_name: x/y",
    )
    assert load_experiment(demo, ["pairs.labels=best"]).stages[-2].links[("dataset_name",)] == "pairs"


def test_rejected_responses_of_the_best_ones_alone_are_refused(demo):
    change(demo, "arms: [ppo, dpo]", "arms: ['icdpo:sft', dpo], in_context: {source: pairs, score: two_sided}")
    assert load_experiment(demo)
    (fault,) = [one for one in refused(demo, "pairs.labels=best") if "in_context" in one]
    assert "compare.in_context.source" in fault and "score two_sided reads rejected ones" in fault
