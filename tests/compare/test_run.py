"""Comparison and evaluation: what stands in results.json, and figures known beforehand."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest

from rlhf_pipeline.compare.rows import COST_KEYS, bill
from rlhf_pipeline.compare.run import compared, run_compare
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import ConfigError, MismatchError
from rlhf_pipeline.measure.evaluate import run_evaluate
from rlhf_pipeline.report import Results, load
from rlhf_pipeline.report.results import SCHEMA


@pytest.fixture(scope="module")
def arms(tiny, tmp_path_factory):
    """A laboratory with a PPO and a DPO model."""
    lab = tiny.copy(tmp_path_factory.mktemp("arms") / "home")
    lab.run("ppo", max_steps=2)
    lab.run("dpo", max_steps=6)
    run = lab.home / "runs" / "of-the-reward-model"
    run.mkdir()
    (run / "run.json").write_text('{"model": "reward@v1"}')
    (run / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n{"step": 2, "accuracy": 0.75}\n')
    return lab


def compare(lab, **changes):
    return compared(lab.config("compare", **changes), lab.home, quiet=True)


def evaluate(lab, reference, **changes):
    return run_evaluate(reference, lab.config("evaluate", **changes), lab.home)


@pytest.fixture(scope="module")
def results(arms):
    given = {"arms": ["ppo", "dpo"], "baseline": "sft", "samples": 4, "best_of": [1, 2, 4]}
    return run_compare(arms.config("compare", name="first", **given), arms.home, quiet=True)


def test_the_file_holds_what_is_returned_and_loads_again(arms, results):
    path = arms.home / "reports" / "first" / "results.json"
    assert isinstance(results, Results) and load(path) == results
    assert (results.version, results.path, results.report) == (1, str(path), str(path.with_name("index.html")))
    written = json.loads(path.read_text())
    assert written["version"] == 1 and set(written) == set(Results.model_fields)
    assert [row["cost"] for row in written["rows"] if row["stage"] == "best-of-n"] == [None] * 3
    assert load(path).text() == path.read_text()


def unknown_keys(value, schema, definitions, place="results"):
    """The keys of a JSON value that its schema does not name, and those that it requires and the value lacks."""
    if "$ref" in schema:
        return unknown_keys(value, definitions[schema["$ref"].rpartition("/")[2]], definitions, place)
    if "anyOf" in schema:
        kind = "object" if isinstance(value, dict) else "array" if isinstance(value, list) else None
        fits = [
            one
            for one in schema["anyOf"]
            if (definitions[one["$ref"].rpartition("/")[2]] if "$ref" in one else one).get("type") == kind
        ]
        return unknown_keys(value, fits[0], definitions, place) if fits else []
    found = []
    if isinstance(value, dict):
        named, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{place}: lacks {key}" for key in schema.get("required", ()) if key not in value]
        for key, part in value.items():
            if key in named or isinstance(others, dict):
                found += unknown_keys(part, named.get(key, others), definitions, f"{place}.{key}")
            elif not others:
                found.append(f"{place}.{key}")
    if isinstance(value, list):
        rules = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        for number, (part, rule) in enumerate(zip(value, rules, strict=True)):
            found += unknown_keys(part, rule, definitions, f"{place}.{number}")
    return found


def test_every_key_of_the_file_is_in_the_schema(arms, results):
    schema = json.loads(SCHEMA.read_text())
    written = json.loads((arms.home / "reports" / "first" / "results.json").read_text())
    assert unknown_keys(written, schema, schema["$defs"]) == []
    written["rows"][1]["metrics"]["kl"]["median"] = 0.0
    del written["verdict"]["lines"]
    found = unknown_keys(written, schema, schema["$defs"])
    assert sorted(found) == ["results.rows.1.metrics.kl.median", "results.verdict: lacks lines"]


def test_what_results_say(arms, results):
    assert (arms.home / "reports" / "first" / "index.html").read_text().startswith("<!DOCTYPE html>")
    assert results.baseline == results.reference == "sft@v1"
    assert results.reward_model == "reward@v1"
    assert (results.prompts, results.samples, results.split) == (8, 4, "test")
    names = [row.name for row in results.rows]
    assert names == ["sft@v1", "ppo@v1", "dpo@v1", *(f"best of {n} of sft@v1" for n in (1, 2, 4))]
    for row in results.rows[:3]:
        assert {"true_reward", "score", "kl", "kl_k1", "entropy", "length", "ended", "well_formed"} <= set(row.metrics)
        for figure in row.metrics.values():
            assert figure.low <= figure.mean <= figure.high
            assert (figure.n, figure.clusters) == (32, 8)
        assert {name: figure.method for name, figure in row.metrics.items()} == {
            name: "wilson" if name in ("ended", "well_formed") else "t" for name in row.metrics
        }
    for row in results.rows[3:]:
        assert {row.metrics[name].method for name in ("ended", "well_formed")} == {"wilson"}
    assert "win_rate" not in results.rows[0].model_fields_set and results.rows[0].win_rate is None
    assert all(0 <= row.win_rate.mean <= 1 for row in results.rows[1:3])
    assert all(0 <= row.ties <= 1 for row in [*results.rows[1:3], *results.win_rates])
    assert all(0 <= row.ties <= 1 for row in results.ranking.rows)


def test_the_curves_are_those_of_the_arms_and_of_the_reward_model_behind_them(results):
    assert set(results.curves) == {"ppo@v1", "dpo@v1", "reward@v1"}  # the run of the SFT model is not in this home
    assert results.curves["reward@v1"] == {"accuracy": [(1, 0.5), (2, 0.75)]}


def test_the_baseline_is_its_own_reference(results):
    baseline = results.rows[0].metrics
    assert baseline["kl"].mean == pytest.approx(0, abs=1e-6)
    assert baseline["kl_k1"].mean == pytest.approx(0, abs=1e-5)
    assert results.rows[2].metrics["kl"].mean > 1e-3


def test_differences_are_those_of_the_means(results):
    first = results.rows[0].metrics[results.primary].mean
    for row in results.rows[1:3]:
        assert row.difference.mean == pytest.approx(row.metrics[results.primary].mean - first)


def test_a_model_ties_with_itself(arms):
    found = compare(arms, arms=["sft@v1"], baseline="sft", samples=8)
    row = found.rows[1]
    assert row.win_rate.mean == 0.5
    assert (row.difference.mean, row.gain_in_sd) == (0, 0)
    assert row.metrics["true_reward"] == found.rows[0].metrics["true_reward"]


def test_one_sample_a_prompt_gives_no_win_rate(arms):
    """Both models draw with the same random number: how they would do against each other apart is not known."""
    found = compare(arms, arms=["ppo", "dpo"], baseline="sft", samples=1)
    assert [row.win_rate for row in found.rows[1:]] == [None, None]
    assert found.rows[1].difference.mean is not None and found.ranking is None
    told = {(entry.a, entry.b): entry for entry in found.win_rates}
    assert "sample at least 2" in told["ppo@v1", "dpo@v1"].why_not
    assert told["ppo@v1", "demonstrations"].estimate is not None  # these were not drawn with the models' numbers


def test_over_optimisation_measures_gain_and_distance_from_one_model(arms):
    """With another baseline than the reference: the gain of the reference over itself is 0 where its KL is 0."""
    arms.run("dpo", output_name="path", max_steps=4, snapshot_steps=1)
    options = {"samples": 4, "reward_model": "reward", "snapshots": True, "validation_split": None}
    expected = compare(arms, arms=["path"], baseline="sft", **options)
    found = compare(arms, arms=["path"], baseline="ppo", reference="sft", **options)
    assert (found.baseline, found.reference) == ("ppo@v1", "sft@v1")
    (mine,), (theirs,) = found.overoptimisation.values(), expected.overoptimisation.values()
    assert mine.reference == theirs.reference == "sft@v1"
    assert np.array(mine.points) == pytest.approx(np.array(theirs.points), abs=1e-6)


def test_best_of_n_rows(results):
    rows = {row.n: row for row in results.rows if row.stage == "best-of-n"}
    assert [rows[n].kl_bound for n in (1, 2, 4)] == pytest.approx([0, math.log(2) - 0.5, math.log(4) - 0.75])
    baseline = results.rows[0].metrics
    for name in ("score", "true_reward", "length"):
        assert rows[1].metrics[name].mean == pytest.approx(baseline[name].mean)
    scores = [rows[n].metrics["score"].mean for n in (1, 2, 4)]
    assert scores == sorted(scores) and scores[0] < scores[2]
    assert {row.chosen_by for row in rows.values()} == {"reward@v1"}


def test_best_of_all_samples_is_the_maximum(arms):
    from rlhf_pipeline.evaluation.sampled import draw
    from rlhf_pipeline.measure.bench import find_policies, set_up
    from rlhf_pipeline.training.accelerator import make_accelerator

    config = arms.config("compare", arms=["dpo"], baseline="sft", samples=4, best_of=[4], reward_model="reward")
    registry = arms.registry
    first = find_policies(registry, ["sft"], lambda _: None)[0]
    bench = set_up(
        registry, config, first, make_accelerator(config).device, reference=None, seed=0, samples=4, say=lambda _: None
    )
    samples = draw(bench.policy(first), bench.plan)
    scores = bench.scorer.score(samples.examples).numpy().reshape(8, 4)
    row = compare(arms, arms=["dpo"], baseline="sft", samples=4, best_of=[4], reward_model="reward").rows[2]
    assert row.metrics["score"].mean == pytest.approx(float(scores.max(1).mean()), abs=1e-5)


def test_more_samples_of_the_baseline_alone_are_drawn_where_best_of_n_needs_them(arms):
    found = compare(arms, arms=["dpo"], baseline="sft", samples=2, best_of=[2, 6], reward_model="reward")
    assert found.samples == 2
    two, six = (row for row in found.rows if row.stage == "best-of-n")
    assert two.samples == six.samples == 6 and six.n == 6
    asked = compare(arms, arms=["dpo"], baseline="sft", samples=6, best_of=[6], reward_model="reward")
    assert six.metrics == asked.rows[2].metrics


def test_ppos_bill_holds_its_reward_model(arms):
    registry = arms.registry
    ppo, reward, dpo = (registry.resolve(name) for name in ("ppo", "reward", "dpo"))
    for key in COST_KEYS:
        assert getattr(bill(registry, ppo), key) == pytest.approx(ppo.manifest.cost[key] + reward.manifest.cost[key])
        assert getattr(bill(registry, dpo), key) == pytest.approx(dpo.manifest.cost[key])
    rows = {row.name: row for row in compare(arms, arms=["ppo"], baseline="sft", samples=1).rows}
    assert rows["ppo@v1"].cost.flops == bill(registry, ppo).flops


def test_a_comparison_is_a_function_of_its_seed(arms):
    one, again, other = (compare(arms, arms=["ppo"], baseline="sft", seed=seed).rows[1] for seed in (0, 0, 1))
    assert one == again
    assert one.metrics != other.metrics


def test_a_snapshot_or_a_folder_can_be_an_arm(arms):
    trained = arms.run("dpo", output_name="steps", max_steps=2, snapshot_steps=[1])
    found = compare(arms, arms=["steps@v1#1", trained.path], baseline="sft", samples=1)
    assert [row.model for row in found.rows] == ["sft@v1", "steps@v1#1", trained.path]


def test_a_reward_model_is_no_arm(arms):
    with pytest.raises(MismatchError, match="reward@v1"):
        compare(arms, arms=["reward"], baseline="sft")


def test_evaluating_a_policy(arms):
    found = evaluate(arms, "dpo", samples=4)
    assert (found["model"], found["reference"], found["prompts"], found["samples"]) == ("dpo@v1", "sft@v1", 8, 4)
    assert found["reward_model"] is None
    assert found["metrics"]["kl"].mean > 0
    with_judge = evaluate(arms, "ppo", samples=4)
    assert with_judge["reward_model"] == "reward@v1"
    assert "score" in with_judge["metrics"]


def test_evaluation_and_comparison_draw_the_same_samples(arms, results):
    found = evaluate(arms, "ppo", samples=4)
    assert found["metrics"] == results.rows[1].metrics


def test_true_rewards_by_hand(arms):
    """The mean over prompts of the world's verdicts on the very samples that the plan draws."""
    from rlhf_pipeline.data import world
    from rlhf_pipeline.evaluation.sampled import draw
    from rlhf_pipeline.measure.bench import find_policies, set_up

    config = arms.config("evaluate", samples=3, seed=4)
    policy = find_policies(arms.registry, ["dpo"], lambda _: None)[0]
    bench = set_up(arms.registry, config, policy, "cpu", reference=None, samples=3, seed=4, say=lambda _: None)
    sampled = draw(bench.policy(policy), bench.plan)
    rewards = [
        world.verdicts([example.prompt_ids], [ids], [ended]).reward[0]
        for example in sampled.examples
        for ids, ended in zip(example.completions, example.ended, strict=True)
    ]
    assert evaluate(arms, "dpo", samples=3, seed=4)["metrics"]["true_reward"].mean == pytest.approx(np.mean(rewards))


