"""The monitor: patience, relief, its state; and what real runs say of their health."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from rlhf_pipeline.health.monitor import FIRST, RECENT, Facts, History, Monitor, Watch, facts_of
from rlhf_pipeline.health.watches import WATCHES
from rlhf_pipeline.registry.card import model_card
from rlhf_pipeline.rollout import rollout
from rlhf_pipeline.training import ppo_rollouts, session


def over_2(history, facts):
    value = history.recent("x", 1)[0]
    return value if value > 2 else None


def alarm(total=10, **options):
    return Monitor([Watch("high", ("x",), over_2, "it is high", "turn it down", **options)], Facts(total, 1))


def feed(monitor, values, start=1):
    return [[f.cause for f in monitor.update(step, {"x": x})] for step, x in enumerate(values, start)]


def test_patience_relief_and_return():
    monitor = alarm(patience=2, relief=3)
    #                              1  2  3  4  5  6  7  8  9 10 11 12 13
    named = feed(monitor, map(float, [3, 1, 3, 4, 1, 1, 5, 1, 1, 1, 3, 3, 3]))
    assert [step for step, causes in enumerate(named, 1) if causes] == [4, 12]
    first, second = monitor.findings
    assert (first.since_step, first.until_step, first.value) == (3, 7, 4.0)
    assert monitor.lasting() == {"health/high": 3.0}
    assert (second.since_step, second.until_step, second.value) == (11, None, 3.0)


def test_hovering_about_the_limit_is_one_finding():
    """Seen at steps 5, 10, 15 and 20 of 60: over when a tenth of the run, 6 steps, has passed without it."""
    monitor = alarm(total=60, relief=2)
    named = feed(monitor, [3.0 if step % 5 == 0 and step <= 20 else 1.0 for step in range(1, 26)])
    assert [step for step, causes in enumerate(named, 1) if causes] == [5]
    assert [(f.since_step, f.until_step) for f in monitor.findings] == [(5, None)]
    feed(monitor, [1.0], 26)
    assert [(f.since_step, f.until_step) for f in monitor.findings] == [(5, 20)]


def test_a_watch_looks_only_when_its_figure_arrives():
    monitor = alarm(patience=2)
    feed(monitor, [3.0])
    monitor.update(2, {"y": 1.0})
    assert [f.since_step for f in monitor.update(3, {"x": 3.0})] == [1]


def test_the_history_is_bounded_and_leaves_out_what_is_not_finite():
    history = History(["x"])
    for step in range(1, 201):
        history.add(step, {"x": float(step), "y": 0.0})
    history.add(201, {"x": math.nan})
    assert history.first("x", FIRST) == [float(n) for n in range(1, FIRST + 1)]
    assert history.first("x", FIRST + 1) == []
    assert history.recent("x") == [float(n) for n in range(201 - RECENT, 201)]
    assert history.recent("x", 2) == [199.0, 200.0]
    assert history.recent("x", RECENT + 1) == []


def test_a_figure_at_the_updates_that_have_another():
    history = History(["x with y", "step with y"])
    for step, (x, y) in enumerate([(1.0, 5.0), (2.0, None), (3.0, math.nan), (math.inf, 6.0), (4.0, 7.0)], 1):
        history.add(step, {"x": x} if y is None else {"x": x, "y": y})
    assert history.recent("x with y") == [1.0, 4.0]
    assert history.recent("step with y") == [1.0, 4.0, 5.0]


def test_what_is_known_when_it_is_named_fills_the_blanks():
    watch = Watch(
        "high",
        ("x",),
        over_2,
        "it is {x:.1f}",
        "stop at {step}",
        blanks=lambda h, f: {"x": h.recent("x")[-1], "step": 7},
    )
    (found,) = Monitor([watch], Facts(10, 1)).update(1, {"x": 3.25})
    assert (found.message, found.knob) == ("it is 3.2", "stop at 7")
    assert alarm().watches[0].message == "it is high"


def test_a_state_that_went_through_json_goes_on_as_if_nothing_had_happened():
    values = [1.0, 3.0, 0.1, 3.3, 3.7, 1.0, 1.0, 4.0, 4.0, 1.0, 1.0, 1.0, 3.0]
    whole = alarm(patience=2, relief=2)
    expected = feed(whole, values)
    for cut in range(len(values)):
        before, later = alarm(patience=2, relief=2), alarm(patience=2, relief=2)
        feed(before, values[:cut])
        later.restore(json.loads(json.dumps(before.state())))
        assert feed(later, values[cut:], cut + 1) == expected[cut:]
        assert later.report() == whole.report()


# Real runs.

CONSTANT = {"reward_model_path": None, "reward_functions": ["judges_of_a_test:constant"], "max_steps": 6}


@pytest.fixture
def constant(monkeypatch):
    """The reward function that CONSTANT names: 1.5 for everything."""
    module = ModuleType("judges_of_a_test")
    module.constant = lambda prompts, completions, **_: [1.5] * len(prompts)
    monkeypatch.setitem(sys.modules, "judges_of_a_test", module)


def log_of(result):
    return (Path(result.run) / "log.txt").read_text().splitlines()


def test_a_constant_reward_is_named_once(lab, constant):
    result = lab.run("ppo", **CONSTANT)
    (found,) = [f for f in result.metrics["health"] if f["cause"] == "scores_equal"]
    assert (found["figure"], found["since_step"], found["until_step"]) == ("objective/scores_std", 3, None)
    assert found["value"] <= 1e-6
    assert {"message", "knob"} <= set(found)
    lines = [line for line in log_of(result) if line.startswith("health: scores_equal since step 3")]
    assert len(lines) == 1 and "all responses get the same score" in lines[0] and "Try: " in lines[0]
    assert any(
        line.startswith("health: ") and "scores_equal (from step 3 to the end)" in line for line in log_of(result)
    )
    rows = lab.rows(result.run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]  # no lines but those of the updates
    assert [row.get("health/scores_equal") for row in rows] == [None, None, *[found["value"]] * 4]
    assert not [name for name in result.metrics["train"] if name.startswith("health")]
    manifest = lab.registry.resolve(result.model).manifest
    assert manifest.metrics["health"] == result.metrics["health"]
    card = model_card(manifest)
    assert "## Health" in card and "| scores\\_equal | 3 | the end |" in card


@pytest.mark.check
def test_a_kl_of_the_wrong_sign(lab, monkeypatch):
    k1 = rollout.k1
    monkeypatch.setattr(rollout, "k1", lambda logprobs, ref_logprobs: -k1(logprobs, ref_logprobs))
    result = lab.run("ppo", max_steps=12, rollout_batch_size=64)
    assert "kl_negative" in [f["cause"] for f in result.metrics["health"]]


def test_old_log_probabilities_of_another_model(lab, monkeypatch):
    run_models = ppo_rollouts.run_models

    def shifted(*args):
        rollout, refused = run_models(*args)
        return replace(rollout, logprobs=rollout.logprobs + 0.01), refused  # |ratio - 1| = 1 - exp(-.01) = .00995

    monkeypatch.setattr(ppo_rollouts, "run_models", shifted)
    (found,) = [f for f in lab.run("ppo", max_steps=3).metrics["health"] if f["cause"] == "ratio_off"]
    assert found["since_step"] == 2
    assert found["value"] == pytest.approx(0.00995, abs=1e-4)


def test_an_actor_that_cannot_move(lab):
    result = lab.run("ppo", learning_rate=1e-30, max_steps=6)
    assert [(f["cause"], f["since_step"]) for f in result.metrics["health"]] == [("kl_zero", 4)]


def test_a_learning_rate_that_teaches_dpo_nothing(lab):
    result = lab.run("dpo", learning_rate=1e-9, max_steps=66)
    # A third of 66 is 22; five steps in a row.
    assert [(f["cause"], f["since_step"]) for f in result.metrics["health"]] == [("nothing_learnt", 22)]


def test_a_learning_rate_that_wrecks_dpo(lab):
    """0.3 per step on weights of about .25: chosen responses become impossible."""
    result = lab.run("dpo", learning_rate=0.3, max_steps=30)
    found = {f["cause"]: f for f in result.metrics["health"]}
    assert "chosen_falls" in found
    assert found["chosen_falls"]["value"] < -1  # nats; a chosen response has one token or more


def test_pairs_that_are_learnt_by_heart(lab):
    """About 250 drawn labels in 40 full batches: all of them right, and the loss on held-out pairs above log 2."""
    evaluated = {"eval_strategy": "steps", "eval_steps": 10}
    result = lab.run("dpo", max_steps=40, per_device_train_batch_size=512, learning_rate=2e-2, **evaluated)
    found = {f["cause"]: f for f in result.metrics["health"]}
    assert found["overfit"]["figure"] == "eval_nll"
    assert found["overfit"]["value"] > math.log(2)


def test_a_pretrained_model_that_learns_nothing(lab):
    """Every step sees the same 32 examples, so the loss is the same."""
    options = {"learning_rate": 1e-12, "max_steps": 66, "per_device_train_batch_size": 32, "max_train_samples": 32}
    result = lab.run("sft", dataset_name="world:verdicts", **options)
    assert [f["cause"] for f in result.metrics["health"]] == ["loss_not_falling"]


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", {"dataset_name": "world:verdicts", "max_steps": 66, "model_name_or_path": None}),
        ("train-rm", {"max_steps": 66}),
        ("dpo", {"max_steps": 66, "learning_rate": 2e-3}),
        ("ppo", {"max_steps": 20, "rollout_batch_size": 64, "learning_rate": 3e-3}),
    ],
)
@pytest.mark.check
def test_a_healthy_run_has_no_finding(lab, stage, changes):
    if stage == "sft":
        init = lab.registry.resolve("sft").manifest.config["model_init"]
        changes = {**changes, "model_init": init, "tokenizer_init": {"type": "world"}}
    result = lab.run(stage, **changes)
    assert result.metrics["health"] == []
    assert not [line for line in log_of(result) if line.startswith("health")]
    assert not [row for row in lab.rows(result.run) if any(name.startswith("health") for name in row)]
    assert "## Health" not in model_card(lab.registry.resolve(result.model).manifest)


def test_an_evaluation_is_watched_too(lab, monkeypatch):
    seen = []
    monkeypatch.setattr(session, "tell", lambda log, findings: seen.append(len(findings)))
    coin = Watch("any", ("eval_accuracy",), lambda h, f: h.recent("eval_accuracy", 1)[0], "seen", "none")
    monkeypatch.setitem(WATCHES, "reward", (coin,))
    result = lab.run("train-rm", eval_strategy="steps", eval_steps=2, max_steps=4)
    assert seen == [0, 0, 1, 0, 0, 0]  # after updates 1 and 2, the evaluation, updates 3 and 4, the evaluation
    assert [(f["cause"], f["since_step"]) for f in result.metrics["health"]] == [("any", 2)]


def test_a_resumed_run_finds_what_a_whole_one_finds(lab, constant, monkeypatch):
    settings = {**CONSTANT, "save_steps": 2}
    whole = lab.run("ppo", output_name="whole", **settings)

    class Killed(Exception):
        pass

    fit = session.fit

    def killed(*args, on_update, **options):
        def hook(step, metrics, window):
            if step == 5:
                raise Killed
            on_update(step, metrics, window)

        return fit(*args, on_update=hook, **options)

    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", killed)
        with pytest.raises(Killed):
            lab.run("ppo", output_name="cut", **settings)
    cut = lab.run("ppo", output_name="cut", **settings)
    assert "resumed at step 4" in "\n".join(log_of(cut))
    assert cut.metrics["health"] == whole.metrics["health"] != []
    assert lab.rows(cut.run) == lab.rows(whole.run)


def test_trls_trainer_is_watched_by_the_same_table(lab):
    result = lab.run("dpo", engine="trl", learning_rate=1e-9, max_steps=66)
    assert [f["cause"] for f in result.metrics["health"]] == ["nothing_learnt"]
    assert sum(line.startswith("health: nothing_learnt since step 22") for line in log_of(result)) == 1


def test_facts_come_from_the_config(lab):
    ppo = lab.config("ppo", bf16=True, kl_coef=0.2, critic_warmup_steps=1)
    assert facts_of(ppo, 9, 2, {}, bf16=True) == Facts(9, 16, low_precision=True, kl_coef=0.2, critic_warmup_steps=1)
    dpo = lab.config("dpo", gradient_accumulation_steps=3, loss_type="ipo")
    assert facts_of(dpo, 9, 2, {"tokens": 2.5}, bf16=False) == Facts(9, 48, tokens=2.5, loss_type="ipo")
    assert facts_of(lab.config("sft", dtype="bfloat16"), 9, 1, {}, bf16=False) == Facts(9, 8, low_precision=True)
