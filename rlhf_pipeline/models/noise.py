"""Random noise in a forward pass (dropout, dropped layers, router jitter): switched off, and looked for at load.

Router losses are switched off too: no stage adds them.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.probe import agree, probe_examples

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WORDS = ("drop", "jitter")
PASSES = 8  # of a model that draws random numbers; a layer that is dropped with probability .1 stays in all with .43


def is_noise(key: str, value: object) -> bool:
    """Whether a key of a transformers config is a probability or a scale of noise that is not 0."""
    return any(word in key for word in WORDS) and isinstance(value, float) and value > 0


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in vars(config).values():
        if hasattr(value, "get_text_config"):
            yield from _parts(value)


def without_noise(config: Any) -> Any:
    """Set all noise of a transformers config and of its parts to 0, in place; returns the config."""
    for part in _parts(config):
        for key, value in list(vars(part).items()):
            if is_noise(key, value):
                setattr(part, key, 0.0)
    return config


def without_router_loss(model: PreTrainedModel) -> PreTrainedModel:
    """Set `output_router_logits` of a model's configs off, in place; returns the model.

    transformers else computes the loss that balances experts in each forward pass, and fails at it when a batch with
    padding is decoded with a cache.
    """
    routed = [part for part in _parts(model.config) if getattr(part, "output_router_logits", None)]
    for part in routed:
        part.output_router_logits = False
    model.routed = routed  # type: ignore[assignment]  # an attribute of ours
    return model


@contextmanager
def router_loss_as_loaded(model: PreTrainedModel) -> Iterator[None]:
    """A context in which `output_router_logits` is what it was before `without_router_loss`, to save the configs."""
    routed: list[Any] = getattr(model, "routed", [])
    for part in routed:
        part.output_router_logits = True
    try:
        yield
    finally:
        for part in routed:
            part.output_router_logits = False


def _random_state(device: torch.device) -> tuple[Any, ...]:
    states: list[Any] = [
        torch.get_rng_state().numpy().tobytes(),
        random.getstate(),
        pickle.dumps(np.random.get_state()),
    ]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device).numpy().tobytes())
    return tuple(states)


@torch.no_grad()
def require_no_noise(model: PreTrainedModel) -> None:
    """Check that a model computes in training mode what it computes in evaluation mode.

    Raises:
        BadInput: it does not.
    """
    parameter, was_training = next(model.parameters()), model.training
    example = probe_examples(model)[0]
    ids = torch.tensor([example.prompt_ids + example.completions[1]], device=parameter.device)
    before = _random_state(parameter.device)
    devices = [parameter.device] if parameter.device.type == "cuda" else []
    others = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            expected = model.eval()(input_ids=ids, use_cache=False).logits
            model.train()
            for _ in range(PASSES):
                if not agree(model(input_ids=ids, use_cache=False).logits, expected, parameter.dtype):
                    raise BadInput(
                        f"{type(model).__name__}: found other logits in training mode than in evaluation mode, with "
                        "every dropout of its config at 0; expected a model without noise, so that policy and "
                        "reference agree at the first step"
                    )
                if _random_state(parameter.device) == before:
                    break  # it draws no random numbers, so every further pass is the same
    finally:
        model.train(was_training)
        random.setstate(others[0])
        np.random.set_state(others[1])
