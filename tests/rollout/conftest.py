"""A policy on four tokens, small enough that all its responses can be listed."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.modules import Policy
from tests.rollout.tree import Table, World, network

PAD, EOS, VOCAB, HORIZON = 0, 1, 4, 3


def all_responses(vocab: int = VOCAB, horizon: int = HORIZON, eos: int = EOS) -> list[tuple[list[int], bool]]:
    """Every response: a string without EOS, then EOS, or `horizon` tokens and no EOS."""
    words = [token for token in range(vocab) if token != eos]
    found = [([*string, eos], True) for n in range(horizon) for string in product(words, repeat=n)]
    return found + [(list(string), False) for string in product(words, repeat=horizon)]


@dataclass(frozen=True)
class Tree:
    """One prompt, a policy, and all of its responses as the completions of one example."""

    policy: Policy
    example: Example

    def logprobs(self) -> torch.Tensor:
        """(leaves,) log-probability of each response, float64, differentiable."""
        batch = pack([self.example])
        return batch.per_completion(self.policy(batch).logprobs.double())


def tiny_llama(seed: int = 0, dtype: torch.dtype = torch.float32, vocab: int = VOCAB, **changes):
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": vocab,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "initializer_range": 0.5,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
    }
    torch.manual_seed(seed)
    config = AutoConfig.for_model("llama", **{**settings, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


@pytest.fixture(scope="session")
def make_llama():
    torch.set_num_threads(1)
    return tiny_llama


@pytest.fixture
def make_tree(make_llama):
    """A tree of all responses to a prompt under a tiny Llama."""

    def make(seed=0, dtype=torch.float32, prompt=(2, 3, 2), temperature=1.0, vocab=VOCAB, horizon=HORIZON) -> Tree:
        responses = all_responses(vocab, horizon)
        policy = Policy(make_llama(seed, dtype, vocab), Reader(), temperature)
        ids, ended = [list(ids) for ids, _ in responses], [end for _, end in responses]
        return Tree(policy, Example(list(prompt), ids, ended, prompt_key="p", where="tree"))

    return make


@pytest.fixture(scope="module", params=[Table, network], ids=["table", "network"])
def tree(request) -> World:
    """The tree of 31 responses under a policy and a reference: a table of logits, or a tiny GPT-2."""
    torch.set_num_threads(1)
    return World(request.param(1), request.param(2))
