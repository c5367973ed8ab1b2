"""Watches of PPO.

A condition takes the history of the metrics and the facts of the run, and returns the value to report or None. Means
over WINDOW updates and noise bands prevent findings from single updates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.health.monitor import Facts, History, Watch, mean

WINDOW = 5
JUDGE, JUDGE_SPREAD = "objective/judge", "objective/judge_std"
JUDGED_SCORE, JUDGED_SPREAD, JUDGED_STEP = (
    f"{name} with {JUDGE}" for name in ("objective/scores", "objective/scores_std", "step")
)


def kl_negative(h: History, f: Facts) -> float | None:
    """The mean KL estimate over WINDOW updates is below -14 / (WINDOW n) and below the rounding error.

    For n responses sampled from the policy, P(mean of log pi / pi_ref < -c / n) <= exp(-c) by Markov's inequality,
    because the mean of pi_ref / pi is at most 1. With c = 14 a false alarm occurs less than once in a million updates,
    for any two models.
    """
    values = h.recent("objective/kl", WINDOW)
    if not values:
        return None
    rounding = 0.05 if f.low_precision else 1e-3
    limit = max(14 / (WINDOW * f.size), rounding)
    return mean(values) if mean(values) < -limit else None


def kl_exploding(h: History, f: Facts) -> float | None:
    """KL is above 10 nats and twice that of five updates before, without a higher score; or KL is above 1 nat and the
    objective is below that of the first update.

    In the first update the policy is the reference, so a lower objective means that the reference itself is better.
    """
    kl, scores = h.recent("objective/kl", 2 * WINDOW), h.recent("objective/scores", 2 * WINDOW)
    spread, objective = h.recent("objective/scores_std", WINDOW), h.recent("objective/rlhf_reward", WINDOW)
    if not (kl and scores and spread and objective):
        return None
    before, now = mean(kl[:WINDOW]), mean(kl[WINDOW:])
    noise = mean(spread) / math.sqrt(WINDOW * f.size)
    gained = mean(scores[WINDOW:]) - mean(scores[:WINDOW]) > 3 * noise
    runaway = now > 10 and now > 2 * before and not gained
    start = h.first("objective/rlhf_reward", 1)[0]
    noise_at_start = h.first("objective/scores_std", 1)[0] / math.sqrt(f.size)
    noise_of_kl = f.kl_coef * math.sqrt(2 * max(now, 0.0) / (WINDOW * f.size))  # var(log ratio) is about 2 KL
    lost = now > 1 and mean(objective) < start - 3 * math.hypot(noise, noise_at_start, noise_of_kl)
    return now if runaway or lost else None


def kl_zero(h: History, f: Facts) -> float | None:
    """Both KL estimates are exactly 0 in three updates after the first that trains the actor, while scores differ."""
    names = ("objective/kl", "objective/kl_k3", "objective/scores_std")
    kl, k3, spread = (h.recent(name, 3) for name in names)
    if h.step <= f.critic_warmup_steps + 3 or not (kl and k3 and spread):
        return None
    return 0.0 if not any(kl) and not any(k3) and scores_equal(h, f) is None else None


def kl_target_unreachable(h: History, f: Facts) -> float | None:
    """The adaptive kl_coef is below a hundredth of its start, and the KL is below its target.

    Without a penalty the policy goes wherever the reward is largest. If it is still nearer than the target, no policy
    with more reward is that far from the reference, or the steps are too small to get there.
    """
    coefficient, kl = h.recent("objective/kl_coef", WINDOW), h.recent("objective/kl", WINDOW)
    if not coefficient or not kl or f.kl_target is None:
        return None
    return coefficient[-1] if coefficient[-1] < 0.01 * f.kl_coef and mean(kl) < f.kl_target else None


def scores_equal(h: History, f: Facts) -> float | None:
    """The spread of the scores is at most 1e-6 of the score three times in a row: rounding of equal scores."""
    spread, scores = h.recent("objective/scores_std", 3), h.recent("objective/scores", 3)
    if not (spread and scores):
        return None
    limit = 1e-6 * max(1.0, *map(abs, scores))
    return max(spread) if max(spread) <= limit else None


def ratio_off(h: History, f: Facts) -> float | None:
    """The largest |ratio - 1| of a response token before the first step is above rounding error, twice in a row.

    Rounding in fp32 gives up to 1e-5. In 16 bits log-probabilities have a relative precision of .004, so .1 is beyond
    rounding.
    """
    values = h.recent("first_minibatch/ratio_error", 2)
    limit = 0.1 if f.low_precision else 1e-3
    return min(values) if values and min(values) > limit else None


def sampler_off(h: History, f: Facts) -> float | None:
    """The mean |difference| of a token's log-probability between sampling engine and model is above rounding error,
    twice in a row.

    Two programs in 16 bits differ by a few hundredths, two in fp32 by rounding. An engine that has missed weight
    updates differs by more.
    """
    values = h.recent("sampler/logprob_difference", 2)
    limit = 0.1 if f.low_precision else 0.01
    return min(values) if values and min(values) > limit else None


def value_useless(h: History, f: Facts) -> float | None:
    """Explained variance is below 0 in five consecutive updates, and below -.05 on average.

    A critic that knows nothing has about 0. The condition applies after a fifth of the run, but not before 10 updates,
    which a new critic needs, and not later than 50.
    """
    values = h.recent("val/explained_variance", WINDOW)
    if not values or h.step <= min(max(10, f.total // 5), 50):
        return None
    return mean(values) if max(values) < 0 and mean(values) < -0.05 else None


def eos_lost(h: History, f: Facts) -> float | None:
    """The share of ended responses is below half of that of the first three updates by four standard errors; or no
    response of 60 or more has ended.

    Four standard errors, because a run has hundreds of evaluations. None of 60 means a rate below 5 % (rule of three).
    """
    values = h.recent("val/ended", 3 + WINDOW)
    if not values:
        return None
    start, now = mean(h.first("val/ended", 3)), mean(values[3:])
    pooled = (3 * start + WINDOW * now) / (3 + WINDOW)
    noise = math.sqrt(pooled * (1 - pooled) * (1 / (3 * f.size) + 1 / (WINDOW * f.size)))
    fell = now < 0.5 * start and start - now > 4 * noise
    return now if fell or (now == 0 and WINDOW * f.size >= 60) else None


def length_drift(h: History, f: Facts) -> float | None:
    """The response length is outside .5 to 1.5 times that of the first three updates, by four standard errors.

    The standard deviation of the lengths is taken to be their mean, about its upper bound.
    """
    values = h.recent("val/response_length", 3 + WINDOW)
    if not values:
        return None
    start, now = mean(h.first("val/response_length", 3)), mean(values[3:])
    noise = (3 * start + WINDOW * now) / (3 + WINDOW) * math.sqrt(1 / (3 * f.size) + 1 / (WINDOW * f.size))
    return now if not 0.5 * start <= now <= 1.5 * start and abs(now - start) > 4 * noise else None


def clipping(h: History, f: Facts) -> float | None:
    """More than half of the tokens' gradient is cut off, on average over WINDOW updates."""
    values = h.recent("policy/clipfrac_avg", WINDOW)
    return mean(values) if values and mean(values) > 0.5 else None


