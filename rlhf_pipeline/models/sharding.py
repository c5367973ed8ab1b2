"""Weights divided between processes: each holds a part of every tensor (PyTorch's FSDP2).

A divided module gathers its weights in its forward pass, one decoder layer at a time, and drops what it has gathered
after each layer (or, if asked to, keeps it until the backward pass). The backward pass gathers what was dropped, adds
up the gradients of all processes, and leaves each process the gradient of its own part. Between two passes every weight
is a part, a `DTensor`.

Embeddings, norms and heads belong to the group of the whole module, whose weights are there from the beginning to the
end of its forward pass: `models/forward.py` reads the output head itself, not by the head's own forward pass.

All processes must make the same passes in the same order, or they wait for each other for ever.
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor, nn

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.adapters import TRAINED, adapters_of
from rlhf_pipeline.models.modules import ActorCritic

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

K = TypeVar("K", bound=Hashable)
WITHOUT = "train without fsdp"
HELD = "_actor_is_whole"
"""The attribute of an actor-critic within `whole_actor`."""


def shard(module: nn.Module, device: torch.device, *, reshard_after_forward: bool = True) -> None:
    """Divide the weights of a module between all processes, in place, and move each part to its device.

    Layers move one at a time, so that a device never holds the whole model.

    Args:
        module: a `Policy`, a `RewardModel` or an `ActorCritic`, whole, on the CPU.
        reshard_after_forward: drop gathered weights after a forward pass that a backward pass follows, and gather them
            again. All other passes drop them.

    Raises:
        BadInput: its weights cannot be divided.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = _layers(module)
    if isinstance(module, ActorCritic) and module.critic is not None:
        _own_parameters(module.critic)  # with adapters, actor and critic may be on the same weights
    _require_groups(module, layers)
    _own_parameters(module)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in (*layers, module):
        group = fully_shard(part, mesh=mesh, reshard_after_forward=True)
        # A sum of gradients, as `Ranks.add_gradients` forms it; gloo has no mean.
        group.set_gradient_divide_factor(1.0)
        group.set_force_sum_reduction_for_comms(True)
        # A weight that the examples of one process alone have used (an expert) must not stop the others.
        group.set_reduce_scatter_unused_params(True, recurse=False)
    if not reshard_after_forward:
        module.register_forward_pre_hook(_keep_for_backward)


def _keep_for_backward(module: nn.Module, _given: object) -> None:
    """Before a forward pass: keep the weights that it gathers if a backward pass follows, which drops them."""
    if not getattr(module, HELD, False):
        cast("FSDPModule", module).set_reshard_after_forward(not torch.is_grad_enabled())


def _layers(module: nn.Module) -> list[nn.Module]:
    """The decoder layers in a module.

    Raises:
        BadInput: it has none.
    """
    names = {name for part in module.modules() for name in getattr(part, "_no_split_modules", None) or ()}
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    found = [layer for part in lists for layer in part if type(layer).__name__ in names]
    if not found:
        raise BadInput(
            f"fsdp: found no list of decoder layers in {_named(module)}, expected one, whose layers are gathered one "
            f"at a time; {WITHOUT}"
        )
    return found


def _named(module: nn.Module) -> str:
    return type(getattr(module, "model", module)).__name__


def _require_groups(module: nn.Module, layers: list[nn.Module]) -> None:
    """Check that each weight belongs to one layer or to none, and that the trained weights of a group have one dtype.

    Raises:
        BadInput: they do not; or a weight is a single number without a dimension.
    """
    inside = {id(part) for layer in layers for part in layer.modules()}
    outside = [part for part in module.modules() if id(part) not in inside]
    groups = [list(layer.parameters()) for layer in layers]
    groups.append([parameter for part in outside for parameter in part.parameters(recurse=False)])
    held = [{id(parameter) for parameter in group} for group in groups]
    if sum(map(len, held)) != len(set().union(*held)):
        raise BadInput(
            f"fsdp: found weights that several layers of {_named(module)} share, expected layers with weights of their "
            f"own; {WITHOUT}"
        )
    for group in groups:
        if any(parameter.ndim == 0 for parameter in group):
            raise BadInput(f"fsdp: found a weight without a dimension in {_named(module)}; {WITHOUT}")
        kinds = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in group if parameter.requires_grad})
        if len(kinds) > 1:
            raise BadInput(
                f"fsdp: found trained weights in {' and '.join(kinds)} in one layer of {_named(module)}, expected one "
                "type; set dtype: float32 (with bf16: true for speed)"
            )


