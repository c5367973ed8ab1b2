"""What a run needs of its models: checked from their configs before it trains, and by its dry run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.collect import SamplingConfig
from rlhf_pipeline.config.stages import PpoConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import ConfigError, Fault, first_line
from rlhf_pipeline.models.four_bits import require_bitsandbytes
from rlhf_pipeline.models.handover import require_vllm_reads
from rlhf_pipeline.registry.adapters import described_by, four_bits_of
from rlhf_pipeline.registry.lengths import require_positions
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def require_needs(config: TrainingConfig | SamplingConfig, parents: Mapping[str, Resolved]) -> None:
    """Check positions, number type, weights in 4 bits, attention kernel and sampling engine for the models of a stage.

    Raises:
        ConfigError: a model has too few positions, its stored weights cannot be trained, an adapter would start from
            weights held in another way than those of its parent, the kernel cannot be used, or vLLM is to sample
            and cannot read the policy.
        DamagedFile: a config.json cannot be read.
    """
    for role, parent in parents.items():
        scores = role.startswith("reward_model") or role == "judge"
        if not scores or parent.manifest is not None:  # a reward model from elsewhere may read text: see `load_reward`
            require_positions(config, parent)
        if four_bits_of(parent) is not None:
            require_bitsandbytes(parent.label)
        if config.attn_implementation is not None:
            _require_kernel_of(parent, config.attn_implementation, config.trust_remote_code, scores=scores)
    base = parents.get("base")
    if isinstance(config, PpoConfig) and config.rollout_engine == "vllm" and base is not None:
        require_vllm_reads(base, config.trust_remote_code)
    if isinstance(config, TrainingConfig) and config.use_peft and base is not None:
        trained, asked = four_bits_of(base), FourBits.of(config)
        if trained not in (None, asked):
            found = f"{asked.keys if asked else False}, and {base.label} was trained with {trained.keys}"
            fix = "or start from rlhf models export REF DIR --merge"
            raise ConfigError(Fault("load_in_4bit", found, trained.keys, fix))
    if isinstance(config, TrainingConfig) and config.dtype == "auto" and base is not None:
        stored = _described(base)
        if stored.get("dtype", stored.get("torch_dtype")) == "float16":
            found = f"auto, and {base.label} is stored in float16, in which AdamW's epsilon rounds to 0"
            raise ConfigError(Fault("dtype", found, "float32 (with bf16: true for speed), or bfloat16"))


def remarks_on(base: Resolved) -> list[str]:
    """Lines for the log: what of a model's config has no effect on training here."""
    described = _described(base)
    text = described.get("text_config", described)
    if not isinstance(text, dict) or not text.get("output_router_logits") or not text.get("router_aux_loss_coef"):
        return []
    return [
        f"note: router_aux_loss_coef {text['router_aux_loss_coef']:g} of {base.label} has no effect: the loss that "
        "balances its experts is not added"
    ]


def _described(resolved: Resolved) -> dict[str, Any]:
    resolved = described_by(resolved)
    return {} if resolved.path is None else read_json(resolved.path / "config.json")


def _require_kernel_of(resolved: Resolved, kernel: str, trust_remote_code: bool, *, scores: bool) -> None:
    from transformers import AutoConfig

    resolved = described_by(resolved)
    try:
        config = AutoConfig.from_pretrained(
            resolved.location, revision=resolved.revision, trust_remote_code=trust_remote_code
        )
    except Exception:  # loading the model will report it
        return
    require_kernel(config, kernel, scores=scores)


def require_kernel(config: PreTrainedConfig, kernel: str, *, scores: bool = False) -> None:
    """Check that a model with this config can be made with an attention kernel, without its weights.

    scores: whether it is a sequence classifier.

    Raises:
        ConfigError: transformers refuses the kernel, for this architecture or without its package.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_class = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    with torch.device("meta"):
        try:
            auto_class.from_config(copy.deepcopy(config), attn_implementation=kernel)
        except Exception as error:
            try:
                auto_class.from_config(copy.deepcopy(config))
            except Exception:  # the kernel is not the cause; loading the model will report it
                return
            found = f"{kernel!r} cannot be used here ({first_line(error)})"
            raise ConfigError(Fault("attn_implementation", found, "eager, sdpa, or no value")) from error
