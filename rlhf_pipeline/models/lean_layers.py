"""Let the norms and gated MLPs of a model keep less memory for the backward pass.

A module changes its class to a subclass with another `forward`; its weights, hooks and copies stay as they are. It does
so only if its own `forward` is, instruction by instruction, that of Llama's module, whose result is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.algorithms.fused import gated, gated_linear, rms_norm

if TYPE_CHECKING:
    from collections.abc import Callable


def _norm(module: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _mlp(module: Any, x: Tensor) -> Tensor:
    gate, up, down = module.gate_proj(x), module.up_proj(x), module.down_proj
    # A wrapped, quantised or watched map is called as a module; a frozen one does not keep its input anyway.
    plain = type(down) is nn.Linear and not (down._forward_pre_hooks or down._forward_hooks)
    if plain and down.weight.requires_grad and torch.is_grad_enabled():
        return gated_linear(gate, up, down.weight, down.bias)
    return down(gated(gate, up))


_made: dict[type[nn.Module], type[nn.Module]] = {}


def _lean(plain: type[nn.Module], forward: Callable[..., Tensor]) -> type[nn.Module]:
    """The subclass of a class that computes by `forward`, made once."""
    if plain not in _made:
        names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "forward": forward}
        _made[plain] = type(plain.__name__, (plain,), names)
    return _made[plain]


def _instructions(kind: type[nn.Module]) -> tuple[object, ...]:
    """What the `forward` of a class does: instructions, constants, names; the function itself if it is not Python's."""
    code = getattr(kind.forward, "__code__", None)
    return (kind.forward,) if code is None else (code.co_code, code.co_consts, code.co_names)


def _same_code(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether the `forward` of a module and of a known class are the same instructions on the same names."""
    if "forward" in vars(module):
        return False  # a library has patched this one
    return _instructions(type(module)) == _instructions(known)


def use_lean_layers(model: nn.Module) -> None:
    """Let every RMS norm and SwiGLU of a model that is computed as Llama's keep less memory; no result changes."""
    from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

    for module in model.modules():
        if _same_code(module, LlamaRMSNorm):
            module.__class__ = _lean(type(module), _norm)
        elif _same_code(module, LlamaMLP) and type(module.act_fn).__name__ in ("SiLU", "SiLUActivation"):
            module.__class__ = _lean(type(module), _mlp)
