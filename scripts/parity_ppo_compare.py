"""The comparisons of parity_ppo.py: the peer's and our figures for every quantity, and a tolerance or a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from parity_ppo_ours import FP32, Case, Comparison, Weights, bessel
from torch import Tensor

from rlhf_pipeline.algorithms.kl import k1
from rlhf_pipeline.algorithms.masked import masked_mean, whiten
from rlhf_pipeline.models.modules import ActorCritic
from rlhf_pipeline.rollout.rollout import rollout_metrics
from rlhf_pipeline.stages.ppo import derive

SLOT = "the peer's absorbing slot holds the score"
BESSEL = "unbiased variance: a factor sqrt((n - 1) / n)"
TERMINAL = "the peer's terminal value is the critic's at the stop token, and the score comes one step later"
PADDING = "the peer's mean includes padding"
COUNTED = "the peer's slot counts as a token"


def _estimates(case: Case) -> Iterator[Comparison]:
    """Token rewards, advantages and returns, unchanged and on the peer's slots."""
    name, mask, peer = case.name, case.mask, case.peer
    ours, slots = case.raw(case.rollout), case.raw(case.slots)
    a = case.arguments
    same = a["gamma"] == 1.0 and (a["lam"] == 1.0 or case.setting["critic"] == "reward")
    yield Comparison(name, "token rewards", peer["rewards"][mask], ours.rewards[mask], None, SLOT)
    yield Comparison(name, "token rewards, summed over a response", peer["rewards"].sum(1), ours.rewards.sum(1))
    yield Comparison(name, "token rewards, on the peer's slots", peer["rewards"], slots.rewards)
    for quantity, theirs, mine, on_slots in (
        ("advantages", peer["advantages_before"], ours.advantages, slots.advantages),
        ("returns", peer["returns"], ours.returns, slots.returns),
    ):
        why = () if same else (None, TERMINAL)
        yield Comparison(name, quantity, theirs[mask], mine[mask], *why)
        yield Comparison(name, f"{quantity}, on the peer's slots", theirs[case.slots.mask], on_slots[case.slots.mask])
    if same:
        whitened = case.estimates.advantages
        yield Comparison(name, "whitened advantages", peer["advantages"], whitened, None, BESSEL)
    else:
        whitened = whiten(slots.advantages, mask)
    label = "whitened advantages, same variance" if same else "whitened advantages, on the peer's slots, same variance"
    yield Comparison(name, label, peer["advantages"], whitened * case.bessel)


def _tokens(case: Case) -> Iterator[Comparison]:
    """The outputs of the models for the rollouts."""
    name, mask, rollout, peer = case.name, case.mask, case.rollout, case.peer
    yield Comparison(name, "response lengths", peer["sequence_lengths"] + 1, mask.sum(1), 0.0)
    yield Comparison(name, "token log-probabilities", peer["logprobs"][mask], rollout.logprobs[mask])
    yield Comparison(name, "reference log-probabilities", peer["ref_logprobs"][mask], rollout.ref_logprobs[mask])
    yield Comparison(name, "values", peer["values"][mask], rollout.values[mask])
    yield Comparison(name, "values, on the peer's slots", peer["values"], case.slots.values)
    yield Comparison(name, "scores", peer["scores"], rollout.scores)
    yield Comparison(name, "KL (k1) of each token", peer["kl"], k1(rollout.logprobs, rollout.ref_logprobs))
    metrics = rollout_metrics(rollout, case.estimates, kl_coef=case.arguments["kl_coef"])
    for key in ("kl", "entropy", "scores", "non_score_reward", "rlhf_reward"):
        yield _metric(case, f"objective/{key}", metrics[f"objective/{key}"])
    yield _metric(case, "val/num_eos_tokens", metrics["val/num_eos_tokens"], 0.0)


def _metric(
    case: Case, key: str, ours: float | Tensor, tolerance: float | None = FP32, *, why: str = "", note: str = ""
) -> Comparison:
    """A figure of the peer's log."""
    peer = torch.tensor(case.peer_metrics[key], dtype=torch.float64)
    mine = torch.as_tensor(ours, dtype=torch.float64).detach()
    return Comparison(case.name, key + note, peer, mine, tolerance, why)


