"""Tables over all responses against the plain scoring of each response by itself."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.enumerate import leaf_logprobs, leaf_scores
from rlhf_pipeline.evaluation.enumeration import ResponseTree
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model, read_reward_model
from tests.models.conftest import build

PROMPT = [3, 9, 4]
SMALL = {"vocab_size": 7}


def everything(tree: ResponseTree) -> Example:
    """One tree of all responses, for the general packing."""
    completions = [tree.completion(leaf) for leaf in range(tree.num_leaves)]
    return Example([p % 7 for p in PROMPT], completions, tree.ended.tolist(), "p", "x")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom", "mistral"])
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_log_probabilities_are_those_of_each_response_alone(name, horizon):
    tree = ResponseTree(7, 1, horizon)
    attention = "eager" if name == "gemma2" else None
    model = build(name, attn_implementation=attention, **SMALL)
    policy = Policy(model, inspect_model(model), temperature=1.3)
    example = everything(tree)
    with torch.no_grad():
        batch = pack([example], layout="rows")
        expected = torch.zeros(tree.num_leaves, dtype=torch.float64)
        for row, ids in enumerate(example.completions):  # the model's own forward, one plain row at a time
            logits = model(input_ids=torch.tensor([example.prompt_ids + ids])).logits[0] / 1.3
            logprobs = torch.log_softmax(logits, -1)
            expected[row] = sum(logprobs[len(example.prompt_ids) - 1 + t, token] for t, token in enumerate(ids))
    found = leaf_logprobs(policy, example.prompt_ids, tree)
    assert found.dtype == torch.float64 and batch.num_completions == tree.num_leaves

    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_scores_are_those_of_each_response_alone(name, pooling):
    tree = ResponseTree(7, 1, 3)
    network = build(name, scorer=True, **SMALL)
    network.config.score_pooling, network.config.reward_shift = pooling, 0.37
    model = read_reward_model(network)
    with torch.no_grad():
        expected = model(pack([everything(tree)], layout="rows"))
    found = leaf_scores(model, everything(tree).prompt_ids, tree)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.std() > 0.05


def test_the_number_of_families_at_once_changes_nothing():
    tree = ResponseTree(7, 1, 4)
    policy = Policy(build("llama", **SMALL), inspect_model(build("llama", **SMALL)))
    whole = leaf_logprobs(policy, [3, 2], tree)
    torch.testing.assert_close(leaf_logprobs(policy, [3, 2], tree, rows_at_once=5), whole, rtol=0, atol=1e-5)
