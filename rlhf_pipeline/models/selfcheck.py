"""Choose the reader of an architecture at load time, by comparing packed log-probabilities with plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from rlhf_pipeline.data.batch import LAYOUTS, PackedBatch, pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.forward import Reader, completion_logprobs, hidden_states, trunk_of
from rlhf_pipeline.models.last_layer import compute_all, skip_unread
from rlhf_pipeline.models.modules import RewardModel, sequence_head
from rlhf_pipeline.models.tree_attention import use_sdpa, use_tree_attention

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def _probe_examples(vocab_size: int) -> list[Example]:
    """Two trees of different lengths, two completions each, of arbitrary tokens."""
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, vocab_size, (count,), generator=draw).tolist()

    return [
        Example(tokens(5), [tokens(3), tokens(6)], [True, True], prompt_key="a", where="self-check"),
        Example(tokens(2), [tokens(4), tokens(1)], [True, True], prompt_key="b", where="self-check"),
    ]


def _ways(model: PreTrainedModel, examples: list[Example]) -> Iterator[tuple[PackedBatch, bool]]:
    """The ways of reading a model, the fastest first.

    Sets the model up for each way; yields the packed examples, and whether the last layer skips unread positions.
    """
    device = next(model.parameters()).device
    for layout in reversed(LAYOUTS):
        if layout == "flat":
            if not use_tree_attention(model):
                continue
        else:
            use_sdpa(model)
        batch = pack(examples, pad_id=0, layout=layout, row_length=24, flat_from=0).to(device)
        if skip_unread(trunk_of(model)):
            yield batch, True
        compute_all(trunk_of(model))
        yield batch, False


def _agree(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    relative = {torch.float64: 1e-10, torch.float32: 1e-5}.get(dtype, 2e-2)
    return bool((found - expected).abs().max() <= relative * expected.abs().max().clamp_min(1.0))


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
    return not _agree(whole, cut, whole.dtype)


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
    return _agree(logits.float(), expected.float(), next(model.parameters()).dtype)


@torch.no_grad()
def inspect_model(model: PreTrainedModel) -> Reader:
    """Return the fastest way of reading a causal language model that agrees with its own forward pass.

    Raises:
        BadInput: no way agrees, or the model is not causal.
    """
    was_training = model.training
    model.eval()
    try:
        parameter = next(model.parameters())
        # The first ids are valid in every vocabulary, even if the embedding has rows that no token uses.
        examples = _probe_examples(min(model.get_output_embeddings().weight.shape[0], 512))
        plain = _plain_logprobs(model, examples)
        if _sees_the_future(model, examples[0].prompt_ids):
            raise BadInput(
                f"{type(model).__name__}: found a model in which a later token changes earlier predictions; "
                "expected a decoder-only causal language model"
            )
        # The small logits of an untrained model do not show a soft cap, so the config is read instead.
        capped = getattr(model.config.get_text_config(), "final_logit_softcapping", None) is not None
        for batch, skipping in _ways(model, examples):
            for head in (*(() if capped else ("linear",)), *(() if skipping else ("own",))):
                reader = Reader(batch.layout, head)
                try:
                    logprobs, _, _ = completion_logprobs(model, reader, batch)
                except (RuntimeError, ValueError, TypeError, AttributeError):
                    continue  # the architecture rejects this form of input: try the next way
                if _agree(logprobs, plain, parameter.dtype):
                    return replace(reader, decodes=_decodes_with_a_cache(model, examples))
    finally:
        model.train(was_training)
    raise BadInput(
        f"{type(model).__name__}: found packed log-probabilities that differ from the model's own in every layout; "
        "expected a decoder-only causal language model"
    )


@torch.no_grad()
def inspect_reward_model(model: PreTrainedModel) -> Reader:
    """Return the fastest way of reading a sequence classifier with one label that agrees with its own pooled score.

    Raises:
        BadInput: no layout agrees.
    """
    model.eval()
    parameter = next(model.parameters())
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    examples = _probe_examples(min(embedding.weight.shape[0], 512))
    plain = []
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([example.prompt_ids + completion], device=parameter.device)
            # The plain trunk and the head: transformers' own pooling would skip a final PAD id, which a probe may hold.
            hidden = trunk_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
            plain.append(sequence_head(model)(hidden[-1]).squeeze(-1))
    expected = torch.stack(plain).float()
    for batch, _ in _ways(model, examples):
        try:
            hidden = hidden_states(trunk_of(model), batch, batch.last_index)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            continue
        scores = sequence_head(model)(hidden).squeeze(-1).float()
        if _agree(scores, expected, parameter.dtype):
            return Reader(batch.layout)
    raise BadInput(
        f"{type(model).__name__}: found packed scores that differ from the model's own; "
        "expected a decoder-only sequence classifier with num_labels=1"
    )


def read_reward_model(model: PreTrainedModel) -> RewardModel:
    """Wrap a sequence classifier as a reward model."""
    return RewardModel(model, inspect_reward_model(model))
