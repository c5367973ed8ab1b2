"""The gate of a reward model: its verdict by hand, in the manifest, and at the start of PPO."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_pipeline.stages.gate import CUT, cut_minus_ended, gate_of, prefers_cut, warn_of_cut_responses

PROMPTS = [f"prompt {number}" for number in range(10)]


def signs(text):
    """Score differences: + right, - wrong, 0 a tie."""
    return [{"+": 2.0, "-": -0.5, "0": 0.0}[sign] for sign in text]


def log_of(result):
    return (Path(result.run) / "log.txt").read_text().splitlines()


def test_a_model_that_beats_everything_passes():
    gate = gate_of(signs("++++++++++"), {"longer_wins": signs("-----+++++"), "tfidf": signs("+++++-----")}, PROMPTS)
    assert gate["passed"] is True
    assert gate["beats"] == {"coin": True, "longer_wins": True, "tfidf": True}
    # Ten differences, five of 1 and five of 0: mean .5, deviation sqrt(2.5 / 9), t(.975, 9) = 2.2621572.
    half = 2.2621572 * (2.5 / 9 / 10) ** 0.5
    expected = {"mean": 0.5, "low": 0.5 - half, "high": 0.5 + half}
    assert gate["differences"]["tfidf"] == pytest.approx(expected, abs=1e-6)
    assert "not certain" not in gate["reason"]


def test_one_baseline_that_is_better_is_enough_to_fail():
    gate = gate_of(signs("+++++++++-"), {"longer_wins": signs("----------"), "tfidf": signs("++++++++++")}, PROMPTS)
    assert (gate["passed"], gate["beats"]) == (False, {"coin": True, "longer_wins": True, "tfidf": False})
    assert "held-out accuracy 0.900" in gate["reason"]
    assert "does not beat tfidf, difference -0.100" in gate["reason"]
    assert "does not beat longer_wins" not in gate["reason"]


def test_a_tie_is_not_a_victory_and_counts_one_half():
    gate = gate_of(signs("++++++++00"), {"longer_wins": signs("+++++++++-"), "tfidf": signs("000000000-")}, PROMPTS)
    assert gate["differences"]["longer_wins"]["mean"] == pytest.approx(0)
    # .9 against 9 x .5 / 10 = .45
    assert gate["differences"]["tfidf"]["mean"] == pytest.approx(0.45)
    assert gate["beats"] == {"coin": True, "longer_wins": False, "tfidf": True}


@pytest.mark.parametrize("right", ["++++++++++", "+++++++++-"])
def test_a_model_that_is_as_accurate_as_length_does_not_beat_it(right):
    """Not even where both are right on every pair: it may have learned length and nothing else."""
    gate = gate_of(signs(right), {"longer_wins": signs(right), "tfidf": signs("----------")}, PROMPTS)
    assert (gate["passed"], gate["beats"]) == (False, {"coin": True, "longer_wins": False, "tfidf": True})
    assert "does not beat longer_wins, difference 0.000" in gate["reason"]
    assert "equal accuracy" in gate["reason"]


def test_rounding_is_no_victory():
    """Five prompts of three pairs: the differences -1, -2/3, -1/3, 1 and 1 add up to more than 0 in floating point."""
    prompts = [f"prompt {number // 3}" for number in range(15)]
    own, theirs = "---" + "--+" + "-++" + "+++" + "+++", "+++" + "+++" + "+++" + "---" + "---"
    gate = gate_of(signs(own), {"longer_wins": signs(theirs)}, prompts)
    assert gate["beats"]["longer_wins"] is False


def test_a_narrow_victory_is_called_one():
    """One pair of ten ahead: beaten by the figure, with an interval that contains 0."""
    gate = gate_of(signs("++++++++++"), {"longer_wins": signs("+++++++++-")}, PROMPTS)
    assert gate["passed"] is True
    assert "beats longer_wins, difference 0.100" in gate["reason"] and "not certain" in gate["reason"]


def test_a_coin_that_is_luckier_than_its_rivals_fails():
    gate = gate_of(signs("++++++----"), {"longer_wins": signs("+++++-----")}, PROMPTS)
    assert (gate["passed"], gate["beats"]) == (False, {"coin": False, "longer_wins": True})
    assert "may be no better than a coin" in gate["reason"]


def test_pairs_of_one_prompt_count_as_one_opinion():
    """Ten pairs that are all right, of two prompts: too few to pass."""
    gate = gate_of(signs("++++++++++"), {"longer_wins": signs("----------")}, PROMPTS[:2] * 5)
    assert gate["passed"] is False
    assert "found 2 held-out prompts" in gate["reason"]


def random_pairs(path):
    """Pairs of the built-in world whose chosen side is a toss of a coin, with 40 prompts to hold out."""
    from rlhf_pipeline.data.world.vocabulary import ADJECTIVES, ASPECTS, FRAME, GENRES, MODIFIERS

    draw = random.Random(4)
    rows = []
    for _ in range(40):
        prompt = " ".join(draw.choices(FRAME + GENRES + ASPECTS, k=6))
        for _ in range(4):
            # Both sides are as long as each other, so that length is a coin as well.
            sides = [" " + " ".join(draw.sample(ADJECTIVES + MODIFIERS, k=3)) for _ in range(2)]
            rows.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def on_random_labels(lab, tmp_path):
    """A reward model trained on random labels."""
    return lab.run(
        "train-rm",
        output_name="coin",
        dataset_name=random_pairs(tmp_path / "random.jsonl"),
        split_fractions={"train": 0.5, "test": 0.5},
        max_steps=20,
    )


def test_random_labels_fail_the_gate_and_ppo_repeats_it(lab, on_random_labels):
    result = on_random_labels
    gate = result.metrics["gate"]
    assert (gate["passed"], gate["beats"]["coin"]) == (False, False)
    assert set(gate["beats"]) == {"coin", "longer_wins", "tfidf"}
    for name, baseline in result.metrics["baselines"].items():
        difference = result.metrics["accuracy"] - baseline["accuracy"]
        assert gate["differences"][name]["mean"] == pytest.approx(difference, abs=1e-9)
        assert gate["beats"][name] is (difference > 0)
    assert lab.registry.resolve("coin").manifest.metrics["gate"] == gate
    assert [line for line in log_of(result) if line.startswith("WARNING") and gate["reason"] in line]

    ppo = lab.run("ppo", reward_model_path="coin", max_steps=1)
    (line,) = [line for line in log_of(ppo) if line.startswith("WARNING: reward model")]
    assert "coin@v1: failed its gate" in line and gate["reason"] in line
    assert f"held-out accuracy {result.metrics['accuracy']:.3f}" in line


def test_a_gate_that_was_passed_is_not_mentioned(lab):
    """On its own training pairs a reward model that was trained for long beats everything."""
    options = {"max_steps": 100, "per_device_train_batch_size": 512, "learning_rate": 2e-2}
    pairs = lab.run("train-rm", output_name="good", dataset_test_split="train", **options)
    assert pairs.metrics["gate"]["passed"], pairs.metrics["gate"]["reason"]
    assert not [line for line in log_of(pairs) if line.startswith("WARNING")]
    ppo = lab.run("ppo", reward_model_path="good", max_steps=1)
    assert not [line for line in log_of(ppo) if "gate" in line]


def test_without_held_out_pairs_there_is_no_gate_and_ppo_says_so(lab, tmp_path):
    """All prompts are in the train split: the reward model's quality is not known."""
    options = {"dataset_name": random_pairs(tmp_path / "pairs.jsonl"), "split_fractions": {"train": 1.0}}
    result = lab.run("train-rm", output_name="unseen", **options)
    assert "gate" not in result.metrics
    ppo = lab.run("ppo", reward_model_path="unseen", max_steps=1)
    (line,) = [line for line in log_of(ppo) if line.startswith("WARNING: reward model")]
    assert "unseen@v1" in line and "trained without held-out pairs" in line


