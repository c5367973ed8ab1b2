"""Keys of `rlhf sft`: supervised fine-tuning of an existing model or one from scratch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from rlhf_pipeline.config.base import Count, ModelInput, NonNegative, Positive, Text, option, wrong
from rlhf_pipeline.config.lengths import check_lengths
from rlhf_pipeline.config.reward_names import names_a_model
from rlhf_pipeline.config.rewards import TOKENIZATION, Tokenization, check_source
from rlhf_pipeline.config.sharding import OFF
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


SELECTED = {"loss": "eval_nll", "reward": "eval_reward"}
"""The metric that each value of `select_by` follows."""


def check_selection(config: SftConfig) -> Iterator[Fault]:
    """Yield the faults of `select_by`: without a reward, with another metric, or with what cannot be sampled from."""
    measured = config.best_metric if config.follows_metric else None
    if config.select_by is not None and measured != SELECTED[config.select_by]:
        found = f"select_by is {config.select_by}, but the metric is {measured}"
        fix = "remove metric_for_best_model and load_best_model_at_end"
        yield Fault("metric_for_best_model", found, SELECTED[config.select_by], fix)
    if config.select_by != "reward":
        if measured == "eval_reward" and config.select_by is None:
            yield Fault("metric_for_best_model", "'eval_reward' without select_by", "select_by: reward")
        for key in ("select_reward", "select_prompts"):
            if getattr(config, key) != SftConfig.model_fields[key].default:
                yield Fault(key, f"select_by is {config.select_by or 'not set'}", "select_by: reward", f"or no {key}")
        return
    if config.select_reward is None:
        expected = "a reward model, module:function or world"
        yield Fault("select_reward", "missing, but select_by is reward", expected)
        return
    yield from check_source("select_reward", config.select_reward, None)
    if config.model_init is not None and names_a_model(config.select_reward):
        found = f"{config.select_reward!r} with model_init, whose tokenizer no reward model reads yet"
        yield Fault("select_reward", found, "world or module:function", "or model_name_or_path in place of model_init")
    if config.trains_all:
        found = "the loss is on all tokens: there is no prompt to sample a response to"
        yield Fault("select_by", found, "completion_only_loss true and train_on all_assistant or last")
    if config.fsdp:
        yield Fault("select_by", "sampling from a model that is divided among processes", "loss", OFF)


class SftConfig(TrainingConfig):
    """Config of `rlhf sft`."""

    stage: ClassVar[str] = "sft"
    checks: ClassVar = (check_start, *COMMON_CHECKS, check_trained, check_end, check_positions, check_selection)

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
    select_by: Literal["loss", "reward"] | None = option(
        None,
        "register the weights of the best evaluation, one after each epoch, on the split validation: by the loss, or "
        "by the mean reward of responses sampled to held-out prompts (InstructGPT: reward)",
    )
    select_reward: Text | None = option(
        None,
        "with select_by reward: reward model, module:function or world (InstructGPT: its reward model)",
        names="reward",
    )
    select_prompts: Count = option(
        256, "with select_by reward: number of held-out prompts, one response to each, with the same random numbers"
    )
    reward_tokenization: Tokenization = TOKENIZATION

    @model_validator(mode="before")
    @classmethod
    def _selection_follows_a_metric(cls, values: Any) -> Any:
        metric = SELECTED.get(str(values.get("select_by"))) if isinstance(values, dict) else None
        if metric is None:
            return values
        implied = {"eval_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": metric}
        return {**implied, "dataset_test_split": "validation", **values}

    def parents(self) -> dict[str, ModelInput]:
        """Return the start of the model, and the reward model that chooses the evaluation."""
        found, chooser = super().parents(), self.select_reward
        named = chooser is not None and names_a_model(chooser)
        return found | ({"selector": ModelInput(chooser, "reward_model")} if named and chooser is not None else {})

    @property
    def trains_all(self) -> bool:
        """Whether the loss is on all tokens, prompts too."""
        return self.train_on == "all" or not self.completion_only_loss
