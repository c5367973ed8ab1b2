"""The watches of each stage: what triggers each, what nearly does, and noise that must not."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from rlhf_pipeline.health.monitor import Facts, Monitor
from rlhf_pipeline.health.watches import WATCHES

LOG_2 = math.log(2)
EVERY = 5  # steps between two evaluations
PPO = Facts(total=60, size=64, kl_coef=0.1, kl_target=6.0)
EXAMPLES = Facts(total=240, size=32, tokens=20, from_reference=True)

# Healthy runs of 60 updates of PPO and of 240 steps of the others, as functions of the step: no watch says a word.
HEALTHY = {
    "ppo": {
        "objective/kl": lambda step: 0.1 * (step - 1),
        "objective/kl_k3": lambda step: 0.1 * (step - 1),
        "objective/scores": lambda step: 0.05 * step,
        "objective/scores_std": lambda step: 1.0,
        "objective/rlhf_reward": lambda step: 0.05 * step - 0.01 * (step - 1),
        "first_minibatch/ratio_error": lambda step: 1e-5,
        "sampler/logprob_difference": lambda step: 1e-4,
        "val/explained_variance": lambda step: 0.02 * step - 0.1,
        "val/ended": lambda step: 0.9,
        "val/response_length": lambda step: 20.0 + 0.1 * step,
        "policy/clipfrac_avg": lambda step: 0.2,
        "policy/entropy_avg": lambda step: 2.0 - 0.02 * step,
        "objective/judge": lambda step: 0.03 * step,
        "objective/judge_std": lambda step: 1.0,
    },
    "sft": {"loss/nll": lambda step: 3.0 - 0.005 * step},
    "reward": {
        "loss/bradley_terry": lambda step: 0.7 - 0.0005 * step,
        "accuracy": lambda step: 0.6,
        "eval_accuracy": lambda step: 0.6,
        "eval_accuracy_low": lambda step: 0.56,
        "eval_accuracy_high": lambda step: 0.64,
    },
    "dpo": {
        "loss/dpo": lambda step: 0.69 - 0.0005 * step,
        "rewards/margins": lambda step: 0.02 * step,
        "rewards/accuracies": lambda step: 0.7,
        "logps/chosen_minus_reference": lambda step: -0.01 * (step - 1),
        "eval_nll": lambda step: 0.65,
    },
}


def watched(stage, changes, steps=60, facts=None):
    """Feed a healthy run in which some figures are others; the monitor afterwards."""
    facts = facts or (PPO if stage == "ppo" else EXAMPLES)
    monitor = Monitor(WATCHES[stage], facts)
    figures = HEALTHY[stage] | changes
    for step in range(1, steps + 1):
        due = {name: float(figure(step)) for name, figure in figures.items()}
        held_out = {name: due.pop(name) for name in figures if name.startswith("eval_")}
        monitor.update(step, due)
        if step % EVERY == 0:
            monitor.update(step, held_out)
    return monitor


def after(step, value, before=0.0):
    return lambda now: value if now >= step else before


def both_ways(step):
    return 0.1 if step % 2 else -0.1


def wave(step):
    """+1, -1, +1, -1, ...: over an even number of steps the mean is 0 and the variance 1."""
    return 1.0 if step % 2 else -1.0


@pytest.mark.parametrize(("stage", "steps"), [("ppo", 60), ("sft", 240), ("reward", 240), ("dpo", 240)])
def test_a_healthy_history_has_no_finding(stage, steps):
    assert watched(stage, {}, steps).findings == []


# cause: (stage, what triggers it, what nearly does, the step at which the condition first holds)
PPO_CASES = {
    # 5 updates of 64 responses: the mean has to be below -14 / 320 = -.04375.
    "kl_negative": (
        {"objective/kl": after(20, -0.044, -0.044)},
        {"objective/kl": after(20, -0.0437, -0.0437)},
        5,
    ),
    # Above 10, doubled within five updates, scores as before: 16 * 1.2^(step - 26) passes 10 on average with step 26,
    # whose five updates have the mean 16 (1 + 1/1.2 + ... + 1/1.2^4) / 5 = 11.5, 1.2^5 = 2.49 times those before.
    "kl_exploding": (
        {
            "objective/kl": lambda step: 16 * 1.2 ** (step - 26),
            "objective/scores": lambda step: 1.0,
            "objective/rlhf_reward": lambda step: 10.0,
        },
        {  # the same, but the score rises by 1 in each update: 5 in five of them, against 3 / sqrt(320) of noise
            "objective/kl": lambda step: 16 * 1.2 ** (step - 26),
            "objective/scores": lambda step: float(step),
            "objective/rlhf_reward": lambda step: 10.0,
        },
        26,
    ),
    "kl_zero": (
        {"objective/kl": lambda step: 0.0, "objective/kl_k3": lambda step: 0.0},
        {"objective/kl": lambda step: 0.0, "objective/kl_k3": lambda step: 1e-9 if step % 3 == 0 else 0.0},
        4,
    ),
    # A hundredth of .1, while the KL is below 6.
    "kl_target_unreachable": (
        {"objective/kl_coef": after(11, 9.9e-4, 0.1)},
        {"objective/kl_coef": after(11, 1.01e-3, 0.1)},
        11,
    ),
    "scores_equal": (
        {"objective/scores_std": lambda step: 0.0 if step > 9 else 1.0},
        {"objective/scores_std": lambda step: 0.0 if step % 3 else 1.0},
        12,
    ),
    "ratio_off": (
        {"first_minibatch/ratio_error": after(7, 2e-3, 1e-5)},
        {"first_minibatch/ratio_error": lambda step: 2e-3 if step % 2 else 1e-5},
        8,
    ),
    "sampler_off": (
        {"sampler/logprob_difference": after(7, 0.011, 1e-4)},
        {"sampler/logprob_difference": lambda step: 0.011 if step % 2 else 1e-4},
        8,
    ),
    "value_useless": (
        {"val/explained_variance": lambda step: -0.06},
        {"val/explained_variance": lambda step: -0.06 if step % 5 else 0.01},
        13,  # after a fifth of 60 updates
    ),
    # Start .8; five updates at .38 after those at .8: means .716, .632, .548, .464, .38, the last below .4.
    "eos_lost": ({"val/ended": after(11, 0.38, 0.8)}, {"val/ended": after(11, 0.41, 0.8)}, 15),
    # From 20: five updates at 31 pass 30 with the last; 29 does not.
    "length_drift": (
        {"val/response_length": after(11, 31.0, 20.0)},
        {"val/response_length": after(11, 29.0, 20.0)},
        15,
    ),
    "clipping": (
        {"policy/clipfrac_avg": after(11, 0.51, 0.1)},
        {"policy/clipfrac_avg": lambda step: 0.8 if step % 2 else 0.0},  # .48 or .32 on average of five
        15,
    ),
    "entropy_gone": ({"policy/entropy_avg": after(11, 0.19, 2.0)}, {"policy/entropy_avg": after(11, 0.21, 2.0)}, 15),
}

# 5 looks at 64 responses each, twice: five standard errors of the difference are 5 sqrt(2 / 320) = .3953. The score
# rises by .05 a step. The fifth look after the fall is the first at which all of the last five are lower.
PPO_CASES["judge_falls"] = (
    {"objective/judge": after(31, 0.604, 1.0)},
    {"objective/judge": after(31, 0.605, 1.0)},
    35,
)

EXAMPLE_CASES = {
    # A sixth of 240 steps is 40, the last third begins at step 80. 60 noisy steps: standard error .1 / sqrt(40).
    ("sft", "loss_not_falling"): (
        {"loss/nll": lambda step: 3.0 + both_ways(step)},
        {"loss/nll": lambda step: (3.0 if step <= 10 else 2.9) + both_ways(step)},
        80,
    ),
    # 40 x 32 = 1280 pairs: one standard error is .5 / sqrt(1280) = .01398.
    ("reward", "near_chance"): ({"accuracy": lambda step: 0.5139}, {"accuracy": lambda step: 0.5141}, 80),
    ("reward", "loss_above_log_2"): (
        # Standard error of 40 values +-.1 around the mean: .1 / sqrt(39) = .0160.
        {"loss/bradley_terry": lambda step: LOG_2 + 0.033 + both_ways(step)},
        {"loss/bradley_terry": lambda step: LOG_2 + 0.031 + both_ways(step)},
        80,
    ),
    ("reward", "overfit"): (
        # Half of the half-width .04 is .02: two evaluations in a row have to be lower by more than that.
        {"eval_accuracy": after(101, 0.579, 0.6), "accuracy": lambda step: 0.9},
        {"eval_accuracy": lambda step: 0.579 if step % 2 else 0.6, "accuracy": lambda step: 0.9},
        110,
    ),
    # 20 tokens: 1e-4 + 20 x 1e-5 = 3e-4 nats at the first step.
    ("dpo", "not_the_reference"): (
        {"logps/chosen_minus_reference": after(2, 0.0, before=-3.1e-4)},
        {"logps/chosen_minus_reference": after(2, -1.0, before=-2.9e-4)},
        1,
    ),
    # 20 tokens: ten steps below -20 nats.
    ("dpo", "chosen_falls"): (
        {"logps/chosen_minus_reference": after(31, -20.1)},
        {"logps/chosen_minus_reference": after(31, -19.9)},
        40,
    ),
    ("dpo", "margin_negative"): (
        # Half of the values 1 - d, half -1 - d: below 0 by two standard errors where d > 2 / sqrt(39) = .3203.
        {"rewards/margins": lambda step: wave(step) - 0.321},
        {"rewards/margins": lambda step: wave(step) - 0.319},
        80,
    ),
    ("dpo", "margin_exploding"): (
        {"rewards/margins": after(31, 10.1), "rewards/accuracies": lambda step: 1.0},
        {"rewards/margins": after(31, 10.1), "rewards/accuracies": lambda step: 0.98},
        40,
    ),
    ("dpo", "overfit"): (
        {"eval_nll": after(51, 0.71, 0.65), "rewards/accuracies": lambda step: 0.98},
        {"eval_nll": after(51, 0.69, 0.65), "rewards/accuracies": lambda step: 0.98},
        60,
    ),
    ("dpo", "nothing_learnt"): (
        {"loss/dpo": lambda step: LOG_2 - 0.009, "rewards/margins": lambda step: 0.009},
        {"loss/dpo": lambda step: LOG_2 - 0.009, "rewards/margins": lambda step: 0.011},
        80,
    ),
}
STUCK = {"weights/changed": after(21, 0.049, before=0.06)}, {"weights/changed": after(21, 0.051, before=0.06)}, 21
STUCK_CASES = {(stage, "weights_stuck"): STUCK for stage in HEALTHY}
CASES = {("ppo", cause): case for cause, case in PPO_CASES.items()} | EXAMPLE_CASES | STUCK_CASES
LENGTH = {"ppo": 60, "sft": 240, "reward": 240, "dpo": 240}


@pytest.mark.parametrize(("stage", "cause"), CASES, ids=map("-".join, CASES))
def test_what_triggers_a_watch_and_what_nearly_does(stage, cause):
    sick, near_miss, since = CASES[stage, cause]
    found = [f for f in watched(stage, sick, LENGTH[stage]).findings if f.cause == cause]
    assert [f.since_step for f in found] == [since]
    assert found[0].until_step is None
    assert [f for f in watched(stage, near_miss, LENGTH[stage]).findings if f.cause == cause] == []


def test_every_watch_has_a_case_and_a_line_in_the_documentation():
    causes = {(stage, watch.cause) for stage, watches in WATCHES.items() for watch in watches}
    assert causes == set(CASES)
    text = (Path(__file__).parents[2] / "docs" / "health.md").read_text()
    assert all(f"| `{cause}` |" in text for _, cause in causes)


def test_the_objective_below_that_of_the_reference():
    """At step 1 the objective is 5 +- 1/8; later it is 4.5 with a noise of about .18, or 4.6 and a KL below 1 nat."""
    kl = {"objective/kl": after(2, 2.0), "objective/scores": lambda step: 5.0}
    lost = watched("ppo", {**kl, "objective/rlhf_reward": after(2, 4.3, 5.0)})
    assert [f.cause for f in lost.findings] == ["kl_exploding"]
    # 3 sqrt(1/320 + 1/64 + .01 * 4 / 320) = .411
    assert not watched("ppo", {**kl, "objective/rlhf_reward": after(2, 4.6, 5.0)}).findings
    small = {**kl, "objective/kl": after(2, 0.9), "objective/rlhf_reward": after(2, 4.3, 5.0)}
    assert not watched("ppo", small).findings


def judged(judge, score, steps=60, facts=PPO, **others):
    """What is named of a judge and a score as functions of the step, both with a deviation of 1."""
    figures = {"objective/judge": judge, "objective/scores": score, **others}
    return [f for f in watched("ppo", figures, steps, facts).findings if f.cause == "judge_falls"]


def test_a_judge_that_falls_with_the_score_or_rises_with_it_is_no_over_optimisation():
    falls, rises = after(31, 0.5, 1.0), after(31, 1.5, 1.0)
    assert judged(falls, rises)
    for score in (after(31, 0.5, 1.0), lambda step: 1.0):
        assert not judged(falls, score)
    assert not judged(rises, rises)
    # The rise of the score since the start: three standard errors are 3 sqrt(2 / 320) = .2372.
    assert judged(falls, after(31, 1.238, 1.0))
    assert not judged(falls, after(31, 1.237, 1.0))


def test_a_score_that_rose_before_the_judge_was_best_need_not_rise_since_but_must_not_fall():
    """Both rise by 1 at step 11. At step 31 the judge falls by .396, five standard errors once all of five looks are
    lower, and the score by less or more than two of them, 2 sqrt(2 / 320) = .1581."""

    def after_both(value):
        return lambda step: 1.0 if step < 11 else 2.0 if step < 31 else value

    assert judged(after_both(1.604), after_both(2.0))
    assert judged(after_both(1.604), after_both(1.842))
    assert not judged(after_both(1.604), after_both(1.841))


def test_a_certain_fall_of_less_than_a_tenth_of_the_spread_is_too_little():
    """With 100,000 responses five standard errors are .01."""
    many = Facts(60, 100_000)
    assert judged(after(31, 0.899, 1.0), lambda step: step, facts=many)
    assert not judged(after(31, 0.901, 1.0), lambda step: step, facts=many)


def test_the_step_at_which_the_judge_was_best_is_named():
    """A hill whose top is step 20, in looks at every update: the best five are 18 to 22, with the mean 5 - 1.2 * .1."""
    (found,) = judged(lambda step: 5 - 0.1 * abs(step - 20), lambda step: 0.1 * step)
    assert "stop near step 20," in found.knob and "fallen from its best, 4.88," in found.message
    # The last five of step t have the mean 5 - .1 (t - 22): .3953 below 4.88 from t = 28 on.
    assert (found.figure, found.since_step) == ("objective/judge", 28)
    assert found.value == pytest.approx(5 - 0.1 * 6)


def test_only_the_scores_that_the_judge_saw_are_set_beside_it():
    """The judge looks at every fifth update. A score that rises at these alone counts, one that rises between does
    not."""
    between = {"objective/judge": after(151, 0.5, 1.0)}

    def named(score):
        monitor = Monitor(WATCHES["ppo"], Facts(300, 64))
        for step in range(1, 301):
            figures = {"objective/scores": score(step), "objective/scores_std": 1.0}
            if step % 5 == 0:
                figures |= {name: figure(step) for name, figure in between.items()} | {"objective/judge_std": 1.0}
            monitor.update(step, figures)
        return [f for f in monitor.findings if f.cause == "judge_falls"]

    assert not named(lambda step: 0.0 if step % 5 == 0 else step)
    (found,) = named(lambda step: step if step % 5 == 0 else 0.0)
    # With the looks at 155, 160, 165 and 170 four of five are .5 lower; the best five begin with the first look.
    assert (found.since_step, "stop near step 15," in found.knob) == (170, True)


def test_fewer_than_ten_looks_say_nothing():
    fall = after(5, -9.0, 9.0)
    assert not judged(fall, lambda step: step, 9)
    assert judged(fall, lambda step: step, 10)


def test_a_flat_judge_beside_a_rising_score_raises_no_alarm():
    """100 runs of 200 looks; by simulation 2 in a thousand such runs are named (docs/health.md)."""
    draw = random.Random(1)
    monitors = [Monitor([watch for watch in WATCHES["ppo"] if watch.cause == "judge_falls"], PPO) for _ in range(100)]
    for monitor in monitors:
        for step in range(1, 201):
            figures = {"objective/judge": draw.gauss(0, 1 / 8), "objective/scores": 0.05 * step + draw.gauss(0, 1 / 8)}
            monitor.update(step, figures | {"objective/judge_std": 1.0, "objective/scores_std": 1.0})
    assert [f.cause for monitor in monitors for f in monitor.findings] == []


def test_without_a_judge_nothing_is_looked_at():
    figures = {name: figure for name, figure in HEALTHY["ppo"].items() if "judge" not in name}
    monitor = Monitor(WATCHES["ppo"], PPO)
    for step in range(1, 61):
        monitor.update(step, {name: float(figure(step)) for name, figure in figures.items()})
    assert monitor.findings == []
    assert monitor.history.recent("step with objective/judge") == []


def test_no_response_ever_ended():
    never = {"val/ended": lambda step: 0.0}
    assert [f.cause for f in watched("ppo", never).findings] == ["eos_lost"]
    # 5 updates of 8 responses: none of 40 is what a rate of 5 % gives one time in eight.
    assert not watched("ppo", never, facts=Facts(60, 8)).findings


def test_few_responses_need_a_greater_fall():
    """From .5 to .2 with 4 responses: 12 and 20 of them; four standard errors are .68, with 64 responses .17."""
    fall = {"val/ended": after(11, 0.2, 0.5)}
    assert [f.cause for f in watched("ppo", fall).findings] == ["eos_lost"]
    assert not watched("ppo", fall, facts=Facts(60, 4)).findings


def test_precision_moves_the_thresholds():
    rounded = {"first_minibatch/ratio_error": lambda step: 0.05, "objective/kl": lambda step: -0.045}
    half = Facts(60, 64, low_precision=True)
    assert {f.cause for f in watched("ppo", rounded).findings} == {"ratio_off", "kl_negative"}
    assert not watched("ppo", rounded, facts=half).findings
    off = {"first_minibatch/ratio_error": lambda step: 0.2, "objective/kl": lambda step: -0.055}
    assert {f.cause for f in watched("ppo", off, facts=half).findings} == {"ratio_off", "kl_negative"}
    for limit, facts in ((0.01, PPO), (0.1, half)):
        for factor, found in ((0.99, []), (1.01, ["sampler_off"])):
            engine = {"sampler/logprob_difference": lambda step, value=limit * factor: value}
            assert [f.cause for f in watched("ppo", engine, facts=facts).findings] == found


def test_the_critics_warm_up_and_equal_scores_excuse_a_kl_of_0():
    still = {"objective/kl": lambda step: 0.0, "objective/kl_k3": lambda step: 0.0}
    warming = Facts(60, 64, critic_warmup_steps=20)
    # The 21st update is the first that trains the actor; the 22nd, 23rd and 24th should have moved.
    assert not watched("ppo", still, 23, warming).findings
    (found,) = watched("ppo", still, 24, warming).findings
    assert (found.cause, found.since_step) == ("kl_zero", 24)
    equal = watched("ppo", {**still, "objective/scores_std": lambda step: 0.0})
    assert [f.cause for f in equal.findings] == ["scores_equal"]


def test_few_pairs_say_nothing_about_chance():
    coin = {"accuracy": lambda step: 0.5}
    assert not watched("reward", coin, 240, Facts(240, 9)).findings  # 40 x 9 pairs
    assert watched("reward", coin, 240, Facts(240, 10)).findings


def test_the_sign_of_rounding_is_no_preference():
    """A margin of -1e-8 in all pairs and ties that count as wrong: a policy that has not moved."""
    still = {"rewards/margins": lambda step: -1e-8, "rewards/accuracies": lambda step: 0.0}
    assert not watched("dpo", still, 240).findings
    moved = {"rewards/margins": lambda step: -0.011, "rewards/accuracies": lambda step: 0.5}
    assert [f.cause for f in watched("dpo", moved, 240).findings] == ["margin_negative"]


def test_fewer_right_than_wrong_are_enough():
    """40 x 32 pairs: two standard errors are .02795."""
    for share, found in ((0.472, ["margin_negative"]), (0.4722, [])):
        right = {"rewards/accuracies": lambda step, share=share: share}
        assert [f.cause for f in watched("dpo", right, 240).findings] == found


@pytest.mark.check
@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_noise_alone_raises_no_alarm_in_ppo(size, share):
    """100 runs of 200 updates: a share of responses ends by chance, lengths are exponential (deviation = mean), the KL
    is .01 nats with the normal log-ratio that this implies (variance 2 KL), and the score does not rise."""
    draw = random.Random(size)
    noise = {
        "val/ended": lambda step: sum(draw.random() < share for _ in range(size)) / size,
        "val/response_length": lambda step: 1 + sum(draw.expovariate(1 / 20) for _ in range(size)) / size,
        "objective/kl": lambda step: draw.gauss(0.01, math.sqrt(0.02 / size)),
        "objective/scores": lambda step: draw.gauss(0, 1 / math.sqrt(size)),
        "objective/rlhf_reward": lambda step: draw.gauss(0, 1 / math.sqrt(size)),
        "policy/entropy_avg": lambda step: 2.0,
    }
    runs = [watched("ppo", noise, 200, Facts(200, size, kl_coef=0.1)).findings for _ in range(100)]
    alarms = [finding.cause for run in runs for finding in run]
    assert len(alarms) <= 2, alarms  # of 100 runs, with ten watches each


@pytest.mark.check
def test_noise_alone_raises_no_alarm_in_the_other_stages():
    """100 runs each: accuracies of .6 over 32 pairs, a loss that falls by a tenth with a deviation of 5 %."""
    draw = random.Random(0)

    def share(step):
        return sum(draw.random() < 0.6 for _ in range(32)) / 32

    for stage, noise in {
        "sft": {"loss/nll": lambda step: 3.0 - 0.3 * min(step / 80, 1) + draw.gauss(0, 0.15)},
        "reward": {"accuracy": share, "loss/bradley_terry": lambda step: draw.gauss(0.66, 0.1)},
        "dpo": {"rewards/accuracies": share, "rewards/margins": lambda step: draw.gauss(0.1, 0.2)},
    }.items():
        alarms = [f.cause for _ in range(100) for f in watched(stage, noise, 240).findings]
        assert len(alarms) <= 1, (stage, alarms)


def test_a_loss_too_noisy_to_tell_says_nothing():
    """Two standard errors of 10 and 40 values +-d are d (4 / 9 + 4 / 39)^.5 = .739 d, against .15."""
    for size, found in ((0.2, ["loss_not_falling"]), (0.21, [])):
        still = {"loss/nll": lambda step, size=size: 3.0 + size * wave(step)}
        assert [f.cause for f in watched("sft", still, 240).findings] == found


def test_ipo_at_its_start_is_known_by_its_margin_alone():
    start = {"loss/dpo": lambda step: 1.0, "rewards/margins": lambda step: 0.0}
    assert not watched("dpo", start, 240).findings
    assert [f.cause for f in watched("dpo", start, 240, Facts(240, 32, 20, loss_type="ipo")).findings] == [
        "nothing_learnt"
    ]


@pytest.mark.parametrize("cause", ["margin_negative", "margin_exploding", "nothing_learnt"])
def test_without_a_reference_a_margin_says_nothing_of_what_was_learnt(cause):
    metrics, _, _ = EXAMPLE_CASES["dpo", cause]
    facts = [Facts(240, 32, 20, fixed_reference=needed) for needed in (True, False)]
    causes = [[f.cause for f in watched("dpo", metrics, 240, each).findings] for each in facts]
    assert cause in causes[0] and causes[1] == []
