"""Short probes of a model: what the checks at load (selfcheck.py, noise.py) compare."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rlhf_pipeline.data.tokenize import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW = 4  # positions; less than the longest sequence of a probe


def probe_examples(model: PreTrainedModel) -> list[Example]:
    """Two trees of different lengths, two completions each, of arbitrary tokens; some are the model's PAD.

    No completion ends in PAD: the pooling of transformers would skip it.
    """
    draw = torch.Generator().manual_seed(0)
    # The first ids are valid in every vocabulary, even if the embedding has rows that no token uses.
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    most, pad = min(rows, 512), getattr(model.config.get_text_config(), "pad_token_id", None)

    def tokens(count: int, padded: int | None = None) -> list[int]:
        ids = torch.randint(0, most, (count,), generator=draw).tolist()
        if pad is not None and 0 <= pad < rows:
            ids = [(token + 1) % most if token == pad else token for token in ids]
            if padded is not None:
                ids[padded] = pad
        return ids

    return [
        Example(tokens(5, 2), [tokens(3, 0), tokens(6, 3)], [True, True], prompt_key="a", where="self-check"),
        Example(tokens(2), [tokens(4), tokens(1)], [True, True], prompt_key="b", where="self-check"),
    ]


def agree(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two results of a model of this dtype differ by rounding at most."""
    relative = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
    limit = relative * expected.abs().max().clamp_min(1.0)
    return bool((found - expected).abs().max() <= limit)


def _configs(model: nn.Module) -> list[Any]:
    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    configs += [config.get_text_config() for config in configs if hasattr(config, "get_text_config")]
    return list({id(config): config for config in configs}.values())


@contextmanager
def short_windows(model: PreTrainedModel) -> Iterator[None]:
    """A context in which sliding windows have at most WINDOW positions, so that a short probe is longer than they."""
    windows = [(config, getattr(config, "sliding_window", None)) for config in _configs(model)]
    wide = [(config, width) for config, width in windows if isinstance(width, int) and width > WINDOW]
    for config, _ in wide:
        config.sliding_window = WINDOW
    try:
        yield
    finally:
        for config, width in wide:
            config.sliding_window = width


def has_other_windows(model: PreTrainedModel) -> bool:
    """Whether the attention is limited to near tokens by another key than `sliding_window`, such as `window_size`."""
    known = ("sliding_window", "max_window_layers", "sliding_window_pattern")
    return any(
        "window" in key
        and key.lstrip("_") not in known
        and isinstance(value, int)
        and value > 0
        and not isinstance(value, bool)
        for key, value in vars(model.config.get_text_config()).items()
    )
