"""Load models from a path or hub id, or make them from a config; dropout is off by default."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.data.tokenizers import stop_ids, token_count
from rlhf_pipeline.errors import BadInput, ConfigError, Fault, MismatchError, did_you_mean, first_line
from rlhf_pipeline.models.adapters import TRAINED, adapters_of, save_adapter
from rlhf_pipeline.models.four_bits import loading_in, require_bitsandbytes, settle
from rlhf_pipeline.models.needs import require_kernel
from rlhf_pipeline.models.noise import is_noise, router_loss_as_loaded, without_noise, without_router_loss
from rlhf_pipeline.models.refusals import refuse_to_hide, require_full_precision, require_sizes

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


HEADS = ("score.", "classifier.")


def _load(
    auto_class: Any,
    path: str | Path,
    prepare: Callable[[Any], Any],
    *,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    described_by: Path | None = None,
    new_head: bool = False,
    four_bits: FourBits | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model by an auto class of transformers, with the loading report of transformers.

    prepare: checks and changes its config before. described_by: the folder of an adapter on the weights in `path`; its
    config holds, if it has one. new_head: whether the files may lack the score head. four_bits: how linear layers are
    quantised.

    Raises:
        BadInput: no config or weights that can be used, or weights that the files lack.
    """
    from transformers import AutoConfig

    told: tuple[str, str | None] = (str(path), revision)
    if described_by is not None and (described_by / "config.json").is_file():
        told = str(described_by), None
    try:
        config = AutoConfig.from_pretrained(told[0], revision=told[1], trust_remote_code=trust_remote_code)
        if told[0] != str(path):  # an adapter's config says how the weights below it were held; their files are plain
            vars(config).pop("quantization_config", None)
        require_sizes(config)
        require_full_precision(config)
    except Exception as error:  # architectures raise different errors
        refuse_to_hide(error)
        raise BadInput(f"{path}: its config.json cannot be used ({first_line(error)})") from error
    prepare(config)
    if four_bits is not None:
        require_bitsandbytes(described_by or path)
    try:
        model, report = auto_class.from_pretrained(
            str(path),
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            config=config,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **({} if four_bits is None else loading_in(four_bits)),
        )
    except Exception as error:  # torch raises various errors for contradictory sizes
        refuse_to_hide(error)
        raise BadInput(
            f"{path}: cannot load it as a model ({first_line(error)}); expected a directory or hub id with "
            "config.json and safetensors weights"
        ) from error
    lacking = sorted(key for key in report["missing_keys"] if not (new_head and key.startswith(HEADS)))
    if lacking:
        named = ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else "")
        raise BadInput(
            f"{path}: its files lack weights of {type(model).__name__}: {named}; expected all of them (transformers "
            "would draw them at random); restore the files, or correct architectures and sizes in config.json"
        )
    if four_bits is not None:
        settle(model)
    return without_router_loss(model), report


def load_causal_lm(
    path: str | Path, *, dropout: bool = False, tokenizer: PreTrainedTokenizerBase | None = None, **options: Any
) -> PreTrainedModel:
    """Load a causal language model; with `tokenizer`, extend the embedding to its added tokens.

    options: dtype, attn_implementation, revision, trust_remote_code, described_by, four_bits (see `_load`).
    """
    from transformers import AutoModelForCausalLM

    model, _ = _load(AutoModelForCausalLM, path, (lambda config: config) if dropout else without_noise, **options)
    if tokenizer is not None:
        adopt_tokenizer(model, tokenizer)
    return model