def _losses(case: Case) -> Iterator[Comparison]:
    """Losses and gradients at each of the peer's optimizer steps, with the peer's weights at that step."""
    metrics: list[dict[str, Tensor]] = []
    for step, (window, theirs) in enumerate(zip(case.windows, case.peer_micro_batches, strict=True)):
        model, name, tokens = case.actor_critic(step), f"{case.name}, step {step + 1}", window.counts["tokens"]
        (micro_batch,) = window.micro_batches
        loss = case.losses(micro_batch, model)
        policy, value = (loss.terms[f"loss/{part}_avg"][0] / tokens for part in ("policy", "value"))
        slot_value, slot_clipped = case.slot_value_loss(model)
        actor, critic = (case.peer_gradient(step, role) for role in ("actor", "critic"))
        pg, vf, vf_coef = torch.tensor(theirs["pg_loss"]), torch.tensor(theirs["vf_loss"]), case.arguments["vf_coef"]

        def gradient(loss: Tensor, role: str, model: ActorCritic = model) -> Tensor:
            return case.gradient(loss, model, role)

        if step:  # before the first step the ratio is 1 and the loss the mean of whitened advantages, 0 for both
            yield Comparison(name, "policy loss", pg, policy.detach(), None, BESSEL)
        yield Comparison(name, "policy loss, same variance", pg, policy.detach() * case.bessel)
        mine = gradient(policy * case.bessel, "actor")
        yield Comparison(name, "gradient of the policy loss, same variance", actor, mine)
        yield Comparison(name, "value loss", vf, value.detach(), None, COUNTED)
        yield Comparison(name, "value loss, on the peer's slots", vf, slot_value.detach())
        mine = gradient(value * vf_coef, "critic")
        yield Comparison(name, "gradient of the value loss", critic, mine, None, COUNTED)
        mine = gradient(slot_value * vf_coef, "critic")
        yield Comparison(name, "gradient of the value loss, on the peer's slots", critic, mine)
        if step == 0:
            entropy = torch.tensor(theirs["entropy"])[torch.tensor(theirs["rows"]).argsort()]
            yield Comparison(name, "entropy of each token", entropy[case.mask], case.rollout.entropy[case.mask])
        figures = {key: value / tokens for key, (value, denominator) in loss.metrics.items() if denominator == "tokens"}
        metrics.append({**figures, "slot_clipped": slot_clipped})
    yield from _step_metrics(
        case, {key: float(sum(found[key] for found in metrics)) / len(metrics) for key in metrics[0]}
    )


def _step_metrics(case: Case, mean: dict[str, float]) -> Iterator[Comparison]:
    """The logged figures of the optimizer steps. mean: our means over tokens, averaged over steps."""
    cells, count = case.mask.numel(), int(case.mask.sum())
    spread = ", ours spread over padding"
    yield _metric(case, "policy/clipfrac_avg", mean["policy/clipfrac_avg"])
    approx_kl, ratio = mean["policy/approxkl_avg"], mean["val/ratio"]
    yield _metric(case, "policy/approxkl_avg", approx_kl, None, why=PADDING)
    yield _metric(case, "policy/approxkl_avg", approx_kl * count / cells, note=spread)
    yield _metric(case, "val/ratio", ratio, None, why=PADDING)
    yield _metric(case, "val/ratio", (ratio * count + cells - count) / cells, note=spread)
    why = "the peer's is the variance of the micro-batches' mean ratios, not of the tokens' ratios"
    yield _metric(case, "val/ratio_var", derive(mean)["val/ratio_var"], None, why=why)
    yield _metric(case, "policy/entropy_avg", mean["policy/entropy_avg"], None, why=PADDING)
    yield _metric(case, "val/clipfrac_avg", mean["val/clipfrac_avg"], None, why=COUNTED)
    yield _metric(case, "val/clipfrac_avg", mean["slot_clipped"], note=", on the peer's slots")


def _micro_batches(case: Case) -> Iterator[Comparison]:
    """Four micro-batches of two: their losses, the means, the accumulated gradient, the trainer's own averages."""
    name, model = case.name, case.actor_critic()
    parts = [case.part(theirs["rows"]) for theirs in case.peer_micro_batches]
    sums = [case.losses(part, model).terms["loss/policy_avg"][0] * case.bessel for part in parts]
    means = torch.stack([loss / part.batch.num_tokens for loss, part in zip(sums, parts, strict=True)])
    overall = torch.stack(sums).sum() / case.mask.sum()
    pg, vf = (torch.tensor([theirs[key] for theirs in case.peer_micro_batches]) for key in ("pg_loss", "vf_loss"))
    values = torch.stack([case.slot_value_loss(model, theirs["rows"])[0] for theirs in case.peer_micro_batches])
    yield Comparison(name, "policy loss of each micro-batch, same variance", pg, means.detach())
    yield Comparison(name, "value loss of each micro-batch, on the peer's slots", vf, values.detach())
    why = "a mean of the micro-batches' means, not one division by the number of tokens"
    yield Comparison(name, "policy loss, same variance", pg.mean(), overall.detach(), None, why)
    value = case.slot_value_loss(model)[0].detach()
    yield Comparison(name, "value loss, on the peer's slots", vf.mean(), value, None, why)
    gradient, label = case.peer_gradient(0, "actor"), "gradient of the policy loss"
    mine = case.gradient(overall, model, "actor")
    yield Comparison(name, f"{label}, same variance", gradient, mine, None, why)
    mine = case.gradient(means.mean(), model, "actor")
    yield Comparison(name, f"{label}, mean of means, same variance", gradient, mine)
    why = "the peer's average includes places of its table that num_mini_batches leaves at 0"
    share = case.arguments["num_mini_batches"]
    yield _metric(case, "loss/value_avg", values.mean(), None, why=why, note=", on the peer's slots, mean of means")
    note = f", on the peer's slots, mean of means, divided by {share}"
    yield _metric(case, "loss/value_avg", values.mean() / share, note=note)


