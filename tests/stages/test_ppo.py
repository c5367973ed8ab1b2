"""PPO: what holds at the first update, what each option does, and where rewards come from."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.errors import ConfigError, RunFailed
from rlhf_pipeline.training.cost import CostMeter

ONE_STEP = {"num_ppo_epochs": 1, "num_mini_batches": 1, "per_device_train_batch_size": 16, "max_steps": 1}
WORLD = {"reward_model_path": None, "reward_functions": ["world"]}


def first(lab, **changes):
    return lab.rows(lab.run("ppo", **changes).run)[0]


def moves_of(lab, result):
    return lab.registry.resolve(result.model).manifest.moves_optimum


def log_of(result):
    return (Path(result.run) / "log.txt").read_text()


def test_at_the_first_update_the_policy_is_the_reference(lab):
    result = lab.run("ppo")
    rows = lab.rows(result.run)
    assert rows[0]["objective/kl"] == 0
    assert rows[0]["objective/kl_k3"] == 0
    assert rows[0]["objective/non_score_reward"] == 0
    assert rows[0]["objective/rlhf_reward"] == rows[0]["objective/scores"]
    assert all(row["first_minibatch/ratio_error"] <= 1e-5 for row in rows)
    assert all(row["first_minibatch/clipfrac"] == 0 for row in rows)
    assert rows[-1]["objective/kl_k3"] > 0


@pytest.mark.parametrize(("epochs", "minibatches", "updates"), [(1, 1, 2), (3, 2, 2), (2, 4, 3)])
def test_optimizer_steps_are_updates_x_epochs_x_minibatches(lab, epochs, minibatches, updates):
    result = lab.run(
        "ppo",
        num_ppo_epochs=epochs,
        num_mini_batches=minibatches,
        max_steps=updates,
        per_device_train_batch_size=4,
    )
    assert result.cost["optimizer_steps"] == epochs * minibatches * updates
    rows = lab.rows(result.run)
    assert [row["step"] for row in rows] == list(range(1, updates + 1))
    assert [row["episodes"] for row in rows] == [16 * n for n in range(1, updates + 1)]
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2 * (1 - n / updates) for n in range(updates)])
    # Every response is trained on once per epoch, together with its prompt of 6 tokens.
    # Each response once per epoch, and its prompt of 6 tokens, which the responses of a micro-batch to it share.
    prompts = result.cost["tokens_trained"] - epochs * result.cost["tokens_generated"]
    assert prompts % 6 == 0 and epochs * updates <= prompts / 6 <= epochs * 16 * updates


def test_the_first_update_of_a_warm_up_trains(lab):
    """Of w updates of warm-up, update u (from 1) has rate u / (w + 1); then the linear schedule starts at its peak."""
    result = lab.run("ppo", warmup_steps=2, max_steps=5)
    rows = lab.rows(result.run)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-2 * x for x in (1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)])
    assert rows[0]["policy/approxkl_avg"] > 0  # the policy moves within the first rollout's minibatches
    assert rows[1]["objective/kl_k3"] > 0


def test_a_warm_up_that_is_the_whole_run_trains(lab):
    result = lab.run("ppo", warmup_steps=0.1, max_steps=1)
    assert [row["learning_rate"] for row in lab.rows(result.run)] == [5e-3]
    before, after = lab.weights("sft"), lab.weights(result.model)
    assert max(float((before[name] - after[name]).abs().max()) for name in after) > 1e-3


def test_names_of_the_metrics(lab):
    expected = (
        "objective/kl objective/entropy objective/scores objective/rlhf_reward objective/non_score_reward "
        "policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg loss/value_avg "
        "val/ratio val/ratio_var val/num_eos_tokens val/clipfrac_avg"
    )
    assert set(expected.split()) <= set(first(lab))


@pytest.mark.parametrize("value_init", ["sft", "shared"])
def test_a_critic_that_starts_at_0_explains_nothing(lab, value_init):
    """With V = 0, KL 0 and lambda 1 the return of every token is its response's score."""
    result = lab.run("ppo", value_init=value_init, lam=1.0, **ONE_STEP)
    row = lab.rows(result.run)[0]
    assert row["val/explained_variance"] == 0
    # The squared error of V = 0, weighted by tokens: between its value for equal lengths and its bounds.
    assert row["loss/value_avg"] > 0
    assert "0" in log_of(result) and "critic:" in log_of(result)
    other = {"sft": "shared", "shared": "sft"}[value_init]
    assert first(lab, output_name="other", value_init=other, lam=1.0, **ONE_STEP)["loss/value_avg"] == pytest.approx(
        row["loss/value_avg"], rel=1e-5
    )


