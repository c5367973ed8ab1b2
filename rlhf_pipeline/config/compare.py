"""Keys of `rlhf evaluate`, `rlhf compare` and `rlhf exact`: the same prompts, read the same way, for every model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from rlhf_pipeline.config.base import (
    DEFAULT_SPLITS,
    Checks,
    CommandConfig,
    Count,
    Counts,
    Dtype,
    Name,
    Positive,
    Seed,
    Text,
    Texts,
    check_fractions,
    check_world,
    option,
    reject_bool,
)
from rlhf_pipeline.errors import Fault


def check_prompts(config: Any) -> Iterator[Fault]:
    """Yield the faults of prompts from a built-in world that does not exist."""
    return check_world(config, "prompts")


def check_arms(config: Any) -> Iterator[Fault]:
    """Yield the faults of arms named twice, or of a single model with nothing to compare it to."""
    seen: set[str] = set()
    for index, arm in enumerate(config.arms):
        if arm in seen:
            yield Fault(f"arms.{index}", f"{arm!r} is named twice", "each model once")
        seen.add(arm)
    if config.baseline in seen:
        yield Fault("baseline", f"{config.baseline!r} is an arm as well", "another model, or no baseline")
    elif len(seen) + (config.baseline is not None) < 2:
        yield Fault("arms", f"{config.arms[0]!r} has nothing to be compared to", "two models or a baseline")


def check_validation(config: Any) -> Iterator[Fault]:
    """Yield the fault of settings chosen on the very prompts that they are shown on."""
    if config.validation_split is not None and config.split in (config.validation_split, "all"):
        found = f"split {config.split!r} holds the prompts of validation_split {config.validation_split!r}"
        yield Fault("validation_split", f"{found}: settings would be chosen on what is shown", "another split, or null")


class PromptsConfig(CommandConfig):
    """What every evaluation needs: prompts, a reference, and how to load models."""

    checks: ClassVar[Checks] = (check_prompts, check_fractions)

    split: Text = option("test", "split of the prompts (ours)")
    prompts: Text | None = option(None, "source of the prompts (default: the models' training data)")
    dataset_config: Text | None = option(None, "configuration of the prompts' source (default: its own)")
    max_prompts: Count = option(256, "most prompts, by hash order (ours)")
    temperature: Positive = option(1.0, "divides the logits in sampled and exact figures (ours: the policy itself)")
    max_new_tokens: Count | None = option(None, "longest response with its EOS, tokens (default: as trained)")
    max_prompt_length: Count | None = option(None, "longest prompt, tokens (default: as trained)")
    reward_model: Text | None = option(None, "who scores: world or a reward model (default: as trained)")
    reference: Text | None = option(None, "model that KL is measured to (default: the manifest's, else SFT)")
    split_fractions: dict[str, float] = option(
        DEFAULT_SPLITS, "share of prompts in each split of a source without splits, by hash", min_length=1
    )
    skip_bad_rows: bool = option(False, "drop and count rows with faults instead of stopping (ours: stop)")
    per_device_eval_batch_size: Count = option(
        256, "responses sampled or scored at once on one device; halved where memory runs out (ours)"
    )
    dtype: Dtype = option("float32", "number type of the weights (TRL)")
    attn_implementation: Text | None = option(None, "attention kernel (default: the model's own choice)")
    trust_remote_code: bool = option(False, "run code that the model's repository brings (transformers: off)")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU (transformers)")
    num_threads: Count | None = option(None, "CPU threads (default: torch's choice)")

    _no_bools = field_validator("*", mode="before")(reject_bool)


class EvaluateConfig(PromptsConfig):
    """Config of `rlhf evaluate`."""

    stage: ClassVar[str] = "evaluate"

    samples: Count = option(4, "responses sampled per prompt (ours)")
    seed: Seed = option(0, "seed of sampling (ours)")
    best_of: Counts = option((), "numbers of samples n to report best-of-n for (ours: none)")
    judge: Text | None = option(None, "held-out reward model: trained on pairs that no arm has seen (ours: none)")
    true_reward: Text | None = option(
        None, "what labelled the data, where that is known: module:function or a model (default: world on its own data)"
    )


class CompareConfig(EvaluateConfig):
    """Config of `rlhf compare`."""

    stage: ClassVar[str] = "compare"
    checks: ClassVar = (*EvaluateConfig.checks, check_arms, check_validation)

    name: Name = option("compare", "name of the report (ours)")
    arms: Texts = option(
        ..., "models to compare: registry names, directories or hub ids", min_length=1, examples=[["a", "b"]]
    )
    baseline: Text | None = option(None, "model that the arms are set against (default: the first arm)")
    validation_split: Text | None = option(
        "validation", "split of the prompts on which settings and snapshots are chosen (ours)"
    )
    allow_mismatch: bool = option(False, "compare arms that differ in more than their training, and say so (ours)")
    primary_contrast: Literal["auto", "as_trained", "matched_kl", "selected"] = option(
        "auto", "the contrast that is declared beforehand; auto: matched_kl in a sweep, else as_trained (ours)"
    )
    snapshots: bool = option(
        False, "add the snapshots of every arm's runs (snapshot_steps) to its curve; each is sampled too (ours: no)"
    )
    shown_prompts: Count = option(4, "prompts whose responses stand side by side in the report (ours)")
    exact: bool = option(True, "add exact figures where every response can be listed: the built-in world (ours)")
    reward_model_prompts: Count = option(4, "most prompts for exact figures that need a reward model")


class ExactConfig(PromptsConfig):
    """Config of `rlhf exact`."""

    stage: ClassVar[str] = "exact"

    beta: Positive | None = option(None, "price of KL in the objective (default: each model's own)")
    reward: Text = option("world", "reward of the objective: world or a reward model (ours: the true reward)")
    reward_model_prompts: Count = option(4, "most prompts for figures that need a reward model's score of every leaf")
    training_loss: bool = option(True, "add the excess training loss of DPO models (ours)")
    long_run: Text | None = option(None, "DPO model whose training loss counts as the best (default: the best listed)")
