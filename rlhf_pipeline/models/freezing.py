"""Freeze the first layers of a language model that is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.models.forward import trunk_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def freeze_layers(model: PreTrainedModel, count: int) -> None:
    """Freeze the embeddings of a language model and its first `count` layers; an embedding that is the head is trained.

    Raises:
        ConfigError: the model has fewer layers, or they are not in one list.
    """
    trunk = trunk_of(model)
    config: Any = trunk.config.get_text_config()
    total = config.num_hidden_layers
    lists = [module for module in trunk.modules() if isinstance(module, nn.ModuleList) and len(module) == total]
    if count > total or not lists:
        found = f"found {count}, but {type(model).__name__} has {total} layers" if lists else f"found {count}"
        expected = f"at most {total}" if lists else f"0: the layers of {type(model).__name__} are not in one list"
        raise ConfigError(Fault("freeze_layers", found, expected))
    head = model.get_output_embeddings()
    kept = () if head is None else tuple(map(id, head.parameters()))
    embeddings = [module for module in trunk.modules() if isinstance(module, nn.Embedding)]
    for module in (*embeddings, *lists[0][:count]):
        for parameter in module.parameters():
            parameter.requires_grad_(id(parameter) in kept)