def test_the_first_value_loss_in_closed_form(lab, function):
    """A reward of 2 for every response, V = 0 and lambda 1: 0.5 (0 - 2)^2 = 2 for every token, unclipped at step 0."""
    reward = {
        "reward_model_path": None,
        "reward_functions": [function(lambda prompts, completions, **_: [2.0] * len(prompts))],
    }
    row = first(lab, **reward, lam=1.0, **ONE_STEP)
    assert row["loss/value_avg"] == pytest.approx(2.0, abs=1e-6)
    assert row["objective/scores"] == 2.0
    assert row["objective/scores_std"] == 0.0
    assert row["loss/policy_avg"] == pytest.approx(0, abs=1e-6)  # whitened advantages of one value are 0


def test_a_critic_from_the_reward_model_has_its_own_trunk(lab):
    result = lab.run("ppo", **ONE_STEP)
    assert "initialised from the reward model reward@v1" in log_of(result)
    assert result.cost["flops"] > lab.run("ppo", output_name="s", value_init="shared", **ONE_STEP).cost["flops"]


def test_a_missing_eos_penalty_comes_off_the_score_of_cut_responses(lab):
    plain, fined = first(lab, output_name="a"), first(lab, output_name="b", missing_eos_penalty=3.0)
    assert plain["val/ended"] == fined["val/ended"] < 1
    expected = plain["objective/scores"] - 3.0 * (1 - plain["val/ended"])
    assert fined["objective/scores"] == pytest.approx(expected, abs=1e-5)
    assert plain["val/num_eos_tokens"] == 16 * plain["val/ended"]


@pytest.mark.parametrize(
    "option",
    [
        {"missing_eos_penalty": 1.0},
        {"whiten_rewards": True},
        {"gamma": 0.9},
        {"temperature": 0.7},
        {"kl_coef": 0.0},
        {"vf_coef": 0.0},
        {"weight_decay": 0.1},
    ],
)
def test_what_moves_the_optimum_is_recorded(lab, option):
    result = lab.run("ppo", **option, max_steps=1)
    assert moves_of(lab, result) == option
    assert "move the optimum" in log_of(result)
    assert moves_of(lab, lab.run("ppo", output_name="plain", max_steps=1)) == {}


def test_what_moved_the_reward_model_is_carried_to_the_policies_trained_on_it(lab):
    """The rule: what changes the minimiser of a reward model belongs to the optimum of PPO on it."""
    shrunk = lab.run("train-rm", output_name="shrunk", center_rewards_coefficient=0.1, weight_decay=0.01, max_steps=1)
    own = {"center_rewards_coefficient": 0.1, "weight_decay": 0.01}
    assert moves_of(lab, shrunk) == own
    assert "move the minimiser of the reward model: weight_decay=0.01, center_rewards_coefficient=0.1" in log_of(shrunk)
    carried = {f"reward_model.{name}": value for name, value in own.items()}
    one = lab.run("ppo", reward_model_path="shrunk", gamma=0.9, max_steps=1)
    assert moves_of(lab, one) == {"gamma": 0.9, **carried}
    assert "reward_model.center_rewards_coefficient=0.1" in log_of(one)
    both = [{"source": "reward", "weight": 1.0}, {"source": "shrunk", "weight": 1.0}]
    second = lab.run("ppo", output_name="both", reward_model_path=None, reward_functions=both, max_steps=1)
    assert moves_of(lab, second) == {f"reward_model_2.{name}": value for name, value in own.items()}


