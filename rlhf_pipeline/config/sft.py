"""Keys of `rlhf sft`: supervised fine-tuning of an existing model or one from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator

from rlhf_pipeline.config.base import NonNegative, Positive, option, wrong
from rlhf_pipeline.config.lengths import check_lengths
from rlhf_pipeline.config.training import COMMON_CHECKS, TrainingConfig
from rlhf_pipeline.errors import Fault

# 256 bytes, the end-of-text and the padding token.
SMALLEST_BYTE_VOCABULARY = 258
_TOKENIZERS = "{type: byte_level_bpe, vocab_size: N} or {type: world}"


def _model_init(value: Any) -> Any:
    if isinstance(value, dict) and not isinstance(value.get("model_type"), str):
        raise wrong("a mapping with model_type and values of its config", "add model_type: llama")
    return value


def _tokenizer_init(value: Any) -> Any:
    if value in ("world", "world:verdicts"):
        return {"type": "world"}
    if value is None or value == {"type": "world"}:
        return value
    if isinstance(value, str):
        value = {"type": value}
    if not isinstance(value, dict) or value.get("type") != "byte_level_bpe" or len(value) > 2:
        raise wrong(_TOKENIZERS)
    size = value.get("vocab_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < SMALLEST_BYTE_VOCABULARY:
        raise wrong(f"{_TOKENIZERS} with vocab_size >= {SMALLEST_BYTE_VOCABULARY}")
    return value


def check_start(config: SftConfig) -> Iterator[Fault]:
    """Yield the faults of a missing start, of two starts, or of a model from scratch without its tokenizer."""
    existing, fresh, tokenizer = config.model_name_or_path, config.model_init, config.tokenizer_init
    if existing is None and fresh is None:
        yield Fault("model_name_or_path", "missing", "model_name_or_path, or model_init to start from scratch")
    if existing is not None and fresh is not None:
        yield Fault("model_init", "model_name_or_path is also given", "one of the two", "remove one")
    if fresh is not None and tokenizer is None:
        yield Fault("tokenizer_init", "missing", f"{_TOKENIZERS}, because model_init starts from scratch")
    if existing is not None and fresh is None and tokenizer is not None:
        found = "the model of model_name_or_path has its own tokenizer"
        yield Fault("tokenizer_init", found, "tokenizer_init only with model_init", "remove it")


def check_trained(config: SftConfig) -> Iterator[Fault]:
    """Yield the fault of a loss on all tokens that is also to be on the last turn only."""
    if config.train_on == "last" and not config.completion_only_loss:
        yield Fault("train_on", "'last', but completion_only_loss is false", "one of the two", "remove one")


def check_end(config: SftConfig) -> Iterator[Fault]:
    """Yield the fault of an EOS for a tokenizer that is made with its own."""
    if config.tokenizer_init is not None and config.eos_token is not None:
        yield Fault("eos_token", "the tokenizer of tokenizer_init has its own", "no eos_token", "remove it")


def check_positions(config: SftConfig) -> Iterator[Fault]:
    """Yield the fault of a model from scratch with fewer positions than the longest sequence."""
    if any(check_lengths(config)):
        return
    total = config.lengths().total
    for key in ("max_position_embeddings", "n_positions"):
        positions = (config.model_init or {}).get(key)
        if isinstance(positions, int) and positions < total:
            found = f"{positions} positions for sequences of up to {total} tokens"
            yield Fault(f"model_init.{key}", found, f"at least {total}", "raise it, or lower max_length")


class SftConfig(TrainingConfig):
    """Config of `rlhf sft`."""

    stage: ClassVar[str] = "sft"
    checks: ClassVar = (check_start, *COMMON_CHECKS, check_trained, check_end, check_positions)

    learning_rate: Positive = option(2e-5, "peak learning rate of AdamW (TRL)")
    weight_decay: NonNegative = option(
        0.0, "AdamW's decoupled weight decay, per step and times the learning rate (TRL)"
    )
    completion_only_loss: bool = option(
        True, "compute the loss only on the completion, not on the prompt (TRL); false: as train_on: all"
    )
    train_on: Literal["all_assistant", "last", "all"] = option(
        "all_assistant",
        "trained tokens of a conversation (rows with `messages`): every turn of the assistant, its last turn, or all "
        "tokens, prompts too (ours: every turn)",
    )
    model_init: Annotated[dict[str, Any] | None, BeforeValidator(_model_init)] = option(
        None, "start from random weights: a mapping with model_type and values of the model's config"
    )
    tokenizer_init: Annotated[dict[str, Any] | None, BeforeValidator(_tokenizer_init)] = option(
        None, f"tokenizer of a model that starts from random weights: {_TOKENIZERS}"
    )
    packing: bool = option(
        False,
        "fill rows of max_length tokens with whole examples, best fit; batch sizes then count rows, not "
        "examples. Examples of a row do not attend to each other (TRL: bfd)",
    )
    dropout: bool = option(False, "keep the model's own dropout during training (ours: off in every stage)")

    @property
    def trains_all(self) -> bool:
        """Whether the loss is on all tokens, prompts too."""
        return self.train_on == "all" or not self.completion_only_loss