def test_a_reward_model_of_elsewhere_has_no_gate(lab, tmp_path):
    exported = lab.registry.export("reward", tmp_path / "elsewhere")
    (exported / "manifest.json").unlink(missing_ok=True)
    ppo = lab.run("ppo", reward_model_path=str(exported), max_steps=1)
    (line,) = [line for line in log_of(ppo) if line.startswith("WARNING: reward model")]
    assert "not in this registry" in line


def test_a_true_reward_needs_no_gate(lab):
    ppo = lab.run("ppo", reward_model_path=None, reward_functions=["world"], max_steps=1)
    assert not [line for line in log_of(ppo) if "gate" in line]


def test_cut_responses_against_ended_ones_by_hand():
    """Means 4 and 1, squared errors 1 and 1/3, so (4/3)^2 / (1 + 1/18) = 32/19 degrees of freedom (Welch)."""
    found = cut_minus_ended([3.0, 0.0, 5.0, 1.0, 2.0], [False, True, False, True, True], 0)
    half = 5.1762316 * (4 / 3) ** 0.5  # t(.975, 32/19)
    assert found == pytest.approx(
        {"mean": 3, "low": 3 - half, "high": 3 + half, "cut": 2, "ended": 3, "cut_in_training": 0}, abs=1e-6
    )
    assert prefers_cut(found) is None  # the interval contains 0
    assert cut_minus_ended([3.0, 0.0, 1.0], [False, True, True], 0) is None


def test_a_model_that_likes_cut_responses_is_told_so_once_it_is_certain_and_never_learned_to():
    found = cut_minus_ended([9.0, 9.1, 9.2, 0.0, 0.1, 0.2], [False] * 3 + [True] * 3, 0)
    assert "scores responses that the limit cut 9 [" in prefers_cut(found)
    assert prefers_cut({**found, "cut_in_training": 1}) is None and prefers_cut(None) is None
    said = []
    for metrics in ({CUT: found}, {}, {CUT: {**found, "low": -1.0}}):
        model = SimpleNamespace(label="reward@v1", manifest=SimpleNamespace(metrics=metrics))
        warn_of_cut_responses([model], lambda line, style: said.append(line))
    assert len(said) == 1 and said[0].startswith(
        "WARNING: reward model reward@v1 scores responses that the limit cut 9 "
    )
    assert "missing_eos_penalty" in said[0]


@pytest.mark.check
def test_a_run_stores_how_it_scores_cut_responses(lab):
    found = lab.registry.resolve(lab.run("train-rm", max_steps=1).model).manifest.metrics[CUT]
    assert found["cut"] + found["ended"] == 64
    [path] = (lab.home / "data").rglob("*.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    cut = [row[f"{which}_ended"] for row in rows if row["split"] == "train" for which in ("chosen", "rejected")].count(
        False
    )
    assert found["cut_in_training"] == cut > 0
    assert found["low"] < found["mean"] < found["high"]
