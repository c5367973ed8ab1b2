"""Keys of `rlhf data collect`: sample responses, label them, publish the pairs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from rlhf_pipeline.config.base import (
    DEFAULT_SPLITS,
    CommandConfig,
    Count,
    Dtype,
    Lengths,
    Name,
    Positive,
    Seed,
    Text,
    Texts,
    check_fractions,
    check_lengths,
    check_world,
    option,
    reject_bool,
    resolve_lengths,
)
from rlhf_pipeline.errors import Fault


def check_prompts(config: Any) -> Iterator[Fault]:
    """Yield the faults of prompts from a built-in world that does not exist."""
    return check_world(config, "prompts")


class CollectConfig(CommandConfig):
    """Config of `rlhf data collect` and of an experiment's `collect` stage."""

    stage: ClassVar[str] = "collect"
    checks: ClassVar = (check_prompts, check_lengths, check_fractions)

    policy: Text = option(..., "model that responds: registry name, directory or hub id", examples=["model"])
    prompts: Text = option(..., "source of the prompts, in any format that has prompts", examples=["data"])
    judge: Text = option(..., "who labels: world, a reward model, or module:function", examples=["world"])
    num: Count = option(..., "records to collect", examples=[1])
    output_name: Name = option(..., "name of the data in the home directory", examples=["data"])
    k: int = option(2, "responses per prompt; more than 2 make rankings (DPO paper: 2)", ge=2)
    labels: Literal["bradley-terry", "rank"] = option(
        "bradley-terry", "draw winners with odds exp(r_w - r_l), or go by rank (ours)", moves_optimum=True
    )
    temperature: Positive = option(1.0, "divides the logits of the sampler (ours: the policy itself)")
    dataset_config: Text | None = option(None, "configuration of the prompts' source (default: its own)")
    splits: Texts | None = option(None, "splits to take prompts from (ours: all)", min_length=1)
    split_fractions: dict[str, float] = option(
        DEFAULT_SPLITS, "share of prompts in each split of a source without splits, by hash", min_length=1
    )
    skip_bad_rows: bool = option(False, "drop and count rows with faults instead of stopping (ours: stop)")
    max_prompt_length: Count | None = option(None, "longest prompt, tokens; longer ones are cut on the left")
    response_length: Count | None = option(None, "longest response with its EOS, tokens")
    max_length: Count | None = option(None, "longest prompt and response together, tokens (TRL: 1024)")
    per_device_eval_batch_size: Count = option(
        256, "responses sampled or scored at once on one device; halved where memory runs out (ours)"
    )
    dtype: Dtype = option("float32", "number type of the weights (TRL)")
    attn_implementation: Text | None = option(None, "attention kernel (default: the model's own choice)")
    trust_remote_code: bool = option(False, "run code that the model's repository brings (transformers: off)")
    seed: Seed = option(0, "seed of sampling and of the labels (ours)")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU (transformers)")
    num_threads: Count | None = option(None, "CPU threads (default: torch's choice)")

    _no_bools = field_validator("*", mode="before")(reject_bool)

    def lengths(self) -> Lengths:
        """Return the longest prompt, response and sum, in tokens; see `resolve_lengths`."""
        return resolve_lengths(self.max_prompt_length, self.response_length, self.max_length)
