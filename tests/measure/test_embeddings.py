"""Embeddings of prompts, and the demonstrations that they find, by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.measure import icdpo
from rlhf_pipeline.measure.contexts import Pool
from rlhf_pipeline.measure.embeddings import prompt_embeddings
from rlhf_pipeline.models.forward import Reader

READING = {"responses_at_once": 2, "device": "cpu"}
# The hidden state of a token: a unit vector, or for the token 3 their sum. 0 stands behind every prompt.
STATES = [[9.0, 9.0, 9.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]]


class Words(nn.Module):
    """A trunk whose hidden states are those of the tokens alone."""

    config = SimpleNamespace(_attn_implementation="sdpa")

    def __init__(self):
        super().__init__()
        self.states = nn.Embedding.from_pretrained(torch.tensor(STATES))

    @property
    def base_model(self) -> Words:
        return self

    def forward(self, input_ids, **_):
        return SimpleNamespace(last_hidden_state=self.states(input_ids))


def policy_of(layout: str) -> SimpleNamespace:
    return SimpleNamespace(model=Words(), reader=Reader(layout))


def prompt(*ids: int) -> Example:
    return Example(list(ids), [], [], prompt_key=str(ids), where="here")


@pytest.mark.parametrize("layout", ["rows", "trees", "flat"])
def test_a_prompt_is_the_mean_of_its_tokens(layout):
    """In their order, whatever the batches; what stands behind a prompt does not count."""
    prompts = [prompt(1), prompt(1, 2, 2, 2), prompt(3, 1), prompt(2, 2, 1)]
    found = prompt_embeddings(policy_of(layout), prompts, **READING)
    expected = [[1, 0, 0], [1 / 4, 3 / 4, 0], [1, 1 / 2, 1 / 2], [1 / 3, 2 / 3, 0]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-7)


def test_the_demonstrations_with_the_nearest_prompts():
    """Cosines of (2, 1) with (1, 2): .8, (1, 0): .894, itself, which is the prompt's own, and (1, 1, 1): .775."""
    config = load_config(
        "evaluate", None, extra={"in_context": {"demonstrations": 2, "retrieval": "embeddings"}}
    ).config
    bench = SimpleNamespace(config=config, reading=READING, policy=lambda _: policy_of("trees"))
    pool = Pool(None, "here", "demonstration", [prompt(1, 2, 2), prompt(1), prompt(1, 1, 2), prompt(3)])
    arm = SimpleNamespace(policy="sft")
    (found,) = icdpo.retrieved(bench, arm, pool, [prompt(1, 1, 2)])
    assert [one.prompt_ids for one in found] == [[1, 2, 2], [1]]  # the nearest one last