def entropy_gone(h: History, f: Facts) -> float | None:
    """The entropy per token is below a tenth of that of the first update: most tokens are then certain."""
    values, start = h.recent("policy/entropy_avg", WINDOW), h.first("policy/entropy_avg", 1)
    return mean(values) if values and mean(values) < 0.1 * start[0] else None


def judge_best(h: History) -> int | None:
    """The index at which the judge's best WINDOW scores begin, before the last WINDOW; None if there are too few."""
    upto = [0.0, *itertools.accumulate(h.recent(JUDGE))]
    starts = range(len(upto) - 2 * WINDOW)
    return max(starts, key=lambda start: upto[start + WINDOW] - upto[start], default=None)


def judge_falls(h: History, f: Facts) -> float | None:
    """The judge's mean over the last WINDOW scores is below its best earlier WINDOW, and the training score is higher.

    The judge must be lower by five standard errors (the best of up to ninety is a lucky one) and by a tenth of the
    spread of its scores. The score that is trained on must be three standard errors above its first WINDOW values, and
    must not have fallen by two standard errors since the judge's best.
    """
    best = judge_best(h)
    if best is None:
        return None
    judge, scores = (JUDGE, JUDGE_SPREAD), (JUDGED_SCORE, JUDGED_SPREAD)
    at_best = slice(best, best + WINDOW)
    fall, noise = change(h, f, judge, [h.recent(name)[at_best] for name in judge])
    gained, noise_of_gain = change(h, f, scores, [h.first(name, WINDOW) for name in scores])
    since, noise_since = change(h, f, scores, [h.recent(name)[at_best] for name in scores])
    worse = -fall > max(5 * noise, 0.1 * math.sqrt(mean_square(h.recent(JUDGE_SPREAD, WINDOW))))
    optimised = gained > 3 * noise_of_gain and since > -2 * noise_since
    return mean(h.recent(JUDGE, WINDOW)) if worse and optimised else None


