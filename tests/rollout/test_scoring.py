"""Scoring: how many responses and tokens go into one call, and back in their order."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.rollout import scoring

# Prompts of 2 and 4 tokens; responses of 2, 2 and of 1, 3.
SHORT = Example([5, 5], [[1, 9], [2, 9]], [False] * 2, "short", "here")
LONG = Example([6, 6, 6, 6], [[3], [4, 9, 9]], [False] * 2, "long", "here")


class Reader:
    """Scores a response by its first token; it fails above `room` tokens, and keeps what it was given."""

    def __init__(self, room: int = 1_000):
        self.room, self.calls = room, []

    def __call__(self, examples):
        self.calls.append([(one.prompt_ids[0], [ids[0] for ids in one.completions]) for one in examples])
        if sum(len(one.prompt_ids) + sum(map(len, one.completions)) for one in examples) > self.room:
            raise MemoryError("no room")
        return torch.tensor([float(ids[0]) for one in examples for ids in one.completions])


@pytest.mark.parametrize(
    ("tokens", "calls"),
    [
        (100, [[(6, [3, 4]), (5, [1, 2])]]),
        (14, [[(6, [3, 4]), (5, [1, 2])]]),  # 4 + 1 + 3 + 2 + 2 + 2: each prompt once
        (13, [[(6, [3, 4]), (5, [1])], [(5, [2])]]),
        (8, [[(6, [3, 4])], [(5, [1, 2])]]),
        (6, [[(6, [3])], [(6, [4])], [(5, [1, 2])]]),  # the second has 7 alone
        (1, [[(6, [3])], [(6, [4])], [(5, [1])], [(5, [2])]]),
    ],
)
def test_tokens_of_one_call_by_hand(monkeypatch, tokens, calls):
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", tokens)
    reader = Reader()
    assert scoring.score(reader, [SHORT, LONG], responses_at_once=4).tolist() == [1.0, 2.0, 3.0, 4.0]
    assert reader.calls == calls


def test_a_halving_halves_the_tokens_too(monkeypatch):
    """A call of 8 tokens does not fit into 7: from then on 2 responses and 4 tokens, so one response each."""
    monkeypatch.setattr(scoring, "TOKENS_AT_ONCE", 8)
    reader, said = Reader(room=7), []
    found = scoring.score(reader, [SHORT, LONG], responses_at_once=4, memory=Memory(said.append))
    assert found.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert reader.calls == [[(6, [3, 4])], [(6, [3])], [(6, [4])], [(5, [1])], [(5, [2])]]
    assert len(said) == 1
