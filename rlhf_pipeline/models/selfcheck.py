"""Choose the reader of an architecture at load time, by comparing packed log-probabilities with plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from rlhf_pipeline.data.batch import LAYOUTS, PackedBatch, pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.adapters import stirred
from rlhf_pipeline.models.forward import Reader, completion_logprobs, hidden_states, trunk_of
from rlhf_pipeline.models.last_layer import compute_all, skip_unread
from rlhf_pipeline.models.lean_layers import use_lean_layers
from rlhf_pipeline.models.modules import RewardModel, sequence_head
from rlhf_pipeline.models.noise import require_no_noise
from rlhf_pipeline.models.probe import agree, has_other_windows, probe_examples, short_windows
from rlhf_pipeline.models.tree_attention import use_sdpa, use_tree_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _ways(model: PreTrainedModel, examples: list[Example]) -> Iterator[tuple[list[PackedBatch], bool]]:
    """The ways of reading a model, the fastest first.

    Sets the model up for each way, with lean layers in all of them; yields two batches, of all examples and of the last
    one alone, and whether the last layer skips unread positions.
    """
    device = next(model.parameters()).device
    # Our masks know only the windows of `sliding_window`; in "rows" the model makes its masks itself.
    use_lean_layers(model)
    layouts = LAYOUTS[:1] if has_other_windows(model) else LAYOUTS
    for layout in reversed(layouts):
        if layout == "flat":
            if not use_tree_attention(model):
                continue
        else:
            use_sdpa(model)
        batches = [
            pack(some, layout=layout, row_length=24, flat_from=0).to(device) for some in (examples, examples[-1:])
        ]
        if skip_unread(trunk_of(model)):
            yield batches, True
        compute_all(trunk_of(model))
        yield batches, False


def _logprobs(model: PreTrainedModel, reader: Reader) -> Callable[[PackedBatch], torch.Tensor]:
    return lambda batch: completion_logprobs(model, reader, batch)[0]


def _all_agree(
    read: Callable[[PackedBatch], torch.Tensor], batches: list[PackedBatch], expected: torch.Tensor, dtype: torch.dtype
) -> bool:
    """Whether what is read from each batch of `_ways` agrees; `expected` belongs to all examples.

    Another batch must not change a sequence's figures.
    """
    try:
        found = [read(batch) for batch in batches]
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False  # the architecture rejects this form of input
    return all(agree(values, expected[-len(values) :], dtype) for values in found)


@torch.no_grad()
def _plain_logprobs(model: PreTrainedModel, examples: list[Example]) -> torch.Tensor:
    """Token log-probabilities by the model's own forward, one unpadded sequence at a time."""
    device = next(model.parameters()).device
    pieces = []
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([example.prompt_ids + completion], device=device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            start = len(example.prompt_ids) - 1
            chosen = torch.log_softmax(logits[start:-1], -1)
            pieces.append(chosen.gather(-1, ids[0, start + 1 :, None]).squeeze(-1))
    return torch.cat(pieces)


@torch.no_grad()
def _sees_the_future(model: PreTrainedModel, ids: list[int]) -> bool:
    """Whether the last token of a sequence changes the model's predictions before it."""
    sequence = torch.tensor([ids], device=next(model.parameters()).device)
    whole = model(input_ids=sequence, use_cache=False).logits[0, :-1]
    cut = model(input_ids=sequence[:, :-1], use_cache=False).logits[0]
    return not agree(whole, cut, whole.dtype)


@torch.no_grad()
def _decodes_with_a_cache(model: PreTrainedModel, examples: list[Example]) -> bool:
    """Whether left-padded, cached decoding gives the logits of the plain forward pass, which sampling needs."""
    from transformers import DynamicCache

    device = next(model.parameters()).device
    rows = [example.prompt_ids + example.completions[0] for example in examples]
    width = max(len(ids) for ids in rows)
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = torch.stack([model(input_ids=torch.tensor([row], device=device)).logits[0, -1] for row in rows])
    try:
        cache = DynamicCache(config=model.config)
        parts = (slice(None, -1), slice(-1, None))
        for part, seen in zip(parts, (width - 1, width), strict=True):
            logits = model(
                input_ids=ids[:, part],
                attention_mask=mask[:, :seen],
                position_ids=positions[:, part],
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return False
    return agree(logits.float(), expected.float(), next(model.parameters()).dtype)


@torch.no_grad()
def inspect_model(model: PreTrainedModel) -> Reader:
    """Return the fastest way of reading a causal language model that agrees with its own forward pass.

    Raises:
        BadInput: no way agrees, or the model is not causal.
    """
    was_training = model.training
    model.eval()
    with ExitStack() as after:
        after.enter_context(stirred(model))
        after.callback(model.train, was_training)
        after.enter_context(short_windows(model))
        dtype = next(model.parameters()).dtype
        examples = probe_examples(model)
        plain = _plain_logprobs(model, examples)
        if _sees_the_future(model, examples[0].prompt_ids):
            raise BadInput(
                f"{type(model).__name__}: found a model in which a later token changes earlier predictions; "
                "expected a decoder-only causal language model"
            )
        # The small logits of an untrained model do not show a soft cap, so the config is read instead.
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
        for batches, skipping in _ways(model, examples):
            for head in (*(() if capped else ("linear",)), *(() if skipping else ("own",))):
                reader = Reader(batches[0].layout, head)
                if _all_agree(_logprobs(model, reader), batches, plain, dtype):
                    return replace(reader, decodes=_decodes_with_a_cache(model, examples))
    raise BadInput(
        f"{type(model).__name__}: found packed log-probabilities that differ from the model's own in every layout; "
        "expected a decoder-only causal language model"
    )


@torch.no_grad()
def inspect_reward_model(model: PreTrainedModel) -> Reader:
    """Return the fastest way of reading a sequence classifier with one label that agrees with its own logits.

    Raises:
        BadInput: no layout agrees.
    """
    model.eval()
    dtype, examples = next(model.parameters()).dtype, probe_examples(model)
    device = next(model.parameters()).device
    with stirred(model), short_windows(model):
        sequences = [example.prompt_ids + completion for example in examples for completion in example.completions]
        plain = [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, 0] for ids in sequences]
        expected = torch.stack(plain).float()

        def scores(batch: PackedBatch) -> torch.Tensor:
            return sequence_head(model)(hidden_states(trunk_of(model), batch, batch.last_index)).squeeze(-1).float()

        for batches, _ in _ways(model, examples):
            if _all_agree(scores, batches, expected, dtype):
                return Reader(batches[0].layout)
    raise BadInput(
        f"{type(model).__name__}: found packed scores that differ from the model's own; "
        "expected a decoder-only sequence classifier with num_labels=1 and a linear head on its last hidden states"
    )


def read_reward_model(model: PreTrainedModel) -> RewardModel:
    """Wrap a sequence classifier as a reward model; its trunk may become a critic, which is trained."""
    require_no_noise(model)
    return RewardModel(model, inspect_reward_model(model))
