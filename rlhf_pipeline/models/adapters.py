"""LoRA adapters (peft) inside plain transformers models.

peft's layers replace modules of a transformers model in place, so every part of this package reads an adapted model
like any other. Adapters stand on each other: those of the parents are frozen and named parent1, parent2, ...; the one
in training is `TRAINED`. All are active, and a weight is W + sum_i s_i B_i A_i.

Models on the same base are modules of their own over the same frozen tensors (`on_same_weights`). No adapter is ever
switched on and off in training: a checkpointed layer runs again in the backward pass, and must find the adapter of its
forward pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import nn

from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.errors import BadInput, ConfigError, Fault, first_line
from rlhf_pipeline.models.four_bits import dequantise, entries, in_four_bits
from rlhf_pipeline.models.last_layer import compute_all
from rlhf_pipeline.models.refusals import refuse_to_hide
from rlhf_pipeline.registry.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRAINED = "default"  # peft's own name, so that its tools find the adapter
PREFIX = "base_model.model."  # of the keys in peft's files
SCORE_HEADS = ("score", "classifier")
TIED = "embed_tokens"  # the only name of an embedding with which peft keeps head and embedding tied, and can load both

Model = TypeVar("Model", bound=nn.Module)


def on_same_weights(model: Model) -> Model:
    """A copy of a model's modules over the same tensors; changing a module of one does not change the other.

    The copy computes its last layer at every position: an adapter would stand between its modules and their hooks.
    """
    scales = [module.quant_state for module in filter(in_four_bits, model.modules())]
    kept: Any = chain(model.parameters(), model.buffers(), scales)
    copied = copy.deepcopy(model, {id(part): part for part in kept})
    compute_all(copied)
    return copied


def adapters_of(model: nn.Module) -> list[str]:
    """The names of the adapters in a model, in the order in which they stand on each other."""
    return list(getattr(model, "peft_config", ()))


def trunk_on_same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """The decoder below the head of a model, as modules of its own over the same tensors, with its adapters."""
    return _with_adapters_of(model, on_same_weights(cast("PreTrainedModel", model.base_model)))


def whole_trunk(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the decoder below the head of a model; its adapters are merged, and all weights can be trained."""
    trunk = _with_adapters_of(model, copy.deepcopy(cast("PreTrainedModel", model.base_model)))
    if any(map(in_four_bits, trunk.modules())):
        dequantise(trunk)
    remove_adapters(trunk, merge=True)
    return trunk.requires_grad_(True)


def _with_adapters_of(model: PreTrainedModel, trunk: PreTrainedModel) -> PreTrainedModel:
    if adapters_of(model):
        trunk.peft_config = dict(model.peft_config)
    return trunk


def ties(model: PreTrainedModel) -> bool:
    """Whether the output head of a language model is its embedding."""
    head = getattr(model, "lm_head", None) and model.get_output_embeddings()
    return head is not None and head.weight is cast(nn.Embedding, model.get_input_embeddings()).weight


def add_adapter(model: PreTrainedModel, config: TrainingConfig, base: str) -> None:
    """Put a new adapter into a model and freeze everything else; the model computes what it did before.

    B starts at 0 and A by `config.seed` (Hu et al. 2021, section 4.1). A score head is trained and stored whole.

    Args:
        base: the name of the model that the adapter stands on, for `adapter_config.json`.

    Raises:
        ConfigError: the architecture has no such modules, or modules_to_save that a parent's adapter has too.
    """
    from peft import LoraConfig

    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    asked = config.lora_target_modules
    whole = [name for name in config.lora_modules_to_save or () if name.rpartition(".")[2] in names]
    head = [name for name in SCORE_HEADS if hasattr(model, name)][:1]
    if fixed := [n for n, m in model.named_modules() if in_four_bits(m) and {n, n.rpartition(".")[2]} & set(whole)]:
        found, expected = f"{fixed[0]} is held in 4 bits, which cannot be trained", "embeddings, output head or norms"
        raise ConfigError(Fault("lora_modules_to_save", found, expected, "give it an adapter by lora_target_modules"))
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=0.0 if config.stage == "ppo" else config.lora_dropout,  # see `remark_on_dropout` of its config
        target_modules="all-linear" if asked == ("all-linear",) else list(asked) if asked else None,
        modules_to_save=[*whole, *head] or None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        base_model_name_or_path=base,
        ensure_weight_tying=ties(model) and TIED in {*(asked or ()), *whole},
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            _inject(model, settings, TRAINED)
    except ValueError as error:  # peft raises nothing else for modules that are not there
        found = f"{type(model).__name__}: {first_line(error)}"
        if "Only one adapter can be set" in found:
            expected = "modules that no parent's adapter trains whole; or start from rlhf models export REF DIR --merge"
            raise ConfigError(Fault("lora_modules_to_save", found, expected)) from error
        expected = "names of its linear modules, or all-linear"
        raise ConfigError(Fault("lora_target_modules", found, expected)) from error