def adopt_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give every token of the tokenizer an embedding row, and set the model's special ids to those of the tokenizer.

    `token_count` becomes the number of ids that are tokens where the model has more rows; see `Reader.tokens`.

    The ids that end a response become the model's `eos_token_id`. A tokenizer without PAD leaves the model's PAD.
    """
    count = token_count(tokenizer)
    _add_rows(model, count)
    rows = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    model.token_count = count if count < rows else None  # type: ignore[assignment]  # an attribute of ours
    stops = stop_ids(tokenizer)
    configs = (model.config, model.config.get_text_config(), getattr(model, "generation_config", None))
    for config in {id(config): config for config in configs if config is not None}.values():
        if tokenizer.pad_token_id is not None:
            config.pad_token_id = tokenizer.pad_token_id
        config.eos_token_id = list(stops) if len(stops) > 1 else stops[0]
        config.bos_token_id = tokenizer.bos_token_id
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    if getattr(embedding, "padding_idx", None) in stops:
        embedding.padding_idx = None  # torch gives this row no gradient, and a PAD that ends responses is trained


@torch.no_grad()
def _add_rows(model: PreTrainedModel, count: int) -> None:
    """Extend the embedding, and the output head, to `count` rows; every new row is the mean of the old ones.

    Source of the mean: Hewitt (2021), Initializing new word embeddings. It is the same in every load of a model, so a
    policy equals its reference. A head of its own stays one, also if the config ties it: resizing would tie it.
    """
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    old = embedding.weight.shape[0]
    if count <= old:
        return
    head = model.get_output_embeddings()
    own = None if head is None or head.weight is embedding.weight else head.weight.clone()
    model.resize_token_embeddings(count, mean_resizing=False)
    weight = cast(nn.Embedding, model.get_input_embeddings()).weight
    weight[old:] = weight[:old].float().mean(0)
    if own is not None:
        new = own.float().mean(0, keepdim=True).to(own.dtype).expand(count - old, -1)
        head = cast(nn.Linear, model.get_output_embeddings())
        head.weight = nn.Parameter(torch.cat([own, new]), requires_grad=head.weight.requires_grad)
    if getattr(head, "bias", None) is not None:
        head.bias[old:] = head.bias[:old].float().mean()


def new_config(model_init: dict[str, Any], *, dropout: bool = False, **special: Any) -> Any:
    """The transformers config that `model_init` describes by `model_type` and values for its keys.

    Raises:
        ConfigError: `model_type` or a key is unknown, or the architecture refuses a value.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    settings = dict(model_init)
    model_type = settings.pop("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        raise ConfigError(
            Fault(
                "model_init: model_type",
                f"unknown architecture {model_type!r}",
                "a model_type of transformers, such as llama or gpt2",
                did_you_mean(str(model_type), CONFIG_MAPPING_NAMES),
            )
        )
    example = AutoConfig.for_model(model_type)
    known = set(vars(example)) | set(getattr(type(example), "attribute_map", {}))
    faults = [
        Fault(f"model_init: {key}", f"{model_type} has no such key", "a key of its config", did_you_mean(key, known))
        for key in settings
        if key not in known
    ]
    faults += [
        Fault(f"model_init: {key}", f"found {value}, but dropout is off", "0", "set dropout: true to train with it")
        for key, value in settings.items()
        if not dropout and is_noise(key, value)
    ]
    if faults:
        raise ConfigError(faults)
    try:
        config = AutoConfig.for_model(model_type, **{**special, **settings})
    except Exception as error:  # architectures raise different errors here too
        raise ConfigError(Fault("model_init", f"{model_type} refuses these values: {first_line(error)}")) from error
    return config if dropout else without_noise(config)


def model_of_config(config: Any, **options: Any) -> PreTrainedModel:
    """Make a causal language model with random weights.

    Raises:
        ConfigError: the architecture has no causal language model, or its sizes do not fit together.
    """
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, **options)
    except Exception as error:
        raise ConfigError(
            Fault(
                "model_init",
                f"cannot make a causal language model of {config.model_type}: {first_line(error)}",
                "a decoder-only architecture with sizes that fit together",
            )
        ) from error


