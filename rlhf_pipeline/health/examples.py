"""Watches of the stages that train on examples: SFT, the reward model and DPO.

A condition takes the history of the metrics and the facts of the run, and returns the value to report or None. Most
conditions read the last sixth of the run, once the first third is over. Noise bands prevent findings from single
updates.
"""

from __future__ import annotations

import math

from rlhf_pipeline.health.monitor import Facts, History, Watch, error, late, mean, width

LOG_2 = math.log(2)


def near_chance(h: History, f: Facts) -> float | None:
    """Late in the run, accuracy over 400 or more pairs is at most one standard error above one half.

    A model with an accuracy of 57 % is more than two standard errors above this limit.
    """
    values = h.recent("accuracy", width(f))
    pairs = len(values) * f.size
    if not late(h, f) or pairs < 400:
        return None
    return mean(values) if mean(values) <= 0.5 + math.sqrt(0.25 / pairs) else None


def loss_above_log_2(h: History, f: Facts) -> float | None:
    """Late, the mean loss over at least ten updates exceeds log 2 by two standard errors.

    log 2 is the loss of a model that answers "one half" for every pair.
    """
    values = h.recent("loss/bradley_terry", width(f))
    if not late(h, f) or len(values) < 10:
        return None
    return mean(values) if mean(values) - 2 * error(values) > LOG_2 else None


def reward_overfit(h: History, f: Facts) -> float | None:
    """Held-out accuracy in two consecutive evaluations is below the earlier best, and training accuracy is .1 above it.

    The drop must exceed .02 and half of the interval's half-width. Half is enough because both evaluations use the same
    pairs, so the difference is more certain than either accuracy.
    """
    held_out, training = h.recent("eval_accuracy"), h.recent("accuracy")[-10:]
    if len(held_out) < 3 or not training:
        return None
    half = (h.recent("eval_accuracy_high", 1)[0] - h.recent("eval_accuracy_low", 1)[0]) / 2
    drop = max(held_out[:-2]) - max(held_out[-2:])
    return held_out[-1] if drop > max(0.02, half / 2) and mean(training) > held_out[-1] + 0.1 else None


def not_the_reference(h: History, f: Facts) -> float | None:
    """At the first step, before the policy has moved, its chosen responses are not as likely as under the reference.

    Rounding accounts for 1e-4 nats and 1e-5 per token (16 bits: .05 per token).
    """
    if not f.from_reference or h.first("step", 1) != [1]:
        return None
    limit = 0.05 * f.tokens if f.low_precision else 1e-4 + 1e-5 * f.tokens
    value = h.first("logps/chosen_minus_reference", 1)[0]
    return value if abs(value) > limit else None


def chosen_falls(h: History, f: Facts) -> float | None:
    """Over ten updates the chosen responses have lost a nat per token: each token is a third as likely as before.

    Some fall is part of the optimum (r / beta - log Z is below 0 for an average response). Healthy runs on responses of
    three tokens, which have the largest KL per token, show half a nat.
    """
    values = h.recent("logps/chosen_minus_reference", 10)
    return mean(values) if values and mean(values) < -f.tokens else None


def margin_negative(h: History, f: Facts) -> float | None:
    """Late, implicit accuracy is below one half or the mean margin below 0, by two standard errors over ten updates.

    A margin within .01 of 0 means that the policy has not moved: its sign comes from rounding and ties. Without a
    reference that stays a margin says nothing of what was learnt.
    """
    if not f.fixed_reference:
        return None
    margins, right = (h.recent(name, width(f)) for name in ("rewards/margins", "rewards/accuracies"))
    if not late(h, f) or len(margins) < 10 or not right or abs(mean(margins)) < 0.01:
        return None
    worse = mean(right) + 2 * math.sqrt(0.25 / (len(right) * f.size)) < 0.5
    return mean(margins) if worse or mean(margins) + 2 * error(margins) < 0 else None


def margin_exploding(h: History, f: Facts) -> float | None:
    """Over ten updates the margin is above 10 with 99 % of the pairs correct.

    A margin of 10 means odds of 22,000 to 1, which no label justifies (but lengths do, without a reference).
    """
    if not f.fixed_reference:
        return None
    margins, right = h.recent("rewards/margins", 10), h.recent("rewards/accuracies", 10)
    return mean(margins) if margins and right and mean(margins) > 10 and mean(right) >= 0.99 else None


def dpo_overfit(h: History, f: Facts) -> float | None:
    """The held-out loss in two consecutive evaluations is .05 nats above the earlier best, with 97 % of the training
    pairs correct."""
    held_out, right = h.recent("eval_nll"), h.recent("rewards/accuracies", 10)
    if len(held_out) < 3 or not right or mean(right) < 0.97:
        return None
    return held_out[-1] if min(held_out[-2:]) - min(held_out[:-2]) > 0.05 else None