def load_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Put the frozen adapter of a folder into a model.

    A classifier leaves out what an adapter of a language model has for the output head.

    Raises:
        BadInput: the files are not those of an adapter for this model.
    """
    from peft import PeftConfig, set_peft_model_state_dict
    from safetensors.torch import load_file

    try:
        settings: Any = PeftConfig.from_pretrained(str(folder))
        if getattr(settings, "alora_invocation_tokens", None) or getattr(settings, "arrow_config", None):
            raise ValueError("its adapter depends on the tokens that it reads; expected LoRA")
        settings.inference_mode, settings.lora_dropout = True, 0.0  # a frozen adapter has no noise
        kept = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        if getattr(settings, "modules_to_save", None):
            settings.modules_to_save = [n for n in settings.modules_to_save if n.rpartition(".")[2] in kept] or None
        name = f"parent{len(adapters_of(model)) + 1}"
        _inject(model, settings, name)
        weights = {k.removeprefix(PREFIX): v for k, v in load_file(folder / ADAPTER_WEIGHTS).items()}
        weights = {key: tensor for key, tensor in weights.items() if hasattr(model, "lm_head") or "lm_head" not in key}
        report: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
        absent = [key for key in report.missing_keys if f".{name}." in key or key.endswith(f".{name}")]
        if absent or report.unexpected_keys:
            first = (absent or report.unexpected_keys)[0]
            raise ValueError(f"{'no weights for' if absent else 'weights of another model:'} {first}")
    except Exception as error:  # peft, json and safetensors raise different errors
        refuse_to_hide(error)
        raise BadInput(
            f"{folder}: cannot load it as an adapter ({first_line(error)}); expected {ADAPTER_CONFIG} and "
            f"{ADAPTER_WEIGHTS} of peft, for {type(model).__name__}"
        ) from error


def _inject(model: PreTrainedModel, settings: Any, name: str) -> None:
    """Let peft put its layers in, in fp32 on weights of half precision; all adapters are active, `TRAINED` is trained.

    Raises:
        ValueError: peft cannot put this adapter into the model.
    """
    from peft import inject_adapter_in_model
    from peft.tuners.tuners_utils import cast_adapter_dtype, set_adapter, set_requires_grad

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on Conv1D, tied weights and second adapters: all are dealt with
        inject_adapter_in_model(settings, cast(nn.Module, model), name)
        cast_adapter_dtype(model, name)
        set_adapter(model, adapters_of(model))
    model.requires_grad_(False)
    if TRAINED in adapters_of(model):
        set_requires_grad(model, TRAINED)


def save_adapter(model: PreTrainedModel, directory: Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Write the trained adapter in peft's format, with the model's config; not the weights it stands on.

    state: see `save_model`.
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    settings = copy.deepcopy(model.peft_config[TRAINED])
    settings.inference_mode = True
    for key, value in vars(settings).items():  # sets have no order, and equal adapters have equal files
        if isinstance(value, set):
            setattr(settings, key, sorted(value))
    directory.mkdir(parents=True, exist_ok=True)
    settings.save_pretrained(str(directory))
    weights = get_peft_model_state_dict(model, state, adapter_name=TRAINED, save_embedding_layers=False)
    own = {f"{PREFIX}{key}": tensor.detach().cpu().clone().contiguous() for key, tensor in weights.items()}
    save_file(own, directory / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.save_pretrained(directory)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.save_pretrained(directory)


def adapter_facts(model: PreTrainedModel) -> dict[str, Any]:
    """What the manifest says of a trained adapter; {} for a model without one."""
    if TRAINED not in adapters_of(model):
        return {}
    settings: Any = model.peft_config[TRAINED]
    targets = settings.target_modules
    return {
        "type": "DoRA" if settings.use_dora else "rsLoRA" if settings.use_rslora else "LoRA",
        "r": settings.r,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "modules_to_save": sorted(settings.modules_to_save or ()),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "parameters": sum(map(entries, model.parameters())),
        **_quantised(model),
    }


def _quantised(model: PreTrainedModel) -> dict[str, Any]:
    how: Any = getattr(model.config, "quantization_config", None)
    keys = ("load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant")
    return {} if how is None else {key: getattr(how, key) for key in keys}


def remove_adapters(model: PreTrainedModel, *, merge: bool) -> None:
    """Take peft's layers out of a model with a `peft_config` in place; `merge` adds the adapters to the weights before.

    Every weight that changes becomes a tensor of its own, so a tied head and its embedding part if only one has an
    adapter, and models on the same weights do not change.
    """
    if names := adapters_of(model):  # peft takes more than a second to import
        _take_out(model, names, merge)
        del model.peft_config
    if getattr(model, "lm_head", None) is not None and not ties(model):
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False


def _take_out(model: PreTrainedModel, names: Sequence[str], merge: bool) -> None:
    """Put the modules below peft's layers in their places; `merge`: with the adapters of these names."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for path, module in list(model.named_modules()):
            if isinstance(module, BaseTunerLayer):
                plain: Any = module.get_base_layer()
                if merge:
                    plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
                    module.merge(adapter_names=[n for n in names if n in module._all_available_adapter_names()])
            elif isinstance(module, AuxiliaryTrainingWrapper):
                plain = module.unload_and_optionally_merge_module(merge=merge, safe_merge=False, adapter_names=None)
            else:
                continue
            model.set_submodule(path, plain)


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """A context in which a model computes as if it had no adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        model.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def stirred(model: nn.Module) -> Iterator[None]:
    """A context in which every adapter has a large effect, so that a computation that passes it by is seen.

    A fresh adapter changes nothing, and a trained one perhaps less than the tolerance of a check.
    """
    awake = [p for name, p in model.named_parameters() if ".lora_B." in name or ".lora_embedding_A." in name]
    kept = [parameter.detach().clone() for parameter in awake]
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in awake:
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.5 / min(parameter.shape) ** 0.5)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, before in zip(awake, kept, strict=True):
                parameter.copy_(before)
