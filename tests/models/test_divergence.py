"""KL along responses, against an explicit sum over the vocabulary."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.evaluation.sampled import divergence
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.tree_attention import use_tree_attention


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("heads", [("linear", "linear"), ("own", "linear"), ("own", "own")])
@pytest.mark.parametrize("layout", ["flat", "trees"])
def test_each_figure_by_its_definition(make_model, examples, heads, temperature, layout):
    models = [make_model("llama", seed=seed) for seed in (0, 1)]
    assert all(map(use_tree_attention, models))
    policy, reference = (Policy(m, Reader(layout, head), temperature) for m, head in zip(models, heads))
    found = divergence(policy, reference, pack(examples, layout=layout, row_length=60, flat_from=0))
    place = 0
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([example.prompt_ids + completion])
            with torch.no_grad():
                p, q = (torch.log_softmax(m(input_ids=ids).logits[0] / temperature, -1).double() for m in models)
            for k, token in enumerate(completion):
                t = len(example.prompt_ids) + k - 1
                assert found.logprobs[place].item() == pytest.approx(p[t, token].item(), abs=1e-5)
                assert found.ref_logprobs[place].item() == pytest.approx(q[t, token].item(), abs=1e-5)
                assert found.entropy[place].item() == pytest.approx(-(p[t].exp() * p[t]).sum().item(), abs=1e-5)
                assert found.kl[place].item() == pytest.approx((p[t].exp() * (p[t] - q[t])).sum().item(), abs=1e-5)
                place += 1
    assert place == len(found.kl)


def test_a_policy_has_no_distance_from_itself(make_model, examples):
    policy = Policy(make_model("llama"), Reader())
    found = divergence(policy, policy, pack(examples))
    assert found.kl.abs().max().item() == 0.0 and torch.equal(found.logprobs, found.ref_logprobs)