def test_evaluating_a_reward_model(arms):
    found = evaluate(arms, "reward")
    manifest = arms.registry.resolve("reward").manifest
    assert (found["model"], found["stage"]) == ("reward@v1", "reward")
    assert found["reward_shift"] == manifest.metrics["reward_shift"]
    for name in ("accuracy", "nll", "brier", "ece", "pairs", "bayes_accuracy"):
        assert found["metrics"][name] == pytest.approx(manifest.metrics[name], abs=1e-6)
    for name, baseline in manifest.metrics["baselines"].items():
        assert found["metrics"]["baselines"][name] == pytest.approx(baseline)
    assert evaluate(arms, "reward", split="train")["metrics"]["pairs"] > found["metrics"]["pairs"]


def test_a_reward_model_without_its_data_cannot_be_evaluated(arms, tmp_path):
    folder = arms.registry.export("reward", tmp_path / "exported")
    assert evaluate(arms, str(folder))["metrics"]["pairs"] > 0
    (folder / "manifest.json").unlink()
    with pytest.raises(ConfigError, match="preference data"):
        evaluate(arms, str(folder))


@pytest.mark.parametrize("split", ["validation", "train"])
def test_prompts_come_from_the_split_that_is_asked_for(arms, split):
    assert evaluate(arms, "sft", split=split, samples=1)["prompts"] == {"validation": 4, "train": 20}[split]