def _own_parameters(module: nn.Module) -> None:
    """Give a module parameters of its own over the same memory: another model may share those that it has.

    `fully_shard` moves a parameter to its device in place, for all modules that have it.
    """
    known: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) not in known:
                own = nn.Parameter(parameter.detach().contiguous(), parameter.requires_grad)
                known[id(parameter)] = parameter, own
            setattr(part, name, known[id(parameter)][1])


def _actor_groups(actor_critic: nn.Module) -> list[FSDPModule]:
    """The groups of a divided actor-critic that its actor needs, its own first; none if the weights are whole."""
    if not hasattr(actor_critic, "unshard"):  # torch.distributed.fsdp takes long to import
        return []
    from torch.distributed.fsdp import FSDPModule

    assert isinstance(actor_critic, ActorCritic) and isinstance(actor_critic, FSDPModule)
    return [actor_critic, *(one for one in actor_critic.actor.modules() if isinstance(one, FSDPModule))]


@contextlib.contextmanager
def whole_actor(actor_critic: nn.Module) -> Iterator[None]:
    """A context in which every process has all weights of a divided actor.

    Passes without gradient through the actor then need no other process. Every process must enter the context.
    """
    groups = _actor_groups(actor_critic)
    if groups:
        groups[0]._get_fsdp_state()._lazy_init()  # a forward pass would do it
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    setattr(actor_critic, HELD, True)
    try:
        yield
    finally:
        setattr(actor_critic, HELD, False)
        for group in groups:
            group.set_reshard_after_forward(True, recurse=False)
            group.reshard()


def leave_out_actor(actor_critic: nn.Module, out: bool) -> None:
    """Whether a divided actor is out of the training passes: its weights then get no gradient, in place of 0."""
    for group in _actor_groups(actor_critic):
        group.set_reduce_scatter_unused_params(not out, recurse=False)


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is the part of a divided one."""
    return hasattr(tensor, "full_tensor")  # torch.distributed.tensor takes long to import


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights of a module are divided."""
    return any(map(is_part, module.parameters()))


def local(tensor: Tensor) -> Tensor:
    """The numbers of a tensor that this process holds, without gradient."""
    held: Any = tensor.detach()
    return held.to_local() if is_part(held) else held


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor, without gradient; every process must ask for it if it is a part."""
    held: Any = tensor.detach()
    return held.full_tensor() if is_part(held) else held


def whole(tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
    """Tensors with parts replaced by whole tensors on the CPU of the first process; others get empty tensors.

    Every process must call it with the same names in the same order. Tied weights are gathered once and stay tied.
    """
    known: dict[int, Tensor] = {}
    found: dict[K, Tensor] = {}
    for name, tensor in tensors.items():
        if is_part(tensor) and id(tensor) not in known:
            full = gathered(tensor)
            known[id(tensor)] = full.cpu() if torch.distributed.get_rank() == 0 else full.new_empty(0)
        found[name] = known.get(id(tensor), tensor)
    return found


def whole_state(model: PreTrainedModel) -> dict[str, Tensor] | None:
    """What `save_model` writes of a model whose weights are divided (see `whole`): of an adapter its own weights.

    None: the weights are not divided.
    """
    if not is_sharded(model):
        return None
    every, adapted = model.state_dict(keep_vars=True), TRAINED in adapters_of(model)
    return whole({name: tensor for name, tensor in every.items() if tensor.requires_grad or not adapted})


def as_held(tensor: Tensor, held: Tensor | None) -> Tensor:
    """A whole tensor, or this process's part of it if `held`, whose place it takes, is a part."""
    if held is None or not is_part(held):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    there: Any = held
    return distribute_tensor(tensor.to(held.device), there.device_mesh, there.placements, src_data_rank=None)


def load_state(model: nn.Module, weights: Mapping[str, Tensor]) -> list[str]:
    """Load whole tensors into a model, whose weights may be divided; returns the names that it does not have.

    Raises:
        RuntimeError: a tensor has another shape.
    """
    held = model.state_dict(keep_vars=True)
    found = {name: as_held(tensor, held.get(name)) for name, tensor in weights.items()}
    return model.load_state_dict(found, strict=False).unexpected_keys
