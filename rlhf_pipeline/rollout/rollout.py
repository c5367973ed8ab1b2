"""A rollout: sampled responses with all values that PPO needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.kl import k1, k3
from rlhf_pipeline.algorithms.masked import masked_sum
from rlhf_pipeline.algorithms.policy import ImportanceWeights, importance_weights
from rlhf_pipeline.data.tokenize import Example


@dataclass(frozen=True)
class Rollout:
    """C responses of at most R tokens; matrices are (C, R), zero at padding."""

    examples: list[Example]  # one completion each
    mask: Tensor  # (C, R) bool
    ended: Tensor  # (C,) bool
    scores: Tensor  # (C,) scores of the reward source; scaled, clipped and with penalties once they are shaped
    logprobs: Tensor  # of the sampling policy, recomputed with the training forward
    ref_logprobs: Tensor
    values: Tensor | None  # of the critic, at the positions that predict each token; None without a critic
    entropy: Tensor
    sampler_logprobs: Tensor | None = None  # those of the engine that sampled; None: the model itself sampled

    def importance(self, cap: float) -> ImportanceWeights | None:
        """Truncated importance weights of the sampled tokens; None if the model itself sampled (all are 1)."""
        if self.sampler_logprobs is None:
            return None
        return importance_weights(self.logprobs, self.sampler_logprobs, self.mask, cap=cap)


@dataclass(frozen=True)
class Estimates:
    """Values per token, (C, R): rewards including the KL, advantages and returns, whitened if configured.

    returns: what the critic is trained on; None without a critic.
    importance: weights of tokens that another engine has sampled; None: the model itself sampled.
    """

    rewards: Tensor
    advantages: Tensor
    returns: Tensor | None
    importance: ImportanceWeights | None = None


def apply_missing_eos_penalty(scores: Tensor, ended: Tensor, penalty: float | None) -> Tensor:
    """Subtract `penalty` from the score (C,) of each response that was cut; this moves the optimum."""
    return scores if not penalty else scores - penalty * (~ended).to(scores.dtype)


def shape_scores(scores: Tensor, lengths: Tensor, *, clip: float | None, per_token: float | None) -> Tensor:
    """Scores (C,) clipped to -clip .. clip, minus `per_token` for each token of a response; both move the optimum.

    It is then pi_ref exp(R' / beta) / Z of the shaped score R'. None: not clipped, no penalty.
    """
    if clip is not None:  # a score that is not finite is an error, which must stay
        scores = torch.where(scores.isfinite(), scores.clamp(-clip, clip), scores)
    return scores if not per_token else scores - per_token * lengths.to(scores.dtype)


def rollout_metrics(
    rollout: Rollout, estimates: Estimates, *, kl_coef: float, reduce=lambda sums: sums
) -> dict[str, float]:
    """Metrics of a rollout under TRL's names: means over sequences of sums over their tokens.

    With a critic, explained_variance = 1 - var(return - value) / var(return), over active tokens.
    """
    mask, double = rollout.mask, torch.float64
    kl = masked_sum(k1(rollout.logprobs, rollout.ref_logprobs), mask, 1).to(double)
    kl3 = masked_sum(k3(rollout.logprobs, rollout.ref_logprobs), mask, 1).to(double)
    surprise = masked_sum(-rollout.logprobs, mask, 1).to(double)
    scores, ended = rollout.scores.to(double), rollout.ended.to(double)
    totals = [
        torch.ones_like(scores).sum(),
        mask.sum().to(double),
        kl.sum(),
        kl3.sum(),
        surprise.sum(),
        scores.sum(),
        (scores**2).sum(),
        ended.sum(),
    ]
    if rollout.values is not None and estimates.returns is not None:
        returns = estimates.returns.to(double)
        errors = (estimates.returns - rollout.values).to(double)
        totals += [masked_sum(values**power, mask) for values in (errors, returns) for power in (1, 2)]
    sums = reduce(torch.stack(totals)).tolist()
    count, tokens, kl_sum, kl3_sum, surprise_sum, score_sum, score_square, ended_sum, *of_critic = sums
    mean_kl, mean_score = kl_sum / count, score_sum / count
    metrics = {
        "objective/kl": mean_kl,
        "objective/kl_k3": kl3_sum / count,
        "objective/entropy": surprise_sum / count,
        "objective/scores": mean_score,
        "objective/scores_std": max(score_square / count - mean_score**2, 0.0) ** 0.5,
        "objective/non_score_reward": -kl_coef * mean_kl,
        "objective/rlhf_reward": mean_score - kl_coef * mean_kl,
        "val/num_eos_tokens": ended_sum,
        "val/ended": ended_sum / count,
        "val/response_length": tokens / count,
    }
    if of_critic:
        e1, e2, g1, g2 = of_critic
        variance = max(g2 / tokens - (g1 / tokens) ** 2, 0.0)
        unexplained = max(e2 / tokens - (e1 / tokens) ** 2, 0.0)
        metrics["val/explained_variance"] = 1 - unexplained / variance if variance > 0 else 0.0
    return metrics


def sampler_metrics(mask: Tensor, found: ImportanceWeights | None, *, reduce=lambda sums: sums) -> dict[str, float]:
    """The distance of a sampling engine from the trained model; {} if the model itself sampled.

    Per token: the mean |log pi_old - log mu| in nats, and the share of importance weights that the cap has truncated.
    """
    if found is None:
        return {}
    sums = reduce(torch.stack([mask.sum().double(), found.difference.double(), found.truncated.double()]))
    tokens, difference, truncated = sums.tolist()
    return {"sampler/logprob_difference": difference / tokens, "sampler/truncated": truncated / tokens}