def test_prompts_and_lengths_are_the_arms_own_whatever_the_baseline_was_trained_on(arms, tmp_path):
    rows = [{"prompt": "the pacing of this horror was", "completion": " great", "split": s} for s in ("train", "test")]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    source = {"dataset_name": str(tmp_path / "other.jsonl"), "allow_overlap": True}
    arms.run("sft", output_name="elsewhere", **source, response_length=7, max_steps=1)
    expected = compare(arms, arms=["dpo"], baseline="sft", samples=1)
    found = compare(arms, arms=["dpo"], baseline="elsewhere", samples=1)
    assert (found.prompt_texts, found.response_length) == (expected.prompt_texts, 4)
    folder = str(arms.home / "models" / "sft" / "v1")  # knows nothing of its data where it has no manifest
    plain = tmp_path / "plain"
    shutil.copytree(folder, plain)
    (plain / "manifest.json").unlink()
    found = compare(arms, arms=[str(plain), "dpo"], baseline="sft", samples=1)
    assert (found.prompt_texts, found.response_length) == (expected.prompt_texts, 4)


def test_an_sft_arm_is_no_reference(arms):
    arms.run("sft", output_name="preferred", max_steps=2)
    found = compare(arms, arms=["preferred", "dpo"], baseline="sft", samples=1)
    assert found.reference == "sft@v1"
    assert found.rows[1].metrics["kl"].mean > 1e-4