def test_what_moves_the_optimum_with_a_wrong_critic_is_recorded_apart(lab):
    default, unbiased = lab.run("ppo", max_steps=1), lab.run("ppo", output_name="unbiased", lam=1.0, max_steps=1)
    assert lab.registry.resolve(default.model).manifest.may_move_optimum == {"lam": 0.95}
    assert lab.registry.resolve(unbiased.model).manifest.may_move_optimum == {}
    assert moves_of(lab, default) == moves_of(lab, unbiased) == {}
    assert "lam=0.95 does not move the optimum if the critic is exact" in log_of(default)
    assert "critic is exact" not in log_of(unbiased)


def test_whitened_rewards_train_another_model(lab):
    plain, whitened = lab.run("ppo", output_name="a"), lab.run("ppo", output_name="b", whiten_rewards=True)
    ours, theirs = lab.weights(plain.model), lab.weights(whitened.model)
    assert any(not torch.equal(ours[name], theirs[name]) for name in ours)
    assert lab.rows(plain.run)[0]["objective/scores"] == lab.rows(whitened.run)[0]["objective/scores"]


def test_normalisation_by_sequences_divides_by_their_full_length(lab):
    by_tokens = first(lab, output_name="a", **ONE_STEP)
    by_sequences = first(lab, output_name="b", loss_normalization="sequences", **ONE_STEP)
    share = by_tokens["val/response_length"] / 4  # sampled tokens over 16 sequences of 4
    assert share < 1
    for name in ("loss/value_avg", "loss/policy_avg"):
        assert by_sequences[name] == pytest.approx(by_tokens[name] * share, rel=1e-5, abs=1e-7)
    assert by_sequences["val/ratio"] == pytest.approx(by_tokens["val/ratio"])


@pytest.mark.parametrize("value_init", ["reward_model", "sft", "shared"])
def test_during_the_critics_warm_up_the_actor_stays_bit_for_bit(lab, value_init):
    result = lab.run(
        "ppo",
        value_init=value_init,
        critic_warmup_steps=2,
        max_steps=3,
        snapshot_steps=[1, 2, 3],
        weight_decay=0.1,
    )
    start = lab.weights("sft")
    for step, moved in ((1, False), (2, False), (3, True)):
        found = lab.weights(f"{result.model}#{step}")
        assert any(not torch.equal(found[name], start[name]) for name in start) is moved
    rows = lab.rows(result.run)
    assert [row["objective/kl"] for row in rows] == [0, 0, 0]
    assert rows[0]["grad_norm"] > 0  # the critic does learn


def test_another_stop_token_ends_responses(lab, function):
    seen = []

    def judge(prompts, completions, completion_ids, ended, **_):
        seen.extend(zip(completions, completion_ids, ended, strict=True))
        return [float(flag) for flag in ended]

    result = lab.run("ppo", reward_model_path=None, reward_functions=[function(judge)], stop_token="and", max_steps=4)
    from rlhf_pipeline.data.world import EOS_ID, encode

    stops = {*encode("and"), EOS_ID}
    assert {ids[-1] for _, ids, ended in seen if ended} == stops
    for text, ids, ended in seen:
        assert [place for place, token in enumerate(ids) if token in stops] == [len(ids) - 1] * ended
        assert ended or len(ids) == 4
        assert "and" not in text.split()
    generation = json.loads((lab.registry.resolve(result.model).path / "generation_config.json").read_text())
    assert set(generation["eos_token_id"]) == stops
    rows = lab.rows(result.run)
    assert [row["objective/scores"] for row in rows] == [row["val/ended"] for row in rows]


def test_a_stop_token_must_be_one_of_the_vocabulary(lab):
    with pytest.raises(ConfigError, match="stop_token"):
        lab.run("ppo", stop_token="nowhere")


def test_a_reward_function_sees_texts_and_ids(lab, function):
    from rlhf_pipeline.data import world

    calls = []

    def judge(prompts, completions, completion_ids, ended, **_):
        calls.append((prompts, completions, completion_ids, ended))
        return [float(len(text.split())) for text in completions]

    row = first(lab, reward_model_path=None, reward_functions=[function(judge)], max_steps=1)
    rows = [item for call in calls for item in zip(*call, strict=True)]
    assert len(rows) == 16
    for prompt, completion, ids, ended in rows:
        assert prompt.startswith("the ") and prompt.endswith(" was")
        words = ids[:-1] if ended else ids
        assert (ids[-1] == world.EOS_ID) == ended
        assert [world.encode(word)[0] for word in completion.split()] == words or world.PAD_ID in words
    expected = sum(len(completion.split()) for _, completion, _, _ in rows) / 16
    assert row["objective/scores"] == pytest.approx(expected)


