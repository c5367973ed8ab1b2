"""Packed, plain and padded log-probabilities agree, whatever the architecture."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from rlhf_pipeline.data.batch import LAYOUTS, pack
from rlhf_pipeline.models.forward import Reader, attention_mask, completion_logprobs
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.models.tree_attention import use_tree_attention

READERS = {
    "llama": Reader("flat", "linear"),
    "llama-tied": Reader("flat", "linear"),
    "qwen2": Reader("flat", "linear"),
    "qwen2-sliding": Reader("flat", "linear"),
    "qwen3": Reader("flat", "linear"),
    "mistral": Reader("flat", "linear"),
    "gemma2": Reader("trees", "own"),
    "gemma3_text": Reader("flat", "linear"),
    "gpt2": Reader("flat", "linear"),
    "gpt_neox": Reader("flat", "linear"),
    "bloom": Reader("rows", "linear"),
}
CLOSE = {"rtol": 0, "atol": 1e-5}


@torch.no_grad()
def plain(model, examples) -> torch.Tensor:
    """(N,) log-probabilities by the model's own forward pass, one sequence at a time, no padding, no mask."""
    pieces = []
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([example.prompt_ids + completion])
            table = torch.log_softmax(model(input_ids=ids).logits[0].double(), -1)
            first = len(example.prompt_ids)
            pieces += [table[t - 1, ids[0, t]] for t in range(first, ids.shape[1])]
    return torch.stack(pieces).float()


@torch.no_grad()
def padded(model, examples, side: str, positions: bool) -> torch.Tensor:
    """The same in one batch, padded on one side."""
    sequences = [(len(e.prompt_ids), e.prompt_ids + c) for e in examples for c in e.completions]
    width = max(len(ids) for _, ids in sequences) + 2
    input_ids, mask = torch.zeros(len(sequences), width, dtype=torch.long), torch.zeros(len(sequences), width).long()
    starts = [width - len(ids) if side == "left" else 0 for _, ids in sequences]
    for row, (start, (_, ids)) in enumerate(zip(starts, sequences)):
        input_ids[row, start : start + len(ids)] = torch.tensor(ids)
        mask[row, start : start + len(ids)] = 1
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)} if positions else {}
    table = torch.log_softmax(model(input_ids=input_ids, attention_mask=mask, **extra).logits.double(), -1)
    found = []
    for row, (start, (prompt, ids)) in enumerate(zip(starts, sequences)):
        found += [table[row, start + t - 1, ids[t]] for t in range(prompt, len(ids))]
    return torch.stack(found).float()


@torch.no_grad()
def packed(model, examples, layout: str, head: str = "linear", **options) -> torch.Tensor:
    batch = pack(examples, layout=layout, flat_from=0, **options)
    assert batch.layout == layout
    return completion_logprobs(model, Reader(layout, head), batch)[0]


