"""The amounts of a dry run are those of the closed formula, and of the bill of the run itself."""

from __future__ import annotations

import json

import pytest
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data.batch import counted, pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.experiment.estimate import estimate_experiment, estimate_stage
from rlhf_pipeline.experiment.machine import Speed
from rlhf_pipeline.experiment.work import Models, Work, compare_work
from rlhf_pipeline.training.cost import ModelShape
from tests.experiment.test_estimate import words, write

COUNTS = ("optimizer_steps", "tokens_trained", "tokens_sampled")


def pairs(count: int = 10) -> list[dict[str, str]]:
    """Pairs with a prompt of 3 tokens, and responses of 3 and 2 tokens with their end tokens; two are held out."""
    rows = [{"prompt": words(3, n), "chosen": " " + words(2, n), "rejected": " " + words(1, n)} for n in range(count)]
    return [{**row, "split": "train" if n < count - 2 else "test"} for n, row in enumerate(rows)]


def example(prompt: int, *completions: int) -> Example:
    return Example([1] * prompt, [[2] * n for n in completions], [True] * len(completions), "", "")


def test_counts_without_packing():
    examples = [example(3, 2, 1), example(5, 4), example(1, 1, 2, 3)]
    examples.append(Example([1, 1], [[2, 3, 4]], [True], "", "", trained=[True, False, True]))
    found, packed = counted(examples), pack(examples)
    assert found.context_tokens == packed.context_tokens == (6 + 9 + 4) + (15 + 30) + (1 + 2 + 5 + 9) + (3 + 12)
    for name in ("active_tokens", "num_tokens", "num_completions", "num_predicting"):
        assert getattr(found, name) == getattr(packed, name), name


def test_a_decoder_is_counted_beside_the_samples_of_the_policy():
    """Two models on prompts of 3 and 4 tokens, responses of 5: each is scored twice for its KL and once for its reward;
    a decoder's responses are made, by three beams, and scored for their reward as well."""
    shape = ModelShape(1, 0, 0)
    models, prompts = Models(shape, shape, rewards=(shape,)), [example(3), example(4)]

    def work(**changes):
        config = load_config("compare", None, extra={"arms": ["a", "b"], "samples": 1, **changes}).config
        return compare_work(config, models, prompts, count=2, response=5, longest=5)

    plain, greedy, beams = work(), work(do_sample=False), work(do_sample=False, num_beams=3)
    assert [one.tokens_sampled for one in (plain, greedy, beams)] == [20, 40, 80]
    assert [one.decoding_steps for one in (plain, greedy, beams)] == [10, 20, 40]
    once = 2 * 2 * (3 + 4 + 5 + 5)  # 2 FLOPs for each weight and token, two models
    assert [one.evaluation for one in (plain, greedy, beams)] == [3 * once, 4 * once, 4 * once]


def test_flops_by_hand(lab, tmp_path):
    """The model: one layer, width 16, feed-forward 32, so 4 x 16 x 16 + 3 x 16 x 32 weights and V x 16 of the head.

    A pair has 8 tokens: 3 of the prompt, contexts 1+2+3, 4+5+6 and 4+5. Five positions predict a token, but the last
    position of the prompt predicts two: 4 are read. All products but those of keys and values are left out elsewhere.
    """
    source = write(tmp_path / "pairs.jsonl", pairs())
    outputs = lab.registry.resolve("sft").path
    vocabulary = json.loads((outputs / "config.json").read_text())["vocab_size"]
    matmul, skipped = 4 * 16 * 16 + 3 * 16 * 32, 2 * 16 * 16 + 3 * 16 * 32
    forward = 2 * (matmul * 8 - skipped * (8 - 4)) + 4 * 16 * (6 + 15 + 9) + 2 * 16 * vocabulary * 5
    config = lab.config("dpo", dataset_name=source, max_steps=-1, num_train_epochs=2.5, gradient_accumulation_steps=1)
    told = estimate_stage(config.model_copy(update={"per_device_train_batch_size": 4}), lab.home)
    # 8 pairs in steps of 4: 5 steps, 20 pairs; the reference reads 8 once. Held out: 2 pairs, policy and reference.
    found = told["estimate"]
    assert [found[name] for name in COUNTS] == [5, 20 * 8, 0]
    assert found["tflop"] * 1e12 == pytest.approx((3 * 20 + 8) * forward, rel=1e-12)
    assert found["evaluation_tflop"] * 1e12 == pytest.approx(2 * 2 * forward, rel=1e-12)
    # A reward model reads the last token of each response, and has no output head.
    scored = 2 * (matmul * 8 - skipped * (8 - 2)) + 4 * 16 * 30
    config = lab.config("train-rm", dataset_name=source, max_steps=3, reward_centering="none")
    found = estimate_stage(config, lab.home)["estimate"]
    assert found["tflop"] * 1e12 == pytest.approx(3 * 24 * scored, rel=1e-12)
    assert found["evaluation_tflop"] * 1e12 == pytest.approx(2 * scored, rel=1e-12)