@pytest.mark.parametrize("split", ["validation", "all"])
def test_settings_are_not_chosen_on_what_is_shown(split):
    given = {"arms": ["dpo"], "baseline": "sft", "split": split}
    with pytest.raises(ConfigError, match="settings would be chosen on the results"):
        load_config("compare", None, extra=given)
    assert load_config("compare", None, extra=given | {"validation_split": None}).config.split == split


def test_without_a_split_to_choose_on_it_says_which_key(arms, tmp_path):
    arms.run("dpo", output_name="passed", max_steps=2, snapshot_steps=1)
    prompts = {"prompts": "world:verdicts", "validation_split": "nowhere"}
    with pytest.raises(ConfigError, match=r"validation_split: .*null to choose no setting"):
        compare(arms, arms=["passed"], baseline="sft", samples=1, snapshots=True, **(prompts | {"prompts": None}))


def test_at_most_so_many_prompts(arms):
    assert evaluate(arms, "sft", split="train", samples=1, max_prompts=5)["prompts"] == 5


def test_win_rates_against_the_demonstrations(arms, results):
    """Each arm against SFT and against the held-out demonstrations, and the two arms against each other."""
    from rlhf_pipeline.data import world

    pairs = {(entry.a, entry.b) for entry in results.win_rates}
    sides = ("sft@v1", "demonstrations")
    assert pairs == {("ppo@v1", "dpo@v1"), *((arm, side) for arm in ("ppo@v1", "dpo@v1") for side in sides)}
    shown = results.demonstrations
    assert shown.each == 4
    prompts = [pair for pair, split in world.vocabulary.SPLITS.items() if split == "test"]
    rewards = []
    for pair in prompts:
        taken = world.demonstrations(*pair)[:4]
        ids = world.encode(world.prompt_text(*pair))
        rewards += world.verdicts([ids] * 4, [c for c, _ in taken], [ended for _, ended in taken]).reward.tolist()
    assert shown.metrics["true_reward"].mean == pytest.approx(np.mean(rewards))
