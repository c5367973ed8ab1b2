"""The word-level tokenizer of `world:verdicts`, as an ordinary transformers tokenizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_pipeline.data.world.vocabulary import EOS, PAD, TOKEN_ID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


def tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per word, without unknown-word and beginning-of-text tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocab=dict(TOKEN_ID)))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left")


def is_world_tokenizer(candidate: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has exactly this world's words, so that the true reward can score its responses."""
    return candidate.get_vocab() == TOKEN_ID
