"""FLOPs of a tiny llama against the formula worked out by hand."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from rlhf_pipeline.algorithms.logprobs import token_logprobs
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.forward import hidden_states, output_head, trunk_of
from rlhf_pipeline.models.last_layer import skip_unread
from rlhf_pipeline.models.noise import without_noise
from rlhf_pipeline.rollout.sampler import sample
from rlhf_pipeline.training.cost import CostMeter, ModelShape, peak_memory_bytes, reset_peak_memory
from rlhf_pipeline.training.precision import checkpoint_activations


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
    assert shape.batch_flops(pack([example])) == expected
    # As plain rows the prompt is computed twice.
    twice = 2 * MATMUL * 17 + 4 * ATTENTION * (2 * 21 + 15 + 24) + 2 * HEAD * 5
    assert shape.batch_flops(pack([example], layout="rows")) == twice
    meter = CostMeter()
    meter.train(shape, pack([example]))
    meter.score(shape, pack([example]))
    assert meter.report()["flops"] == 4 * expected


def test_padding_costs_nothing():
    example = Example([1, 2, 3], [[7, 8]], [True], "k", "w")
    shape = ModelShape.of(llama())
    assert shape.batch_flops(pack([example], row_length=30)) == shape.batch_flops(pack([example]))


def sampled(*lengths: tuple[int, int]) -> list[Example]:
    """A response to each prompt, by the lengths of both."""
    return [Example([1] * prompt, [[2] * response], [True], "k", "w") for prompt, response in lengths]


def test_flops_of_cached_sampling():
    # A prompt of 6 and a response of 3: the last token is not fed back, so 8 positions over 1 + ... + 8 = 36.
    meter = CostMeter()
    meter.generate(ModelShape.of(llama()), sampled((6, 3), (6, 1)))
    one, other = (2 * MATMUL * n + 4 * ATTENTION * n * (n + 1) // 2 for n in (8, 6))
    assert meter.report()["flops"] == one + 2 * HEAD * 3 + other + 2 * HEAD
    assert meter.report()["tokens_generated"] == 4


def counted(run) -> int:
    """FLOPs of matrix products by torch's counter. It sees eager attention whole: masked products too."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


# Of a size at which the rotary embedding's product, which the formula leaves out, is next to nothing.
WIDER = {"hidden_size": 64, "intermediate_size": 96, "attn_implementation": "eager"}
LENGTH = 24


def single() -> Example:
    return Example(list(range(1, LENGTH - 7)), [list(range(1, 9))], [True], "k", "w")


def masked_away(shape: ModelShape, tokens: int) -> float:
    """What eager attention computes above the diagonal: 4 layers d_attn (T^2 - T (T + 1) / 2)."""
    return 4.0 * shape.attention * (tokens * tokens - tokens * (tokens + 1) // 2)


def logprob_sum(model, batch):
    hidden = hidden_states(trunk_of(model), batch, batch.predict_index)
    return token_logprobs(output_head(model), hidden, batch.target_ids)[0].sum()


def test_forward_of_a_frozen_model_against_the_counter_of_torch():
    model, batch = llama(**WIDER), pack([single()])
    shape, meter = ModelShape.of(model), CostMeter()
    meter.score(shape, batch)
    assert batch.active_tokens == LENGTH and batch.num_tokens == 8
    with torch.no_grad():
        found = counted(lambda: logprob_sum(model, batch))
    assert found == pytest.approx(meter.flops + masked_away(shape, LENGTH), rel=0.02)


def test_a_training_pass_against_the_counter_of_torch():
    model, batch = llama(**WIDER), pack([single()])
    shape, meter = ModelShape.of(model), CostMeter()
    meter.train(shape, batch)
    found = counted(lambda: logprob_sum(model, batch).backward())
    assert found == pytest.approx(meter.flops + 3 * masked_away(shape, LENGTH), rel=0.02)


def test_a_pair_in_one_tree_against_the_counter_of_torch():
    pair = Example(list(range(1, 13)), [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]], [True, True], "k", "w")
    model, batch = llama(**WIDER), pack([pair])
    shape = ModelShape.of(model)
    unseen = 4.0 * shape.attention * (22 * 22 - batch.context_tokens)
    assert batch.context_tokens == 78 + (13 + 14 + 15 + 16) + (13 + 14 + 15 + 16 + 17 + 18)
    with torch.no_grad():
        found = counted(lambda: logprob_sum(model, batch))
    assert found == pytest.approx(shape.batch_flops(batch) + unseen, rel=0.02)


@pytest.mark.parametrize("pairs", [1, 3])
def test_a_last_layer_that_skips_what_nobody_reads_against_the_counter_of_torch(pairs):
    pair = Example(list(range(1, 13)), [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]], [True, True], "k", "w")
    model, batch = llama(**WIDER), pack([pair] * pairs)
    whole = ModelShape.of(model)
    assert skip_unread(model.model)
    shape, meter = ModelShape.of(model), CostMeter()
    # Query and output projections 64 x 64 and three matrices 64 x 96, at 3 + 5 positions and the prompt's last one.
    assert shape.skipped == 2 * 64 * 64 + 3 * 64 * 96
    assert batch.num_predicting == 9 * pairs
    assert whole.batch_flops(batch) - shape.batch_flops(batch) == 2 * shape.skipped * 13 * pairs
    meter.train(shape, batch)
    unseen = 4.0 * shape.attention * (22 * 22 * pairs - batch.context_tokens)
    found = counted(lambda: logprob_sum(model, batch).backward())
    assert found == pytest.approx(meter.flops + 3 * unseen, rel=0.02)


