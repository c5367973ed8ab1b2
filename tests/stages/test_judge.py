"""A judge during PPO: it sees what is sampled, moves nothing, is on no bill, and is another than the reward."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.fairness import differences
from rlhf_pipeline.compare.readings import curves
from rlhf_pipeline.compare.rows import bill
from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.errors import ConfigError, MismatchError
from rlhf_pipeline.experiment.done import find_done
from rlhf_pipeline.experiment.estimate import estimate_stage
from rlhf_pipeline.registry.parents import parents_of
from rlhf_pipeline.training import session

COUNTS = ("flops", "tokens_trained", "tokens_generated", "optimizer_steps")


@pytest.fixture(scope="module")
def judged(tiny, tmp_path_factory):
    """The laboratory with `held`, a reward model on other pairs, and two equal runs, one of which it judges."""
    lab = tiny.copy(tmp_path_factory.mktemp("judged") / "home")
    lab.run("train-rm", output_name="held", dataset_train_split="judge", max_steps=3, seed=7)
    plain = lab.run("ppo", output_name="plain", max_steps=5, logging_steps=2)
    watched = lab.run("ppo", output_name="watched", max_steps=5, logging_steps=2, judge="held")
    return lab, plain, watched


def log_of(result):
    return (Path(result.run) / "log.txt").read_text()


def without_judge(row):
    return {name: value for name, value in row.items() if "judge" not in name}


def test_the_weights_are_bit_for_bit_those_of_a_run_without(judged):
    lab, plain, watched = judged
    ours, theirs = lab.weights(watched.model), lab.weights(plain.model)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert lab.registry.resolve(watched.model).digest == lab.registry.resolve(plain.model).digest
    assert [without_judge(row) for row in lab.rows(watched.run)] == lab.rows(plain.run)


def test_it_is_logged_where_a_run_is_logged_and_stands_among_the_parents(judged):
    lab, plain, watched = judged
    rows = lab.rows(watched.run)
    assert [row["step"] for row in rows] == [1, 2, 4, 5]
    assert all({"objective/judge", "objective/judge_std"} <= set(row) for row in rows)
    assert watched.metrics["train"]["objective/judge"] == rows[-1]["objective/judge"]
    parent = lab.registry.resolve(watched.model).manifest.parents["judge"]
    assert (parent.ref, parent.digest) == ("held@v1", lab.registry.resolve("held").digest)
    assert "judge: held@v1 scores the logged rollouts; nothing is trained on it" in log_of(watched)
    assert "judge" not in lab.registry.resolve(plain.model).manifest.parents
    assert not any("judge" in name for row in lab.rows(plain.run) for name in row)
    drawn = curves(lab.registry, [lab.registry.resolve(watched.model)])["watched@v1"]["objective/judge"]
    assert drawn == [(row["step"], row["objective/judge"]) for row in rows]


def test_it_is_called_at_logged_updates_alone_and_its_mean_is_per_response(lab, function):
    """16 responses each at updates 1, 3, 6 and 7 of 7; mean and deviation of what it said, worked out beside it."""
    said = []

    def judge(prompts, completions, **_):
        said.append([float(len(text.split())) for text in completions])
        return said[-1]

    result = lab.run("ppo", judge=function(judge), max_steps=7, logging_steps=3)
    rows = lab.rows(result.run)
    assert [row["step"] for row in rows] == [1, 3, 6, 7]
    values = torch.tensor([value for call in said for value in call], dtype=torch.float64).view(4, 16)
    assert [row["objective/judge"] for row in rows] == pytest.approx(values.mean(1).tolist(), abs=1e-12)
    spread = values.std(1, unbiased=False).tolist()
    assert [row["objective/judge_std"] for row in rows] == pytest.approx(spread, abs=1e-9)
    assert "judge" not in lab.registry.resolve(result.model).manifest.parents  # no model


def test_a_missing_eos_penalty_is_the_rewards_business(judged):
    lab, _, watched = judged
    fined = lab.run("ppo", output_name="fined", judge="held", missing_eos_penalty=3.0, max_steps=1, logging_steps=2)
    ours, theirs = lab.rows(fined.run)[0], lab.rows(watched.run)[0]
    assert ours["objective/scores"] < theirs["objective/scores"]
    assert ours["objective/judge"] == theirs["objective/judge"]


def test_its_cost_is_apart(judged):
    """The policy's bill is that of a run without it. Of the judge: a forward pass of its trunk over each response
    of 16 in four of five updates; each response has the 6 tokens of its prompt beside its own."""
    lab, plain, watched = judged
    assert [watched.cost[name] for name in COUNTS] == [plain.cost[name] for name in COUNTS]
    ours, theirs = (bill(lab.registry, lab.registry.resolve(result.model)) for result in (watched, plain))
    assert [getattr(ours, name) for name in COUNTS] == [getattr(theirs, name) for name in COUNTS]
    assert "judge_flops" not in plain.cost and "judge" not in plain.cost["seconds"]
    assert watched.cost["seconds"]["judge"] > 0
    # One layer: four matrices of 16 x 16, three of 16 x 32; attention of width 16 over 1 + 2 + ... + length tokens.
    matmul, attention = 4 * 256 + 3 * 512, 16
    # Query and output projections and the feed-forward work at the last token of each response only.
    skipped = 2 * 256 + 3 * 512
    lengths = [row["val/response_length"] for row in lab.rows(watched.run)]

    def cost(tokens: float, context: float) -> float:
        return 2 * (matmul - skipped) * tokens + 2 * skipped * 16 + 4 * attention * context

    # Responses of a micro-batch to one prompt share it; equal lengths cost least, for the context is convex.
    least = sum(cost(16 * n + 6, 21 + 16 * (6 * n + n * (n + 1) / 2)) for n in lengths)
    most = sum(cost(16 * (n + 6), 16 * 21 + 1.2 * 16 * (6 * n + n * (n + 1) / 2)) for n in lengths)
    assert least <= watched.cost["judge_flops"] <= most


def test_its_seconds_are_no_part_of_the_wall_time(lab, function, monkeypatch):
    """A clock that only the judge moves: 100 seconds at each of 4 looks, with a resume in between."""
    from rlhf_pipeline.training import cost

    now = [0.0]
    monkeypatch.setattr(cost.time, "perf_counter", lambda: now[0])

    def judge(prompts, completions, **_):
        now[0] += 100.0 / 2  # two micro-batches
        return [0.0] * len(prompts)

    settings = {"judge": function(judge), "max_steps": 4, "save_steps": 2, "snapshot_steps": [3]}
    fit = session.fit

    class Killed(Exception):
        pass

    def killed(*args, on_update, **options):
        def hook(step, metrics, window):
            if step == 3:
                raise Killed
            on_update(step, metrics, window)

        return fit(*args, on_update=hook, **options)

    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", killed)
        with pytest.raises(Killed):
            lab.run("ppo", **settings)
    result = lab.run("ppo", **settings)
    assert "resumed at step 2" in log_of(result)
    assert result.cost["seconds"]["judge"] == 400.0
    assert result.cost["wall_seconds"] == result.cost["at_step"]["3"]["wall_seconds"] == 0.0


@pytest.mark.check
def test_a_resumed_run_says_and_counts_the_same(judged, lab, monkeypatch):
    whole_lab, _, _ = judged
    lab.run("train-rm", output_name="held", dataset_train_split="judge", max_steps=3, seed=7)
    settings = {"output_name": "long", "judge": "held", "max_steps": 6, "save_steps": 2}
    whole = whole_lab.run("ppo", **settings)
    fit = session.fit

    class Killed(Exception):
        pass

    def killed(*args, on_update, **options):
        def hook(step, metrics, window):
            if step == 5:
                raise Killed
            on_update(step, metrics, window)

        return fit(*args, on_update=hook, **options)

    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", killed)
        with pytest.raises(Killed):
            lab.run("ppo", **settings)
    cut = lab.run("ppo", **settings)
    assert lab.rows(cut.run) == whole_lab.rows(whole.run)
    assert cut.cost["judge_flops"] == whole.cost["judge_flops"]


# What it must not be.


def test_the_reward_itself_is_no_judge(lab, function):
    with pytest.raises(ConfigError, match=r"judge: 'reward' is the reward"):
        lab.run("ppo", judge="reward")
    name = function(lambda prompts, completions, **_: [0.0] * len(prompts))
    with pytest.raises(ConfigError, match="judge: 'judges_of_a_test:judge'"):
        lab.run("ppo", reward_model_path=None, reward_functions=["world", name], judge=name)


@pytest.mark.parametrize("again", ["reward@v1", "reward@best", "models/reward/v1"])
def test_nor_is_it_under_another_name(lab, again):
    lab.registry.alias("reward", "best")
    again = str(lab.home / again) if "/" in again else again
    with pytest.raises(
        MismatchError, match=rf"judge '{again}': found .*the same as the training reward reward@v1 [0-9a-f]{{12}}"
    ):
        lab.run("ppo", judge=again)
    assert lab.registry.models.names() == ["reward", "sft"]


def test_nor_is_the_world_where_the_world_rewards(lab):
    world = {"reward_model_path": None, "reward_functions": ["world"]}
    with pytest.raises(
        MismatchError, match="judge 'world:verdicts': found world, the same as the training reward world"
    ):
        lab.run("ppo", **world, judge="world:verdicts")


def test_a_policy_is_no_judge(lab):
    with pytest.raises(MismatchError, match=r"sft@v1.*a reward model"):
        lab.run("ppo", judge="sft")


def test_the_same_pairs_are_said(judged):
    lab, _, watched = judged
    assert "the same pairs" not in log_of(watched)
    lab.run("train-rm", output_name="twin", max_steps=2, seed=5, score_pooling="mean")  # on the pairs of `reward`
    said = log_of(lab.run("ppo", output_name="twins", judge="twin", max_steps=1))
    assert (
        "WARNING: judge twin@v1 and reward model reward@v1 were trained on the same pairs "
        "(collected:pairs@v1 [train]), so they share errors" in said
    )


def test_a_judge_that_failed_its_gate_is_named_as_a_judge(judged):
    lab, _, _ = judged
    lab.run("train-rm", output_name="blunt", dataset_train_split="judge", max_steps=1, learning_rate=1e-9)
    said = log_of(lab.run("ppo", output_name="blunted", judge="blunt", max_steps=1))
    assert "WARNING: judge blunt@v1: failed its gate" in said


# What depends on it.


def test_what_is_done_depends_on_the_judges_weights(judged):
    lab, plain, watched = judged
    config = lab.config("ppo", output_name="watched", max_steps=5, logging_steps=2, judge="held")
    digest = lab.registry.resolve("held@v1").digest
    assert parents_of(lab.registry, config)["judge"].digest == digest
    world = config.model_copy(update={"judge": "world"})
    assert "judge" not in parents_of(lab.registry, world)
    assert find_done(config, lab.registry).label == watched.model
    assert config_digest(config) != config_digest(config.model_copy(update={"judge": None}))
    other = lab.copy(lab.home.parent / "other")
    other.run("train-rm", output_name="held", dataset_train_split="judge", max_steps=4, seed=7)  # held@v2
    assert find_done(config, other.registry) is None
    before = config.model_copy(update={"output_name": "plain", "judge": None})
    assert find_done(before, other.registry).label == plain.model


def test_a_dry_run_names_it_and_counts_its_memory(judged):
    lab, _, _ = judged
    plain, watched = (estimate_stage(lab.config("ppo", judge=judge), lab.home) for judge in (None, "held"))
    assert "judge" not in plain and watched["judge"] == "held@v1"
    # Four times actor and critic, the reference, the reward model: 10 models; the judge is the eleventh.
    memory = "memory_mib_without_activations"
    assert watched[memory] == pytest.approx(plain[memory] * 11 / 10, abs=0.1)
    assert watched[memory] == round(11 * 4 * watched["parameters"] / 2**20, 1)
    with pytest.raises(MismatchError, match=r"sft@v1.*a reward model"):
        estimate_stage(lab.config("ppo", judge="sft"), lab.home)


def test_it_is_no_difference_between_arms(judged):
    lab, plain, watched = judged
    arms = {name: [lab.registry.resolve(result.model)] for name, result in (("a", plain), ("b", watched))}
    assert differences(lab.registry, arms) == []


def test_a_stage_of_an_experiment_judges(judged, tmp_path, capsys):
    """`judge: judge` is a link: the version is written down, a change of the judge runs PPO again, and a stage that
    makes no reward model is refused."""
    lab = judged[0].copy(tmp_path / "home")
    shared = {"max_prompt_length": 6, "response_length": 4, "use_cpu": True, "num_threads": 1, "max_steps": 1}
    shared |= {"model_name_or_path": "sft", "dataset_name": "collected:pairs", "per_device_train_batch_size": 8}
    scorer = {**shared, "stage": "train-rm", "reward_centering_samples": 16}
    ppo = {**shared, "stage": "ppo", "rollout_batch_size": 8, "num_ppo_epochs": 1, "num_mini_batches": 1}
    stages = {
        "scorer": scorer,
        "umpire": {**scorer, "dataset_train_split": "judge"},
        "policy": {**ppo, "reward_model_path": "scorer", "judge": "umpire"},
    }
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({"name": "trial", "seeds": [0], "stages": stages}, sort_keys=False))

    def run(*overrides, code=0):
        assert main(["--home", str(lab.home), "run", str(path), *overrides, "--json"]) == code
        out = capsys.readouterr()
        return json.loads(out.out)["stages"] if code == 0 else out.err

    assert not any(stage["skipped"] for stage in run().values())
    manifest = lab.registry.resolve("policy").manifest
    assert manifest.config["judge"] == manifest.parents["judge"].ref == "umpire@v1"
    assert all(stage["skipped"] for stage in run().values())
    again = run("umpire.seed=3")
    assert {name for name, stage in again.items() if not stage["skipped"]} == {"umpire", "policy"}
    assert "'scorer' is the reward" in run("policy.judge=scorer", code=2)
    assert "names no stage of the experiment and no model" in run("policy.judge=nobody", code=2)
    stages["policy"]["judge"] = "first"
    path.write_text(yaml.safe_dump({"name": "trial", "stages": {"first": {**shared, "stage": "sft"}, **stages}}))
    assert "does not make a reward model" in run(code=2)


# What it is for.


def great(prompts, completions, **_):
    return [float("great" in text.split()) for text in completions]


def grating(prompts, completions, **_):
    return [-float("great" in text.split()) for text in completions]


@pytest.mark.check
def test_a_reward_that_rises_while_the_judge_falls_is_named_from_the_command_line(lab, capsys, monkeypatch):
    """A reward for one word and a judge that cannot stand it: 12 logged updates at most until it is named."""
    module = ModuleType("judges_of_a_test")
    module.great, module.grating = great, grating
    monkeypatch.setitem(sys.modules, "judges_of_a_test", module)
    config = lab.config(
        "ppo",
        reward_model_path=None,
        reward_functions=["judges_of_a_test:great"],
        judge="judges_of_a_test:grating",
        kl_coef=0.01,
        rollout_batch_size=64,
        per_device_train_batch_size=32,
        max_steps=25,
        learning_rate=2e-2,
    )
    path = lab.home / "ppo.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    assert main(["--home", str(lab.home), "ppo", "--config", str(path), "--json"]) == 0
    out = capsys.readouterr()
    result = json.loads(out.out)
    rows = lab.rows(result["run"])
    assert all(row["objective/judge"] == -row["objective/scores"] for row in rows)
    (found,) = [f for f in result["metrics"]["health"] if f["cause"] == "judge_falls"]
    assert found["since_step"] >= 10 and found["until_step"] is None
    assert f"judge_falls since step {found['since_step']}: objective/judge is" in out.err
    assert "over-optimisation" in found["message"] and "stop near step" in found["knob"]
    assert rows[found["since_step"] - 1]["health/judge_falls"] == found["value"]
    # The same run judged by what it is paid for in other words: both rise, and nothing is named.
    module.grating = lambda prompts, completions, **_: [2.0 * value for value in great(prompts, completions)]
    assert main(["--home", str(lab.home), "ppo", "--config", str(path), "output_name=friend", "--json"]) == 0
    friendly = json.loads(capsys.readouterr().out)
    assert "judge_falls" not in [f["cause"] for f in friendly["metrics"]["health"]]
    assert all(torch.equal(value, lab.weights("friend")[name]) for name, value in lab.weights(result["model"]).items())


def test_what_a_user_gets_wrong_is_said_in_one_line(lab, capsys):
    config = lab.home / "ppo.yaml"
    config.write_text(yaml.safe_dump(lab.config("ppo").model_dump(mode="json")))
    for judge, message in (
        ("reward", "'reward' is the reward that the policy is trained on"),
        ("a b:f", "found 'a b:f'; expected world, a reward model, or module:function"),
        ("no_such_module:judge", "no_such_module:judge"),
        ("nobody", "nobody"),
    ):
        assert main(["--home", str(lab.home), "ppo", "--config", str(config), f"judge={judge}"]) == 2, judge
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error