def test_rewards_add_up_with_their_weights(lab, function):
    name = function(lambda prompts, completions, **_: [1.0] * len(prompts))
    alone = first(lab, output_name="a", **WORLD, max_steps=1)["objective/scores"]
    terms = [{"source": "world", "weight": 0.5}, {"source": name, "weight": 3.0}]
    both = lab.run("ppo", output_name="b", reward_model_path=None, reward_functions=terms, max_steps=1)
    assert lab.rows(both.run)[0]["objective/scores"] == pytest.approx(0.5 * alone + 3.0, abs=1e-5)
    assert "reward_functions" in moves_of(lab, both)


def test_the_worlds_reward_by_hand(lab, function):
    from rlhf_pipeline.data import world

    seen = []

    def judge(prompts, completions, completion_ids, ended, **_):
        ids = [world.encode(prompt) for prompt in prompts]
        seen.extend(world.verdicts(ids, completion_ids, ended).reward.tolist())
        return [0.0] * len(prompts)

    terms = ["world", {"source": function(judge), "weight": 1.0}]
    row = first(lab, reward_model_path=None, reward_functions=terms, max_steps=1)
    assert row["objective/scores"] == pytest.approx(sum(seen) / 16, abs=1e-5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda prompts, completions, **_: [0.0], "one per completion"),
        (lambda prompts, completions, **_: ["good"] * len(prompts), "numbers"),
        (lambda prompts, completions, **_: [math.nan] * len(prompts), "expected a finite number"),
    ],
)
def test_a_reward_function_that_answers_nonsense_ends_the_run(lab, function, answer, message):
    with pytest.raises(RunFailed, match=message):
        lab.run("ppo", reward_model_path=None, reward_functions=[function(answer)])
    assert not lab.registry.models.numbers("ppo")


def test_a_reward_function_that_does_not_exist(lab):
    with pytest.raises(ConfigError, match="no_such_module:judge"):
        lab.run("ppo", reward_model_path=None, reward_functions=["no_such_module:judge"])


def test_prompts_come_once_each_and_all_of_them_in_turn(lab, function):
    """The pairs' training split has 20 prompts: 5 updates of 16 see each of them four times."""
    seen = []

    def judge(prompts, completions, **_):
        seen.extend(prompts)
        return [0.0] * len(prompts)

    result = lab.run("ppo", reward_model_path=None, reward_functions=[function(judge)], max_steps=5)
    assert result.metrics["prompts"] == 20
    assert sorted(seen.count(prompt) for prompt in set(seen)) == [4] * 20
    assert lab.rows(result.run)[-1]["epoch"] == 4.0


def test_ppo_raises_the_reward_that_it_is_given(lab, function):
    judge = function(lambda prompts, completions, **_: [float("great" in text.split()) for text in completions])
    result = lab.run(
        "ppo",
        reward_model_path=None,
        reward_functions=[judge],
        kl_coef=0.01,
        rollout_batch_size=64,
        per_device_train_batch_size=32,
        max_steps=25,
        learning_rate=2e-2,
    )
    rows = lab.rows(result.run)
    assert sum(row["objective/scores"] for row in rows[-3:]) / 3 > rows[0]["objective/scores"] + 0.3
    assert rows[-1]["objective/kl"] > 0.1


def test_while_the_critic_warms_up_the_actor_costs_a_forward_pass_only(lab, monkeypatch):
    """One step an update: both train the critic, only the second trains the actor, which alone has an output head."""
    trained, train = [], CostMeter.train

    def recorded(meter, shape, batch):
        trained.append("actor" if shape.head else "critic")
        train(meter, shape, batch)

    monkeypatch.setattr(CostMeter, "train", recorded)
    lab.run("ppo", **{**ONE_STEP, "max_steps": 2, "critic_warmup_steps": 1})
    assert (trained[0], sorted(trained[1:])) == ("critic", ["actor", "critic"])