def test_cached_sampling_against_the_counter_of_torch():
    model = llama(**WIDER)
    prompts, responses = [[3] * 10, [4] * 10], 9
    drawn = []

    def run():
        uniforms = torch.rand(2, responses, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        drawn.extend(sample(model, prompts, uniforms, stop_ids=[-1], cache_config=model.config))

    found = counted(run)
    lengths = [len(response.ids) for response in drawn]
    assert lengths == [9, 9]
    shape, meter = ModelShape.of(model), CostMeter()
    meter.generate(shape, sampled(*((10, length) for length in lengths)))
    # Only the prompt has a square to mask; every later token attends to all there is.
    assert found == pytest.approx(meter.flops + 2 * masked_away(shape, 10), rel=0.02)


def test_time_before_a_resume_is_part_of_the_bill():
    meter = CostMeter(earlier_seconds=100.0)
    assert meter.wall_seconds() >= 100.0
    with meter.part("scoring"):
        pass
    with meter.part("scoring"):
        pass
    assert list(meter.report()["seconds"]) == ["scoring"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems cannot start a peak anew")
def test_the_peak_of_a_stage_is_not_that_of_the_one_before_it():
    size = 400 * 2**20
    reset_peak_memory()
    before = peak_memory_bytes()
    block = np.ones(size, dtype=np.uint8)
    high = peak_memory_bytes()
    assert high - before > 0.9 * size
    del block
    assert peak_memory_bytes() > 0.99 * high  # the kernel counts in batches
    reset_peak_memory()
    assert peak_memory_bytes() < high - 0.9 * size


def test_shares_of_ppos_phases():
    meter = CostMeter(seconds={"training": 9.0, "generation": 1.0, "scoring": 0.5})
    assert meter.shares() == {} and "shares" not in meter.report()
    meter.seconds["update"] = 2.5
    assert meter.shares() == {"generation": 0.25, "scoring": 0.125, "update": 0.625}
    assert meter.report()["shares"] == meter.shares()


def test_flops_of_sampling_that_shares_prompts():
    # One prompt of 6 for two responses of 3 and 1: run once, only its last token read by the last layer.
    model = llama()
    skip_unread(model.model)
    shape, meter = ModelShape.of(model), CostMeter()
    skipped = 2 * 256 + 3 * 512
    meter.generate(shape, sampled((6, 3), (6, 1)), [6])
    prompt = 2 * (MATMUL * 6 - skipped * 5) + 4 * ATTENTION * 21
    responses = 2 * MATMUL * 2 + 4 * ATTENTION * (7 + 8) + 2 * HEAD * (3 + 1)
    assert meter.report()["flops"] == prompt + responses


def test_activations_that_are_computed_again_are_counted_and_nothing_is_skipped():
    model = llama()
    skip_unread(model.model)
    shape, batch = ModelShape.of(model, checkpointed=True), pack([single()])
    # Each of the 2 layers again, but for its last product, 32 x 16, which the backward pass has no use for.
    assert shape.recomputed == MATMUL - 2 * 32 * 16
    context = LENGTH * (LENGTH + 1) // 2
    whole = 2 * MATMUL * LENGTH + 4 * ATTENTION * context + 2 * HEAD * 8
    assert shape.batch_flops(batch) == whole
    meter = CostMeter()
    meter.train(shape, batch)
    assert meter.flops == 3 * whole + 2 * shape.recomputed * LENGTH + 4 * ATTENTION * context
    # Sampling runs in eval mode: the last layer reads the prompt's last token only, with checkpointing or without.
    assert shape.decode_flops([6, 6], [3, 1], [6]) == ModelShape.of(model).decode_flops([6, 6], [3, 1], [6])


def tiny_of(model_type: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50, "hidden_size": 64}
    if model_type == "gpt2":
        sizes = {"n_layer": 2, "n_head": 4, "vocab_size": 50, "n_embd": 64}
    else:
        sizes["intermediate_size"] = 96
    if model_type == "gemma3_text":
        sizes |= {"head_dim": 16, "num_key_value_heads": 4}
    special = {"bos_token_id": 0, "eos_token_id": 0}
    config = without_noise(AutoConfig.for_model(model_type, **sizes, **special))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "gemma3_text"])
def test_recomputed_layers_against_the_counter_of_torch(model_type):
    model, batch = tiny_of(model_type), pack([single()])
    shape, meter = ModelShape.of(model, checkpointed=True), CostMeter()
    meter.train(shape, batch)
    checkpoint_activations(model)
    model.train()
    found = counted(lambda: logprob_sum(model, batch).backward())
    assert found == pytest.approx(meter.flops + 4 * masked_away(shape, LENGTH), rel=0.02)
