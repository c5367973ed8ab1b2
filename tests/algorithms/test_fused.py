"""Norms and gates with their own backward pass: the values and gradients of autograd on the written formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.algorithms.fused import gated, gated_linear, rms_norm


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = x.float() / torch.sqrt((x.float() ** 2).mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def plain_gated(gate: Tensor, up: Tensor) -> Tensor:
    return gate * torch.sigmoid(gate) * up


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def gradients(output: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output.dtype)
    return list(torch.autograd.grad(output, inputs, slope))


def test_a_norm_by_hand() -> None:
    """x = (3, 4): mean of squares 12.5, so n = x / sqrt(12.5); w = (1, 2)."""
    x, weight = torch.tensor([3.0, 4.0], requires_grad=True), torch.tensor([1.0, 2.0], requires_grad=True)
    out = rms_norm(x, weight, 0.0)
    scale = 12.5**-0.5
    torch.testing.assert_close(out, torch.tensor([3 * scale, 8 * scale]))
    to_x, to_weight = torch.autograd.grad(out, (x, weight), torch.tensor([1.0, 0.0]))
    # d (3 s) = s - 3 x / (2 * 12.5) s: (1 - 9 / 25, -12 / 25) s.
    torch.testing.assert_close(to_x, torch.tensor([16 / 25, -12 / 25]) * scale)
    torch.testing.assert_close(to_weight, torch.tensor([3 * scale, 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_and_its_gradients(dtype: torch.dtype) -> None:
    x, weight = inputs = leaves((2, 5, 8), (8,), dtype=dtype)
    ours, plain = rms_norm(x, weight, 1e-3), plain_norm(x, weight, 1e-3)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(ours, plain, **tolerance)
    for mine, theirs in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_the_gate_and_its_gradients() -> None:
    inputs = leaves((2, 5, 8), (2, 5, 8), dtype=torch.float64)
    assert torch.autograd.gradcheck(gated, inputs)
    torch.testing.assert_close(gated(*inputs), plain_gated(*inputs))


@pytest.mark.parametrize("bias", [False, True])
def test_the_gated_map_and_its_gradients(bias: bool) -> None:
    gate, up, weight, offset = leaves((2, 5, 8), (2, 5, 8), (3, 8), (3,), dtype=torch.float64)
    inputs = [gate, up, weight, *([offset] if bias else [])]
    ours = gated_linear(gate, up, weight, offset if bias else None)
    plain = plain_gated(gate, up) @ weight.t() + (offset if bias else 0.0)
    torch.testing.assert_close(ours, plain)
    assert torch.autograd.gradcheck(lambda *parts: gated_linear(*parts, *([] if bias else [None])), inputs)


def test_autocast_computes_the_map_in_its_precision_and_keeps_the_gradients_type() -> None:
    inputs = leaves((6, 16), (6, 16), (4, 16))
    with torch.autocast("cpu", torch.bfloat16):
        ours = gated_linear(*inputs, None)
        found = gradients(ours, inputs)  # also when backward runs within autocast
    assert ours.dtype == torch.bfloat16
    low = [part.detach().to(torch.bfloat16).requires_grad_() for part in inputs]
    plain = (torch.nn.functional.silu(low[0]) * low[1]) @ low[2].t()
    torch.testing.assert_close(ours, plain)
    for mine, theirs in zip(found, gradients(plain, low), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs.float(), rtol=2e-2, atol=2e-2)


def test_frozen_weights_get_no_gradient_and_their_inputs_do() -> None:
    x, weight = leaves((4, 8), (8,))
    (to_x,) = torch.autograd.grad(rms_norm(x, weight.detach(), 1e-6).sum(), [x])
    (expected,) = torch.autograd.grad(plain_norm(x, weight.detach(), 1e-6).sum(), [x])
    torch.testing.assert_close(to_x, expected)
    (to_weight,) = torch.autograd.grad(rms_norm(x.detach(), weight, 1e-6).sum(), [weight])
    torch.testing.assert_close(to_weight, (x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-6)).sum(0))


def kept_elements(compute) -> int:
    """Elements of all distinct tensors that autograd keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute()
    assert output.requires_grad
    return sum(kept.values())


def test_what_is_kept() -> None:
    rows, width, wide = 50, 8, 24
    x, weight, gate, up, down = leaves((rows, width), (width,), (rows, wide), (rows, wide), (width, wide))
    assert kept_elements(lambda: rms_norm(x, weight, 1e-6)) == rows * width + width + rows
    assert kept_elements(lambda: gated(gate, up)) == 2 * rows * wide
    assert kept_elements(lambda: gated_linear(gate, up, down, None)) == 2 * rows * wide + width * wide
    # Autograd keeps one more matrix for each of the steps.
    assert kept_elements(lambda: plain_norm(x, weight, 1e-6)) > 2 * rows * width
    assert kept_elements(lambda: torch.nn.functional.silu(gate) * up) == 3 * rows * wide