def change(h: History, f: Facts, names: Sequence[str], before: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The change of a mean score from WINDOW values `before` to the last WINDOW values, and its standard error.

    names: the score and its standard deviation over responses; before: values of both.
    """
    now = [h.recent(name, WINDOW) for name in names]
    variance = mean_square(now[1]) + mean_square(before[1])
    return mean(now[0]) - mean(before[0]), math.sqrt(variance / (WINDOW * f.size))


def mean_square(values: Sequence[float]) -> float:
    return mean([value**2 for value in values])


def judge_was(h: History, f: Facts) -> dict[str, Any]:
    """The judge's best mean score, and the update in the middle of its window."""
    best = judge_best(h) or 0
    at = int(h.recent(JUDGED_STEP)[best + WINDOW // 2])
    return {"best": f"{mean(h.recent(JUDGE)[best : best + WINDOW]):.4g}", "step": at}


PPO = (
    Watch(
        "kl_negative",
        ("objective/kl",),
        kl_negative,
        "a KL is never negative, so the responses are not samples of the policy that is scored: sampling and scoring "
        "disagree, or the reference is not where the policy started",
        "temperature 1; check that sampler and trainer use the same precision (bf16 false) and the same reference",
    ),
    Watch(
        "kl_exploding",
        ("objective/kl", "objective/scores", "objective/scores_std", "objective/rlhf_reward"),
        kl_exploding,
        "the policy leaves the reference and gains no reward for it",
        "kl_coef up, learning_rate down, num_ppo_epochs down",
    ),
    Watch(
        "kl_zero",
        ("objective/kl", "objective/kl_k3", "objective/scores_std", "objective/scores"),
        kl_zero,
        "the actor has not moved at all: it is frozen, or its steps vanish in rounding",
        "learning_rate up, dtype float32 (with bf16 true for speed), critic_warmup_steps down",
    ),
    Watch(
        "kl_target_unreachable",
        ("objective/kl_coef", "objective/kl"),
        kl_target_unreachable,
        "kl_coef has fallen to almost 0 and the KL stays below kl_target: no policy with more reward is that far from "
        "the reference, so nothing holds the policy any more",
        "kl_target down, or kl_coef without kl_target; learning_rate up if the KL still grows",
    ),
    Watch(
        "scores_equal",
        ("objective/scores_std", "objective/scores"),
        scores_equal,
        "all responses get the same score, so there is nothing to learn from",
        "the reward function or reward model; if scores differed before, kl_coef up (the policy repeats one response)",
    ),
    Watch(
        "ratio_off",
        ("first_minibatch/ratio_error",),
        ratio_off,
        "before the first step on a rollout the policy's log-probabilities already differ from those of the rollout",
        "bf16 false, attn_implementation eager; no dropout in the model",
    ),
    Watch(
        "sampler_off",
        ("sampler/logprob_difference",),
        sampler_off,
        "the sampling engine gives its tokens other probabilities than the trained model: weights, precision or "
        "temperature of the engine differ, and importance weights correct only a part of the difference",
        "rollout_engine native; the versions of vllm and transformers",
    ),
    Watch(
        "value_useless",
        ("val/explained_variance",),
        value_useless,
        "the critic predicts returns worse than a constant, so the advantages are noisier than without a critic",
        "critic_warmup_steps up, vf_coef up, value_init, learning_rate",
    ),
    Watch(
        "eos_lost",
        ("val/ended",),
        eos_lost,
        "responses no longer end; they are cut at response_length and scored unfinished",
        "missing_eos_penalty, response_length up, kl_coef up; check that the SFT data end with the stop token",
    ),
    Watch(
        "length_drift",
        ("val/response_length",),
        length_drift,
        "responses have become much longer or shorter than at the start: the reward may favour length itself",
        "kl_coef up, missing_eos_penalty; compare the reward model with 'longer wins'",
    ),
    Watch(
        "clipping",
        ("policy/clipfrac_avg",),
        clipping,
        "most tokens are clipped: the updates on one rollout are too large",
        "learning_rate down, num_ppo_epochs down, rollout_batch_size up",
    ),
    Watch(
        "entropy_gone",
        ("policy/entropy_avg",),
        entropy_gone,
        "the policy has become almost deterministic and no longer explores",
        "kl_coef up, learning_rate down",
    ),
    Watch(
        "judge_falls",
        (JUDGE, JUDGE_SPREAD, JUDGED_SCORE, JUDGED_SPREAD, JUDGED_STEP),
        judge_falls,
        "the judge's score has fallen from its best, {best}, while the training score has risen: the policy exploits "
        "the errors of its reward model (over-optimisation)",
        "kl_coef up; stop near step {step}, where the judge was best (snapshot_steps keeps its weights); more or "
        "better pairs for the reward model",
        blanks=judge_was,
    ),
)
