"""FLOPs of a tiny llama against the formula worked out by hand."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.training.cost import CostMeter, ModelShape


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


# Per layer: query and output 16 x 16, key and value 16 x 8 (two heads of 4), three matrices 16 x 32.
MATMUL = 2 * (2 * 256 + 2 * 128 + 3 * 512)
HEAD = 50 * 16
ATTENTION = 2 * 16


def test_shape():
    assert ModelShape.of(llama()) == ModelShape(MATMUL, HEAD, ATTENTION)
    assert ModelShape.of(llama(), head=False) == ModelShape(MATMUL, 0, ATTENTION)
    assert ModelShape.of(llama(tie_word_embeddings=True)) == ModelShape(MATMUL, HEAD, ATTENTION)
    assert ModelShape.of(llama().model, head=False) == ModelShape(MATMUL, 0, ATTENTION)


def test_flops_of_a_packed_pair():
    example = Example([1, 2, 3, 4, 5, 6], [[7, 8], [7, 8, 9]], [True, True], "k", "w")
    # 11 positions; the prompt attends to 1 + ... + 6 = 21, the completions to 7 + 8 and 7 + 8 + 9; 5 are predicted.
    expected = 2 * MATMUL * 11 + 4 * ATTENTION * (21 + 15 + 24) + 2 * HEAD * 5
    shape = ModelShape.of(llama())
    assert shape.batch_flops(pack([example], 0)) == expected
    # As plain rows the prompt is computed twice.
    twice = 2 * MATMUL * 17 + 4 * ATTENTION * (2 * 21 + 15 + 24) + 2 * HEAD * 5
    assert shape.batch_flops(pack([example], 0, layout="rows")) == twice
    meter = CostMeter()
    meter.train(shape, pack([example], 0))
    meter.score(shape, pack([example], 0))
    assert meter.report()["flops"] == 4 * expected


def test_padding_costs_nothing():
    example = Example([1, 2, 3], [[7, 8]], [True], "k", "w")
    shape = ModelShape.of(llama())
    assert shape.batch_flops(pack([example], 0, row_length=30)) == shape.batch_flops(pack([example], 0))


def test_flops_of_cached_sampling():
    # A prompt of 6 and a response of 3: the last token is not fed back, so 8 positions over 1 + ... + 8 = 36.
    meter = CostMeter()
    meter.generate(ModelShape.of(llama()), [6, 6], [3, 1])
    one, other = (2 * MATMUL * n + 4 * ATTENTION * n * (n + 1) // 2 for n in (8, 6))
    assert meter.report()["flops"] == one + 2 * HEAD * 3 + other + 2 * HEAD
    assert meter.report()["tokens_generated"] == 4


def test_against_the_counter_of_torch():
    """With eager attention torch counts the whole square; the rotary embedding's product is left out here."""
    from torch.utils.flop_counter import FlopCounterMode

    model = llama(attn_implementation="eager")
    length = 12
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, length, dtype=torch.long))
    expected = 2 * (MATMUL + HEAD) * length + 4 * ATTENTION * length**2
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_time_before_a_resume_is_part_of_the_bill():
    meter = CostMeter(earlier_seconds=100.0)
    assert meter.wall_seconds() >= 100.0
    with meter.part("scoring"):
        pass
    with meter.part("scoring"):
        pass
    assert list(meter.report()["seconds"]) == ["scoring"]
