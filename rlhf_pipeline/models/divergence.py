"""The distance of two policies on given responses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.logprobs import token_kl, token_logprobs
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.models.forward import hidden_states, output_head, predicting_logits, trunk_of
from rlhf_pipeline.models.modules import Policy


@dataclass(frozen=True)
class Divergence:
    """Values per completion token, (N,) in nats: log-probabilities under both models, entropy of the policy, exact KL.

    The KL is that of the next-token distributions at the token's position: sum_v pi(v) log(pi(v) / pi_ref(v)).
    """

    logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor


@torch.no_grad()
def divergence(policy: Policy, reference: Policy, batch: PackedBatch) -> Divergence:
    """Score a packed batch under a policy and a reference. Both must be able to read its layout."""
    if policy.reader.head == reference.reader.head == "linear":
        scored = []
        for one in (policy, reference):
            hidden = hidden_states(trunk_of(one.model), batch, batch.predict_index)
            head = output_head(one.model, one.temperature)
            scored.append((head, hidden, *token_logprobs(head, hidden, batch.target_ids, entropy=one is policy)))
        (head, hidden, logprobs, entropy), (ref_head, ref_hidden, ref_logprobs, _) = scored
        assert entropy is not None  # the policy was asked for it
        return Divergence(logprobs, ref_logprobs, entropy, token_kl(head, hidden, ref_head, ref_hidden))
    mine, theirs = (
        torch.log_softmax(predicting_logits(one.model, batch) / one.temperature, -1) for one in (policy, reference)
    )
    target = batch.target_ids[:, None]
    return Divergence(
        mine.gather(-1, target).squeeze(-1),
        theirs.gather(-1, target).squeeze(-1),
        -(mine.exp() * mine).sum(-1),
        (mine.exp() * (mine - theirs)).sum(-1),
    )
