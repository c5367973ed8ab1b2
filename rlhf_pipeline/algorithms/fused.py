"""Parts of a transformer layer with a backward pass of their own, which keeps less memory than that of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear, silu


class _RmsNorm(torch.autograd.Function):
    """Keeps x and one number per row; autograd also keeps the normalised rows.

    With n = s x and s = (mean x^2 + eps)^(-1/2): dx = s (g w - n mean(g w n)), dw = sum g n.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.float32)
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        normed, slope = x.to(torch.float32) * scale, slope.to(torch.float32)
        product = (slope * normed).reshape(-1, x.shape[-1])
        along = torch.mv(product, weight.to(torch.float32)).div_(-x.shape[-1]).view(scale.shape)
        to_weight = product.sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None
        return torch.addcmul(slope * weight, normed, along).mul_(scale).to(x.dtype), to_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return w x / sqrt(mean(x^2) + eps); the quotient is computed in fp32 and rounded to the type of x.

    Source: Zhang and Sennrich 2019, equation 4.

    Args:
        x: (..., D). weight: (D,).
    """
    return _RmsNorm.apply(x, weight, eps)


def _gate_gradients(gate: Tensor, up: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of silu(gate) * up by gate and up."""
    to_up = silu(gate).mul_(slope)
    return torch.ops.aten.silu_backward(slope * up, gate), to_up


class _Gated(torch.autograd.Function):
    """Keeps gate and up; autograd also keeps silu(gate)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return _gate_gradients(gate, up, slope)


class _GatedLinear(torch.autograd.Function):
    """Keeps gate and up; autograd also keeps silu(gate) and the input of the linear map."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate, up, weight)
        return linear(silu(gate).mul_(up), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, weight = ctx.saved_tensors
        with torch.autocast(slope.device.type, enabled=False):  # the caller of backward() may be within autocast
            rows = slope.reshape(-1, slope.shape[-1])
            to_weight = to_bias = None
            if ctx.needs_input_grad[2]:
                to_weight = rows.t() @ silu(gate).mul_(up).reshape(-1, gate.shape[-1])
            if ctx.needs_input_grad[3]:
                to_bias = rows.sum(0)
            return *_gate_gradients(gate, up, slope @ weight), to_weight, to_bias


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up, with silu(z) = z / (1 + exp(-z)); both (..., D).

    Source: Shazeer 2020, equation 6 (SwiGLU).
    """
    return _Gated.apply(gate, up)


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return (silu(gate) * up) W^T + b, under autocast in its precision.

    Source: Shazeer 2020, equation 6 (SwiGLU).

    Args:
        gate, up: (..., F). weight: (D, F). bias: (D,) or None.
    """
    if torch.is_autocast_enabled(gate.device.type) and gate.dtype != torch.float64:
        low = torch.get_autocast_dtype(gate.device.type)
        gate, up, weight, bias = gate.to(low), up.to(low), weight.to(low), None if bias is None else bias.to(low)
    return _GatedLinear.apply(gate, up, weight, bias)