def nothing_learnt(h: History, f: Facts) -> float | None:
    """Late, the margin is within .01 of 0 (odds of 1.01) and the sigmoid loss within .01 of log 2, its first value.

    Without a reference nothing begins at 0; to one that moves the margin returns to 0.
    """
    margins, losses = (h.recent(name, width(f)) for name in ("rewards/margins", "loss/dpo"))
    if not late(h, f) or len(margins) < 10 or not losses or not f.fixed_reference:
        return None
    at_start = f.loss_type != "sigmoid" or abs(mean(losses) - LOG_2) < 0.01
    return mean(losses) if at_start and abs(mean(margins)) < 0.01 else None


def loss_not_falling(h: History, f: Facts) -> float | None:
    """Late, the loss over at least ten updates is less than 1 % below that of the first ten updates.

    The condition requires that two standard errors of the difference are at most 5 %. A fall of 10 % is then more than
    three standard errors above the limit.
    """
    values, start = h.recent("loss/nll", width(f)), h.first("loss/nll", 10)
    if not late(h, f) or len(values) < 10 or not start:
        return None
    fall = mean(start) - mean(values)
    noise = 2 * math.hypot(error(start), error(values))
    if noise > 0.05 * abs(mean(start)):
        return None
    return mean(values) if fall < 0.01 * abs(mean(start)) else None


SFT = (
    Watch(
        "loss_not_falling",
        ("loss/nll",),
        loss_not_falling,
        "the model learns nothing from these data, or already knew them",
        "learning_rate (up if the loss is flat, down if it jumps), warmup_steps down; look at the data with "
        "rlhf data preview",
        patience=5,
        relief=10,
    ),
)
REWARD = (
    Watch(
        "near_chance",
        ("accuracy",),
        near_chance,
        "the reward model separates chosen from rejected responses no better than a coin",
        "learning_rate, more pairs, a larger model; check that chosen and rejected are not swapped in the data",
        patience=5,
        relief=10,
    ),
    Watch(
        "loss_above_log_2",
        ("loss/bradley_terry",),
        loss_above_log_2,
        "the loss is higher than with the answer 'one half' for every pair: the scores are confident and wrong",
        "learning_rate down, warmup_steps up, max_grad_norm down",
        patience=5,
        relief=10,
    ),
    Watch(
        "overfit",
        ("eval_accuracy", "eval_accuracy_low", "eval_accuracy_high", "accuracy"),
        reward_overfit,
        "held-out accuracy falls and is well below training accuracy: the training pairs are memorised",
        "num_train_epochs down, learning_rate down, weight_decay up, more pairs",
        relief=2,
    ),
)
DPO = (
    Watch(
        "not_the_reference",
        ("logps/chosen_minus_reference", "step"),
        not_the_reference,
        "the policy is not its reference at the first step, so this is not the loss of DPO: the forward pass has "
        "noise, or the two read the same files in other ways",
        "attn_implementation: eager, bf16: false; delete the cache of reference log-probabilities (HOME/cache)",
        relief=10,
    ),
    Watch(
        "chosen_falls",
        ("logps/chosen_minus_reference",),
        chosen_falls,
        "chosen responses have become much less likely than under the reference: DPO rewards only the margin, and "
        "probability has moved to responses that are in no pair",
        "learning_rate down, beta up, num_train_epochs down; SFT on the chosen responses first",
        relief=10,
    ),
    Watch(
        "margin_negative",
        ("rewards/margins", "rewards/accuracies"),
        margin_negative,
        "the policy prefers the rejected responses more than the reference does",
        "learning_rate down; check that chosen and rejected are not swapped, and that ref_model is the SFT model",
        patience=5,
        relief=10,
    ),
    Watch(
        "margin_exploding",
        ("rewards/margins", "rewards/accuracies"),
        margin_exploding,
        "the policy is more certain of the training pairs than any label can be: the pairs are memorised",
        "num_train_epochs down, learning_rate down, label_smoothing, loss_type ipo",
        relief=10,
    ),
    Watch(
        "overfit",
        ("eval_nll", "rewards/accuracies"),
        dpo_overfit,
        "the loss on held-out pairs rises while nearly all training pairs are correct: the pairs are memorised",
        "num_train_epochs down, learning_rate down, beta up, more pairs",
        relief=2,
    ),
    Watch(
        "nothing_learnt",
        ("loss/dpo", "rewards/margins"),
        nothing_learnt,
        "the policy has not moved from its start: the steps are too small, or chosen and rejected are the same",
        "learning_rate up, warmup_steps down; look at the pairs with rlhf data preview",
        patience=5,
        relief=10,
    ),
)
