"""The reward model: its zero point, its baselines, its files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.rollout.responses import sample_for_prompts
from rlhf_pipeline.stages.common import load_policy, load_reward_model, tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.stages.reward_quality import score_examples

CPU = torch.device("cpu")


def read(lab, reference, config):
    """A reward model, its tokenizer and its training pairs."""
    resolved = lab.registry.resolve(reference)
    tokenizer = tokenizer_of(resolved)
    examples, _ = StageData(config, lab.home, lambda _: None).split("pair", "train", tokenizer)
    return load_reward_model(resolved, config, CPU), tokenizer, examples


def mean(rows, column=None):
    values = [value for row in rows for value in (row if column is None else [row[column]])]
    return sum(values) / len(values)


def test_samples_of_the_parent_score_0_on_average(lab):
    changes = {"reward_centering_samples": 96, "seed": 3}
    result, config = lab.run("train-rm", **changes), lab.config("train-rm", **changes)
    model, tokenizer, examples = read(lab, result.model, config)
    policy = load_policy(lab.registry.resolve("sft"), config, tokenizer, CPU, frozen=True)
    distinct = list({example.prompt_key: example for example in examples}.values())
    sampled, _ = sample_for_prompts(
        policy,
        [distinct[i % len(distinct)] for i in range(96)],
        samples=1,
        response_length=4,
        stop_ids=[tokenizer.eos_token_id],
        generator=torch.Generator().manual_seed(3),
        responses_at_once=96,
    )
    scores = score_examples(model, sampled, responses_at_once=32, device=CPU)
    assert mean(scores) == pytest.approx(0, abs=1e-5)
    assert result.metrics["reward_shift"] == model.reward_shift != 0
    # The samples are not one and the same: their scores spread.
    assert max(row[0] for row in scores) - min(row[0] for row in scores) > 0.1


def test_chosen_responses_score_0_on_average(lab):
    result = lab.run("train-rm", reward_centering="chosen")
    model, _, examples = read(lab, result.model, lab.config("train-rm"))
    scores = score_examples(model, examples, responses_at_once=32, device=CPU)
    assert mean(scores, 0) == pytest.approx(0, abs=1e-5)
    assert abs(mean(scores, 1)) > 1e-3


def test_without_centering_there_is_no_shift(lab):
    plain, centred = (lab.run("train-rm", reward_centering=how) for how in ("none", "chosen"))
    assert plain.metrics["reward_shift"] == 0
    assert read(lab, plain.model, lab.config("train-rm"))[0].reward_shift == 0
    ours, theirs = lab.weights(plain.model), lab.weights(centred.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # a constant changes no weight


def test_plain_transformers_loads_it_with_the_same_scores_up_to_the_shift(lab):
    from transformers import AutoModelForSequenceClassification

    result = lab.run("train-rm")
    plain = AutoModelForSequenceClassification.from_pretrained(result.path)
    assert (plain.config.num_labels, plain.config.reward_shift) == (1, result.metrics["reward_shift"])
    model, tokenizer, examples = read(lab, result.model, lab.config("train-rm"))
    scores = score_examples(model, examples[:20], responses_at_once=8, device=CPU)
    for example, row in zip(examples[:20], scores, strict=True):
        for completion, score in zip(example.completions, row, strict=True):
            ids = example.prompt_ids + completion
            if ids[-1] == tokenizer.pad_token_id:
                continue  # the pooling of transformers skips a final PAD, which may be sampled
            with torch.no_grad():
                logit = plain(input_ids=torch.tensor([ids])).logits.item()
            assert score == pytest.approx(logit - plain.config.reward_shift, abs=1e-5)


def test_the_first_loss_and_the_pairs_that_are_learned(lab):
    result = lab.run("train-rm", max_steps=60, per_device_train_batch_size=512, dataset_test_split="train")
    rows = lab.rows(result.run)
    assert rows[-1]["loss/bradley_terry"] < rows[0]["loss/bradley_terry"]
    assert result.metrics["accuracy"] > 0.55
    assert result.metrics["nll"] < math.log(2)


def test_baselines_and_the_ceiling_are_reported(lab):
    result = lab.run("train-rm")
    metrics = result.metrics
    assert set(metrics["baselines"]) == {"longer_wins", "tfidf"}
    for baseline in metrics["baselines"].values():
        assert baseline["accuracy_low"] <= baseline["accuracy"] <= baseline["accuracy_high"]
    assert 0.5 < metrics["bayes_accuracy"] < 1
    assert {"mean_score_ended", "mean_score_cut", "ece", "brier", "nll"} <= set(metrics)
    log = (Path(result.run) / "log.txt").read_text()
    assert "longer_wins" in log and "held-out accuracy" in log


def test_a_model_that_beats_no_baseline_is_told_so(lab):
    lab.run("train-rm", learning_rate=1e-8, max_steps=1)
    (run,) = (lab.home / "runs").iterdir()
    metrics = lab.registry.resolve("scored").manifest.metrics
    best = max(value["accuracy"] for value in metrics["baselines"].values())
    assert ("does not beat" in (run / "log.txt").read_text()) == (metrics["accuracy"] <= best)


def test_longer_wins_by_hand(lab):
    _, _, examples = read(lab, "reward", lab.config("train-rm"))
    from rlhf_pipeline.stages.reward_quality import baselines

    some = examples[:30]
    by_prompt: dict[str, list[float]] = {}
    for example in some:
        longer = len(example.completions[0]) - len(example.completions[1])
        by_prompt.setdefault(example.prompt_key, []).append(0.5 if longer == 0 else float(longer > 0))
    means = [sum(values) / len(values) for values in by_prompt.values()]
    assert baselines(some, some)["longer_wins"]["accuracy"] == pytest.approx(sum(means) / len(means))


def test_mean_pooling_is_kept_in_the_config(lab):
    result = lab.run("train-rm", score_pooling="mean")
    model, _, examples = read(lab, result.model, lab.config("train-rm"))
    assert model.pooling == "mean"
    assert "transformers itself reads only the last token" in (Path(result.run) / "log.txt").read_text()
    scores = score_examples(model, examples[:8], responses_at_once=8, device=CPU)
    example, completion = examples[0], examples[0].completions[0]
    with torch.no_grad():
        hidden = model.model.model(input_ids=torch.tensor([example.prompt_ids + completion])).last_hidden_state[0]
        expected = model.model.score(hidden[len(example.prompt_ids) :].mean(0)).item() - model.reward_shift
    assert scores[0][0] == pytest.approx(expected, abs=1e-5)


def test_the_centering_term_pulls_scores_to_0(lab):
    plain = lab.rows(lab.run("train-rm", max_steps=30).run)[-1]
    pulled = lab.rows(lab.run("train-rm", max_steps=30, center_rewards_coefficient=1.0).run)[-1]
    size = [abs(row["chosen_score"] + row["rejected_score"]) for row in (plain, pulled)]
    assert size[1] < 0.5 < size[0]


def test_the_calibration_slope_is_that_of_the_held_out_pairs(lab):
    """Where the slope is s, sum over held-out pairs of d sigma(-s d) / pairs of the prompt is 0."""
    result = lab.run("train-rm", max_steps=8)
    found = result.metrics["calibration_slope"]
    resolved, config = lab.registry.resolve(result.model), lab.config("train-rm")
    tokenizer = tokenizer_of(resolved)
    pairs, _ = StageData(config, lab.home, lambda _: None).split("pair", "test", tokenizer)
    model = load_reward_model(resolved, config, CPU)
    scores = score_examples(model, pairs, responses_at_once=32, device=CPU)
    prompts = [pair.prompt_key for pair in pairs]
    total = 0.0
    for (chosen, rejected), prompt in zip(scores, prompts, strict=True):
        d = chosen - rejected
        total += d / (1 + math.exp(found["mean"] * d)) / prompts.count(prompt)
    assert abs(total) < 1e-4 and found["low"] < found["mean"] < found["high"]
    assert found["clusters"] == len(set(prompts)) and found["n"] == len(pairs)
    assert resolved.manifest.metrics["calibration_slope"] == found
    assert f"calibration slope {found['mean']:.3f}" in (Path(result.run) / "log.txt").read_text()


def test_margins_that_separate_the_labels_have_no_slope(lab, rankings):
    """One held-out pair is ordered rightly or wrongly: no finite slope is most likely."""
    row = {"completions": [" great", " awful"], "ranks": [1, 2]}
    prompts = {"train": "the plot of this comedy was", "test": "the music of this drama was"}
    rows = [row | {"prompt": prompt, "split": split} for split, prompt in prompts.items()]
    result = lab.run("train-rm", dataset_name=rankings(rows=rows), max_steps=1)
    found = result.metrics["calibration_slope"]
    assert found["mean"] is None and "no finite slope fits" in found["why_not"]
    assert f"calibration slope: {found['why_not']}" in (Path(result.run) / "log.txt").read_text()