@pytest.mark.parametrize("name", READERS)
def test_packed_plain_left_and_right_padded_logprobs_agree(make_model, examples, name):
    model, reader = make_model(name), READERS[name]
    before = model.config._attn_implementation
    expected = plain(model, examples)
    assert expected.std() > 0.3  # the weights make a difference
    assert inspect_model(model) == reader
    assert model.config._attn_implementation == ("rlhf_trees" if reader.layout == "flat" else before)
    torch.testing.assert_close(plain(model, examples), expected, **CLOSE)
    for layout in LAYOUTS[: LAYOUTS.index(reader.layout) + 1]:
        torch.testing.assert_close(packed(model, examples, layout, reader.head), expected, **CLOSE)
        torch.testing.assert_close(packed(model, examples, layout, "own"), expected, **CLOSE)
    for row_length in () if reader.layout == "rows" else (30, 100):
        found = packed(model, examples, "trees", reader.head, row_length=row_length)
        torch.testing.assert_close(found, expected, **CLOSE)
    for side in ("left", "right"):
        torch.testing.assert_close(padded(model, examples, side, positions=name != "bloom"), expected, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gemma2", "gpt2"])
def test_eager_attention_takes_the_same_mask(make_model, examples, name):
    model = make_model(name, attn_implementation="eager")
    reader = inspect_model(model)
    assert reader == replace(READERS[name], layout="trees")
    assert model.config._attn_implementation == "eager"
    found = packed(model, examples, "trees", reader.head, row_length=64)
    torch.testing.assert_close(found, plain(model, examples), **CLOSE)


@pytest.mark.parametrize("layout", ["flat", "trees"])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2"])
def test_the_order_of_examples_changes_no_logprob(make_model, examples, name, layout):
    model = make_model(name)
    assert use_tree_attention(model)
    order = list(range(len(examples)))
    random.Random(3).shuffle(order)
    found = packed(model, [examples[i] for i in order], layout, row_length=64)
    torch.testing.assert_close(found, plain(model, [examples[i] for i in order]), **CLOSE)


def test_in_float64_agreement_is_exact(make_model, examples):
    model = make_model("llama", dtype=torch.float64)
    assert use_tree_attention(model)
    found = {layout: packed(model, examples, layout, row_length=64) for layout in LAYOUTS}
    assert found["flat"].dtype == torch.float64
    for layout in ("flat", "trees"):
        torch.testing.assert_close(found[layout], found["rows"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("pad", [1, 5, 17])
def test_the_id_that_fills_padding_is_read_by_nothing(make_model, examples, pad):
    model, batch = make_model("llama"), pack(examples, row_length=40)
    assert (batch.tree < 0).any()
    filled = replace(batch, input_ids=batch.input_ids.masked_fill(batch.tree < 0, pad))
    with torch.no_grad():
        found, entropy, _ = completion_logprobs(model, Reader(), batch)
        other, other_entropy, _ = completion_logprobs(model, Reader(), filled)
    assert torch.equal(found, other) and torch.equal(entropy, other_entropy)


def test_gradients_in_every_layout_agree(make_model, examples):
    gradients = []
    for layout in LAYOUTS:
        model = make_model("gpt2", dtype=torch.float64)  # Llama's norms are computed in fp32 in any case
        assert layout != "flat" or use_tree_attention(model)
        batch = pack(examples, layout=layout, flat_from=0)
        completion_logprobs(model, Reader(layout), batch)[0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert gradients[0].abs().max() > 1
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("temperature", [0.7, 2.0])
@pytest.mark.parametrize("head", ["linear", "own"])
def test_temperature_divides_the_logits(make_model, examples, temperature, head):
    model, example = make_model("llama"), examples[1]
    ids = torch.tensor([example.prompt_ids + example.completions[0]])
    with torch.no_grad():
        found, entropy, _ = completion_logprobs(model, Reader(head=head), pack([example]), temperature)
        table = torch.log_softmax(model(input_ids=ids).logits[0] / temperature, -1)
    expected = [table[t - 1, ids[0, t]].item() for t in range(len(example.prompt_ids), ids.shape[1])]
    assert found.tolist() == pytest.approx(expected, abs=1e-5)
    rows = table[len(example.prompt_ids) - 1 : -1]
    assert entropy.tolist() == pytest.approx((-(rows.exp() * rows).sum(-1)).tolist(), abs=1e-5)


@pytest.mark.parametrize("window", [None, 1, 3, 8])
@pytest.mark.parametrize("row_length", [None, 64])
def test_the_mask_shows_each_token_its_own_past_and_no_sibling(make_model, examples, window, row_length):
    config = make_model("mistral", sliding_window=window).config if window else make_model("llama").config
    config._attn_implementation = "sdpa"
    batch = pack(examples, row_length=row_length)
    mask = attention_mask(batch, config, torch.float32)
    assert mask.dtype == torch.bool and mask.shape == (batch.input_ids.shape[0], 1, *[batch.input_ids.shape[1]] * 2)
    tree, branch, position = (x.tolist() for x in (batch.tree, batch.branch, batch.position_ids))
    width = batch.input_ids.shape[1]
    for b in range(batch.input_ids.shape[0]):
        for q in range(width):
            if tree[b][q] < 0:
                assert mask[b, 0, q].any()  # padding sees something, or softmax would be NaN
                continue
            family = {0, branch[b][q]}
            near = [
                k
                for k in range(width)
                if tree[b][k] == tree[b][q] and branch[b][k] in family and position[b][k] <= position[b][q]
            ]
            if window:
                near = [k for k in near if position[b][k] > position[b][q] - window]
            assert mask[b, 0, q].nonzero().squeeze(-1).tolist() == near


def test_alternating_layers_get_a_mask_each(make_model, examples):
    config = make_model("gemma3_text").config
    batch = pack(examples)
    masks = attention_mask(batch, config, torch.float32)
    assert set(masks) == {"full_attention", "sliding_attention"}
    counts = {kind: mask[:, 0].sum(-1)[batch.tree >= 0] for kind, mask in masks.items()}
    assert counts["full_attention"].max() == 9 + 8
    assert counts["sliding_attention"].max() == 3
    assert counts["full_attention"].sum() == batch.context_tokens


def test_a_model_that_sees_the_future_is_refused():
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_pipeline.errors import BadInput

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "bert", vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=64, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(BadInput, match="decoder-only"):  # each token would be predicted from itself
        inspect_model(AutoModelForCausalLM.from_config(config))


def test_the_self_check_leaves_the_mode_alone(make_model):
    model = make_model("llama")
    assert inspect_model(model.train()).layout == "flat" and model.training
    assert inspect_model(model.eval()).layout == "flat" and not model.training


def test_the_log_says_how_a_model_is_read():
    assert str(Reader("flat")) == "batches packed without padding"
    assert str(Reader("rows", "own", decodes=False, tokens=50257)) == (
        "batches padded, a row for each completion, logits by the model's own forward, "
        "it cannot sample (cached decoding gives other logits), its first 50,257 outputs are tokens"
    )
