"""Weights in memory for a program that reads a model's files: vLLM, which samples for PPO."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from rlhf_pipeline.config.rollout_engine import vllm_on_cpu
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.models.adapters import adapters_of, on_same_weights, remove_adapters, ties
from rlhf_pipeline.models.four_bits import dequantise, in_four_bits
from rlhf_pipeline.registry.adapters import described_by
from rlhf_pipeline.registry.references import Resolved

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""Widths of an attention head that vLLM's attention on a CPU computes (0.30)."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or if it has adapters or layers in 4 bits, one of plain weights that computes the same.

    The weights below adapters are W + sum_i s_i B_i A_i, as tensors of their own; all other tensors are the model's.
    """
    quantised = any(map(in_four_bits, model.modules()))
    if not adapters_of(model) and not quantised:
        return model
    plain = on_same_weights(model)
    if quantised:
        dequantise(plain)
    remove_adapters(plain, merge=True)
    return plain


def weights_of_files(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights that `save_pretrained` would write, tied ones once, under the names that they have in files."""
    from transformers.core_model_loading import revert_weight_conversion

    names = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    return revert_weight_conversion(model, {k: v for k, v in model.state_dict().items() if k not in tied})


def differences_from_files(model: PreTrainedModel) -> dict[str, Any]:
    """Keys of config.json that may differ from those in memory: rows of an extended embedding, a head of its own."""
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    keys: dict[str, Any] = {"vocab_size": rows, "tie_word_embeddings": ties(model)}
    return keys if model.config.get_text_config() is model.config else {**keys, "text_config": keys}


def require_vllm_reads(base: Resolved, trust_remote_code: bool) -> None:
    """Check by its config that vLLM can take over the weights of a model.

    Raises:
        ConfigError: a mixture of experts, weights that files hold in other shapes, or on a CPU a head of another size.
    """
    from transformers import AutoConfig

    base = described_by(base)
    try:
        config = AutoConfig.from_pretrained(base.location, revision=base.revision, trust_remote_code=trust_remote_code)
    except Exception:  # loading the model will report it
        return
    if (found := _unreadable(config)) is not None:
        raise ConfigError(Fault("rollout_engine", f"found 'vllm', but {base.label} {found}", "rollout_engine: native"))


def _unreadable(config: PreTrainedConfig) -> str | None:
    text: Any = config.get_text_config()
    if any((getattr(text, key, None) or 0) > 1 for key in EXPERTS):
        return f"({config.model_type}) is a mixture of experts, whose weights vllm does not take over correctly"
    if (name := _converted(config)) is not None:
        return f"({config.model_type}) holds weights such as {name} in another shape than its files"
    size = getattr(text, "head_dim", None)
    if size is None and getattr(text, "num_attention_heads", None):
        size = text.hidden_size // text.num_attention_heads
    if vllm_on_cpu() and size is not None and size not in CPU_HEAD_SIZES:
        sizes = ", ".join(map(str, CPU_HEAD_SIZES))
        return f"has attention heads of width {size}, and vllm computes on a CPU only {sizes}"
    return None


def _converted(config: PreTrainedConfig) -> str | None:
    """The name of a weight that is made of several in the files, or the other way round; None without one."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    except Exception:  # loading the model will report it
        return None
    rules = get_model_conversion_mapping(model, add_legacy=False)
    return next((str(rule.target_patterns[0]) for rule in rules if isinstance(rule, WeightConverter)), None)