def _reward_whitening(case: Case) -> Iterator[Comparison]:
    """Rewards scaled to variance 1 around their mean."""
    peer, slots = case.peer["rewards"], case.slots.mask
    why = "over the peer's slots, and " + BESSEL
    yield Comparison(case.name, "whitened token rewards", peer[case.mask], case.estimates.rewards[case.mask], None, why)
    raw = case.raw(case.slots, whiten_rewards=True).rewards
    mean = masked_mean(raw, slots)
    same = torch.where(slots, mean + (raw - mean) * bessel(slots), 0.0)
    yield Comparison(case.name, "whitened token rewards, on the peer's slots, same variance", peer, same)


def _stop_token(case: Case) -> Iterator[Comparison]:
    """A stop token that differs from the tokenizer's end-of-text token, and a penalty for cut responses."""
    why = "the peer looks for the end-of-text token in the response, not for the stop token at its end"
    yield Comparison(case.name, "scores with missing_eos_penalty", case.peer["scores"], case.rollout.scores, None, why)


def _sampled_pad(case: Case) -> Iterator[Comparison]:
    """A pad token sampled inside a response."""
    lengths, peer = case.peer["sequence_lengths"] + 1, case.peer
    why = "the peer ends a response at a sampled pad token; here it is a token like any other"
    yield Comparison(case.name, "response lengths", lengths, case.mask.sum(1), None, why)
    yield Comparison(case.name, "scores", peer["scores"], case.rollout.scores, None, why)
    before = torch.arange(case.width) < lengths[:, None]
    ours = case.rollout.logprobs[before]
    yield Comparison(case.name, "token log-probabilities before the pad token", peer["logprobs"][before], ours)


PARTS: dict[str, tuple[Callable[[Case], Iterator[Comparison]], ...]] = {
    "defaults": (_tokens, _estimates, _losses),
    "own critic": (_tokens, _estimates),
    "lambda 1": (_estimates,),
    "discounted": (_estimates,),
    "micro-batches": (_micro_batches,),
    "reward whitening": (_reward_whitening,),
    "other stop token": (_stop_token,),
    "sampled pad": (_sampled_pad,),
}


def _optimizer_steps(document: dict[str, Any], weights: Weights) -> Iterator[Comparison]:
    """The number of optimizer steps on one rollout, for several ways of cutting it."""
    for counted in document["peer"]["step_counts"]:
        arguments, batches = counted["arguments"], counted["dataset_batches"]
        ours = len(Case(document, weights, "defaults", arguments=arguments).windows)
        label = (
            f"optimizer steps: {arguments['num_ppo_epochs']} epochs, num_mini_batches "
            f"{arguments['num_mini_batches']}, micro-batches of {arguments['per_device_train_batch_size']}, "
            f"accumulation {arguments['gradient_accumulation_steps']}" + (", last batch of the data" * (batches == 1))
        )
        why = ""
        if batches == 1:
            why = "accelerate steps at every micro-batch of the last batch of a pass over the prompts"
        elif counted["optimizer_steps"] != ours:
            why = "the peer steps once for each gradient_accumulation_steps micro-batches, whatever num_mini_batches is"
        sides = (torch.tensor(float(count)) for count in (counted["optimizer_steps"], ours))
        yield Comparison("steps", label, *sides, None if why else 0.0, why)


def compare(document: dict[str, Any], weights: Weights) -> list[Comparison]:
    """All comparisons, from the peer's figures in `document` and our newly computed ones."""
    found = []
    for name, parts in PARTS.items():
        case = Case(document, weights, name)
        found += [row for part in parts for row in part(case)]
    return found + list(_optimizer_steps(document, weights))