def init_causal_lm(
    model_init: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    dtype: str = "float32",
    attn_implementation: str | None = None,
    dropout: bool = False,
) -> PreTrainedModel:
    """Make a model with random weights from `model_type` and config keys of transformers.

    Raises:
        ConfigError: `model_type` or a config key is unknown, values do not fit, or the attention kernel is not here.
    """
    config = new_config(
        model_init,
        dropout=dropout,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    if attn_implementation is not None:
        require_kernel(config, attn_implementation)
    torch.manual_seed(seed)
    model = model_of_config(
        config, dtype="float32" if dtype == "auto" else dtype, attn_implementation=attn_implementation
    )
    adopt_tokenizer(model, tokenizer)
    return without_router_loss(model)


def init_reward_model(
    path: str | Path, tokenizer: PreTrainedTokenizerBase, *, seed: int, score_pooling: str = "last", **options: Any
) -> PreTrainedModel:
    """Make a reward model: the trunk of a language model with a new scalar head without bias, std 1 / sqrt(d + 1).

    Source of the initialisation: Stiennon et al. 2020; Huang et al. 2024 (N+ details), detail 11.

    options: see `load_causal_lm`.
    """
    from transformers import AutoModelForSequenceClassification

    from rlhf_pipeline.models.modules import sequence_head

    def with_one_score(config: Any) -> None:
        without_noise(config).num_labels = 1

    model, _ = _load(AutoModelForSequenceClassification, path, with_one_score, new_head=True, **options)
    adopt_tokenizer(model, tokenizer)
    head = sequence_head(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        values = torch.empty(head.weight.shape).normal_(0.0, 1 / math.sqrt(head.in_features + 1), generator=generator)
        head.weight.copy_(values)
    model.config.score_pooling = score_pooling
    model.config.reward_shift = 0.0
    return model


def load_sequence_classifier(path: str | Path, *, described_by: Path | None = None, **options: Any) -> PreTrainedModel:
    """Load a trained reward model (a sequence classifier with one label); an adapter has its head.

    options: see `load_causal_lm`.

    Raises:
        MismatchError: it has another number of labels, no head, or a head with a bias (which would be dropped).
    """
    from transformers import AutoModelForSequenceClassification

    def require_one_label(config: Any) -> None:
        if described_by is not None and not (described_by / "config.json").is_file():
            config.num_labels = 1  # the base may be a language model, whose config says nothing of labels
        if without_noise(config).num_labels != 1:
            raise MismatchError(
                f"{path}: found a classifier with {config.num_labels} labels, expected a reward model with 1"
            )

    options |= {"described_by": described_by, "new_head": True}
    model, report = _load(AutoModelForSequenceClassification, path, require_one_label, **options)
    if dropped := sorted(key for key in report["unexpected_keys"] if key.startswith(HEADS)):
        raise MismatchError(f"{path}: found {dropped[0]}, which transformers would drop; expected a head without bias")
    absent = sorted(key for key in report["missing_keys"] if key.startswith(HEADS))
    if absent and described_by is None:
        raise MismatchError(f"{path}: found no {absent[0]}, expected a trained reward model")
    return model


def store_reward_shift(model: PreTrainedModel, mean_score: float) -> None:
    """Store the constant that gives reference samples the mean score 0: score = head output - shift.

    Raises:
        ValueError: the model already has one (a second normalisation would hide the first).
    """
    if getattr(model.config, "reward_shift", 0.0):
        raise ValueError(f"this reward model is already normalised (reward_shift {model.config.reward_shift})")
    model.config.reward_shift = float(mean_score)


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write weights (safetensors), config and tokenizer in the Hugging Face layout; of an adapter its own weights.

    state: the weights, if those of the model are divided; see `whole_state`.
    """
    with router_loss_as_loaded(model):
        if TRAINED in adapters_of(model):
            save_adapter(model, directory, state)
        else:
            model.save_pretrained(directory, safe_serialization=True, state_dict=None if state is None else dict(state))
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    if "auto_map" in config:  # never pass on a pointer to code that a user might run unintentionally
        del config["auto_map"]
        (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