@pytest.mark.check
@pytest.mark.slow
def test_the_bill_of_the_run_is_the_forecast(lab, tmp_path):
    source = write(tmp_path / "pairs.jsonl", pairs())
    same = {"dataset_name": source, "max_steps": 3, "output_name": "made"}
    lora = {"use_peft": True, "lora_r": 2}
    ppo = {"response_length": 1, "max_prompt_length": 6, "rollout_batch_size": 8, "num_mini_batches": 4}
    ppo |= {"per_device_train_batch_size": 2, "critic_warmup_steps": 1}
    cases = [
        ("sft", {"completion_only_loss": False}),
        ("train-rm", {"reward_centering": "none", "gradient_checkpointing": True}),
        ("dpo", lora),
        ("ppo", ppo),  # one token for each response, whatever it is
        ("ppo", {**ppo, "ptx_coef": 0.1, "ptx_dataset": source, "ptx_batch_size": 3, "ptx_max_length": 12}),
    ]
    for stage, changes in cases:
        config = {**same, **changes}
        found = estimate_stage(lab.config(stage, **config), lab.home)["estimate"]
        cost = lab.run(stage, **config).cost
        assert [found[name] for name in COUNTS[:2]] == [cost[name] for name in COUNTS[:2]], stage
        assert found["tokens_sampled"] == cost["tokens_generated"], stage
        assert found["tflop"] * 1e12 == pytest.approx(cost["flops"], rel=1e-9), stage


def test_time_of_work_by_hand():
    work = Work(2, 0, 30, 10, 1000, training=50.0, scoring=8.0, sampling=7.0, prefill=4.0, evaluation=2.0)
    speed = Speed("cpu", training=10.0, forward=4.0, bytes_per_second=32000.0, decoding_step=0.5, decoded_token=0.1)
    assert speed.seconds(work) == pytest.approx(
        {"training": 5.0 + 1.0, "scoring": 2.0, "sampling": 1.0 + 5.0 + 3.0, "evaluation": 0.5}
    )


