"""Rows that are computed only so that their number is a frequent one change nothing."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.algorithms import logprobs
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.models import forward, last_layer
from rlhf_pipeline.models.forward import Reader, completion_logprobs, hidden_states, trunk_of
from rlhf_pipeline.models.selfcheck import inspect_model


@pytest.fixture
def rounding(monkeypatch):
    """Rounds every number of rows up to a multiple of 64, in every type."""

    def use() -> None:
        for module in (forward, last_layer, logprobs):
            monkeypatch.setattr(module, "rows_computed", lambda rows, *_: -(-rows // 64) * 64)

    return use


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2-sliding"])
def test_logprobs_entropies_and_gradients_stay_the_same(make_model, examples, rounding, name):
    model = make_model(name, dtype=torch.float64).train()
    inspect_model(model)
    batch, found = pack(examples, layout="flat", flat_from=0), []
    for round_up in (False, True):
        if round_up:
            rounding()
        model.zero_grad()
        options = {"train_entropy": True}
        scored, entropies, hidden = completion_logprobs(model, Reader("flat"), batch, 0.7, **options)
        (scored * torch.linspace(-1, 2, len(scored), dtype=scored.dtype) + entropies**2).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        with torch.no_grad():
            plain, _, _ = completion_logprobs(model, Reader("flat"), batch, 0.7, entropy=False)
            whole = hidden_states(trunk_of(model), batch)
        found.append((scored.detach(), entropies.detach(), hidden.detach(), gradients, plain, whole))
    for one, other in zip(*found, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 if name != "gpt2" else 1e-10)  # norms are in fp32
    assert found[0][3].abs().max() > 1e-2


def test_products_in_bfloat16_have_few_numbers_of_rows(make_model, examples):
    model = make_model("llama").train()
    inspect_model(model)
    trunk, seen = trunk_of(model), []
    for layer in trunk.layers:
        layer.mlp.gate_proj.register_forward_hook(lambda module, args, out: seen.append(out.shape[-2]))
    batch = pack(examples, layout="flat", flat_from=0)
    assert batch.active_tokens % 16 and batch.num_predicting % 16
    with torch.autocast("cpu", torch.bfloat16):
        logits = completion_logprobs(model, Reader("flat"), batch)[0]
    assert len(logits) == batch.num_tokens
    assert seen == [-(-batch.active_tokens // 16) * 16, -(-batch.num_predicting // 16) * 16]
    seen.clear()
    completion_logprobs(model, Reader("flat"), batch)
    assert seen == [batch.active_tokens, batch.num_predicting]


def test_where_all_positions_are_read_there_are_no_others():
    rows = torch.tensor([0, 2, 3])
    assert last_layer._filled(rows, 5, 16).tolist() == [0, 2, 3, 1, 4]
    assert last_layer._filled(rows, 5, 4).tolist() == [0, 2, 3, 1]