@pytest.mark.check
@pytest.mark.slow
def test_an_experiment_before_its_models_and_data_exist(lab, tmp_path, capsys):
    """Rows of a `collect` stage: `num`, in the splits of its prompts; models: those of the root of the chain."""
    base = {"max_prompt_length": 6, "response_length": 4, "use_cpu": True, "num_threads": 1, "learning_rate": 1e-3}
    demonstrations = [{"prompt": words(3, n), "completion": " " + words(1, n)} for n in range(40)]
    splits = ["train"] * 20 + ["test"] * 15 + ["validation"] * 5
    rows = [{**row, "split": split} for row, split in zip(demonstrations, splits, strict=True)]
    source = write(tmp_path / "sft.jsonl", rows)
    trained = {**base, "per_device_train_batch_size": 5, "model_name_or_path": "tuned", "dataset_name": "fresh"}
    ppo = {"reward_model_path": "scored", "rollout_batch_size": 10, "num_mini_batches": 2, "total_episodes": 30}
    collect = {key: value for key, value in base.items() if key != "learning_rate"}
    stages = {
        "tuned": {**trained, "stage": "sft", "model_name_or_path": "sft@v1", "dataset_name": source},
        "fresh": {**collect, "stage": "collect", "policy": "tuned", "prompts": source, "judge": "world", "num": 60},
        "scored": {**trained, "stage": "train-rm", "reward_centering_samples": 8},
        "ppo": {**trained, **ppo, "stage": "ppo"},
        "dpo": {**trained, "stage": "dpo", "beta": 0.5},
    }
    compare = {"arms": ["ppo", "dpo"], "baseline": "tuned", "samples": 2, "max_prompts": 12, "use_cpu": True}
    text = {"name": "x", "seeds": [0, 1], "stages": stages, "compare": compare, "sweep": {"dpo.beta": [0.5, 1.0]}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    told = estimate_experiment(path, [], lab.home)
    found = told["estimates"]
    # 60 records cycle through 15 prompts of test, 20 of train, 5 of validation; the second time they end after 5 of
    # train. Responses have 2 tokens, as the demonstrations do.
    assert found["tuned"]["rows"] == 20 and found["tuned"]["tokens_trained"] == 20 * 5
    assert found["fresh"]["records"] == 60 and found["fresh"]["tokens_sampled"] == 60 * 2 * 2
    assert found["scored seed 0"]["rows"] == found["dpo beta=1 seed 1"]["rows"] == 25
    assert found["dpo beta=1 seed 1"]["optimizer_steps"] == 5
    assert found["dpo beta=1 seed 1"]["tokens_trained"] == 25 * (3 + 2 + 2)
    assert found["scored seed 1"]["tokens_sampled"] == 8 * 2
    ppo = found["ppo seed 0"]
    assert [ppo[name] for name in ("prompts", "updates", "episodes")] == [20, 3, 30]
    assert [ppo[name] for name in COUNTS] == [3 * 4 * 2, 4 * 30 * (3 + 2), 30 * 2]
    # Two seeds of PPO, two of DPO at two betas, the baseline; 12 prompts of test, and 5 of validation for the sweep.
    assert found["compare"]["prompts"] == 12
    assert found["compare"]["tokens_sampled"] == (2 + 4 + 1) * (12 + 5) * 2 * 2
    total = told["total"]
    for name in ("tokens_trained", "seconds", "tflop"):
        assert total[name] == pytest.approx(sum(one[name] for one in found.values())), name
    assert told["not_estimated"] == [] and any("responses are counted with 2 tokens" in line for line in told["about"])
    # A finished run is not counted; a table for people has a line for each of the others.
    defaults = dict.fromkeys(("max_steps", "logging_steps", "per_device_eval_batch_size"))
    values = {key: value for key, value in stages["tuned"].items() if key != "stage"}
    lab.run("sft", **defaults, **values, output_name="tuned")
    assert main(["run", str(path), "--home", str(lab.home), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "whole experiment: about" in said and "up to a factor of 2 either way" in said
    told = estimate_experiment(path, [], lab.home)
    assert told["stages"]["tuned"] == "sft: already done, tuned@v1" and set(found) - set(told["estimates"]) == {"tuned"}
    for name, one in told["estimates"].items():
        assert [one[key] for key in (*COUNTS, "tflop")] == [found[name][key] for key in (*COUNTS, "tflop")], name


def test_what_cannot_be_known_is_said(lab, tmp_path):
    config = lab.config(
        "dpo", dataset_name="world:verdicts", dataset_config="population", max_steps=2, label_smoothing=None
    )
    told = estimate_stage(config, lab.home)
    assert "machine" not in told and told["about"] == ["pairs are drawn at every step: their tokens are not known"]


def forecast(lab, tmp_path, *, num: int, dpo: dict, **changes):
    """The dry run of an experiment that collects to 2 prompts of test and then 8 of train, and trains DPO on it."""
    source = write(tmp_path / "pairs.jsonl", pairs())
    base = {"max_prompt_length": 6, "response_length": 4, "use_cpu": True, "num_threads": 1}
    collect = {**base, "stage": "collect", "policy": "sft@v1", "prompts": source, "judge": "world", "num": num}
    options = {"beta": 0.5, "learning_rate": 1e-3, "per_device_train_batch_size": 2}
    trained = {**base, **options, "stage": "dpo", "model_name_or_path": "sft@v1", **dpo}
    stages = {"fresh": {**collect, **changes.pop("fresh", {})}, "dpo": trained}
    text = {"name": "x", "stages": stages, "compare": {"arms": ["dpo"], "baseline": "sft@v1", "use_cpu": True}}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump({**text, **changes}, sort_keys=False))
    return estimate_experiment(path, [], lab.home)


def test_a_mixture_with_rows_to_come_is_counted(lab, tmp_path):
    """By hand: 6 records have the 2 prompts of test and 4 of train; the 4 and half of the 8 rows are the mixture."""
    parts = [{"dataset_name": "fresh"}, {"dataset_name": str(tmp_path / "pairs.jsonl")}]
    told = forecast(lab, tmp_path, num=6, dpo={"datasets": parts})
    assert told["estimates"]["fresh"]["records"] == 6
    dpo = told["estimates"]["dpo"]
    assert (dpo["rows"], dpo["optimizer_steps"]) == (8, 4)
    assert dpo["tokens_trained"] == 4 * (3 + 4 + 4) + 4 * (3 + 3 + 2)  # responses to come have the longest length
    assert told["not_estimated"] == ["compare"]
    assert any("its arms are trained on mixtures, so name its prompts" in line for line in told["about"])
    whole = [{**part, "fraction": 1.0} for part in parts]
    assert forecast(lab, tmp_path, num=6, dpo={"datasets": whole})["estimates"]["dpo"]["rows"] == 4 + 8
    few = [{**parts[0], "max_samples": 3}, parts[1]]
    assert forecast(lab, tmp_path, num=6, dpo={"datasets": few})["estimates"]["dpo"]["rows"] == 3 + 3


def test_rounds_are_counted_before_their_data_exist(lab, tmp_path):
    """Round 1 has the prompts of test and two of train, round 2 the next four of train, and trains on all six."""
    told = forecast(lab, tmp_path, num=4, dpo={"dataset_name": "fresh"}, rounds=2)
    assert told["estimates"]["dpo"]["rows"] == 2 and told["estimates"]["dpo-2"]["rows"] == 2 + 4
    assert told["not_estimated"] == []
    # Two rounds of an arm, the same with demonstrations, and the baseline: 4 samples to each of 2 prompts.
    alone = told["estimates"]["compare"]["tokens_sampled"] / 3
    compare = {"arms": ["dpo", "few_shot:dpo"], "baseline": "sft@v1", "use_cpu": True}
    both = forecast(lab, tmp_path, num=4, dpo={"dataset_name": "fresh"}, rounds=2, compare=compare)
    assert both["estimates"]["compare"]["tokens_sampled"] == 5 * alone > 0


def test_a_later_first_record_has_later_prompts(lab, tmp_path):
    told = forecast(lab, tmp_path, num=4, dpo={"dataset_name": "fresh"}, fresh={"first_record": 2})
    assert told["estimates"]["dpo"]["rows"] == 4
