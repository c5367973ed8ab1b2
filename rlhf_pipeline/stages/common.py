"""Functions that the stages share: find models, load models, make windows of fixed examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.collect import CollectConfig
from rlhf_pipeline.config.stages import ModelConfig, SftConfig
from rlhf_pipeline.config.template import HasTemplate
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.data.batch import Layout, fill_rows
from rlhf_pipeline.data.examples import tree_lengths
from rlhf_pipeline.data.templates import apply_template_keys
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import (
    load_tokenizer,
    same_but_for_pad,
    set_stop_token,
    tokenizer_digest,
)
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.models.adapted import classifier_on, load_adapted
from rlhf_pipeline.models.adapters import add_adapter
from rlhf_pipeline.models.loading import load_causal_lm, load_sequence_classifier
from rlhf_pipeline.models.modules import Policy, RewardModel
from rlhf_pipeline.models.noise import require_no_noise
from rlhf_pipeline.models.selfcheck import inspect_model, read_reward_model
from rlhf_pipeline.models.sharing import shared
from rlhf_pipeline.registry.adapters import chain_of
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import Role, check_role
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.optimizer import require_schedule
from rlhf_pipeline.training.windows import Window, example_windows, total_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

C = TypeVar("C", bound=TrainingConfig | CollectConfig)


def find_model(
    registry: Registry,
    text: str,
    role: Role,
    *,
    revision: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Resolved:
    """Resolve a reference, and check that its model plays `role` and that its files match its manifest.

    Raises:
        UnknownReference, MismatchError, DamagedFile.
    """
    resolved = registry.resolve(text, revision=revision)
    say(resolved.taken)
    check_role(resolved, role)
    below, adapters = chain_of(resolved)
    for part in (*adapters, below):
        verify_files(part)
    if adapters:
        say(f"{resolved.label} is an adapter on {' on '.join(part.label for part in (*adapters[-2::-1], below))}")
    return resolved


def find_base(run: Run, config: TrainingConfig) -> Resolved:
    """Find the language model that a stage starts from."""
    assert config.model_name_or_path is not None  # `check_model` of the config
    revision, say = config.model_revision, run.log.say
    return find_model(run.registry, config.model_name_or_path, "policy", revision=revision, say=say)


def tokenizer_of(
    resolved: Resolved, trust_remote_code: bool = False, config: HasTemplate | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer stored with a model, with the chat template, the EOS and the stop token that a config gives it.

    An adapter without a tokenizer has that of its base. Without a stop token in the config, that of the model's own
    config is used.

    Raises:
        ConfigError: a token of the config is not one token. MismatchError: that of the model's config is not.
    """
    if resolved.base is not None and not (Path(resolved.location) / "tokenizer_config.json").is_file():
        return tokenizer_of(resolved.base, trust_remote_code, config)
    eos = None if config is None else config.eos_token
    tokenizer = load_tokenizer(resolved.location, resolved.revision, trust_remote_code, eos_token=eos)
    trained = resolved.config.get("stop_token")
    if trained is not None and trained not in tokenizer.get_vocab():
        raise MismatchError(
            f"{resolved.label}: its manifest.json names the stop token {trained!r}; expected a token of its tokenizer"
        )
    set_stop_token(tokenizer, (config.stop_token if config is not None else None) or trained)
    return tokenizer if config is None else apply_template_keys(tokenizer, config)


def loading_options(config: ModelConfig) -> dict[str, Any]:
    """The options of a config for loading a model's files."""
    return {key: getattr(config, key) for key in ("dtype", "attn_implementation", "trust_remote_code")}


def training_options(config: ModelConfig) -> dict[str, Any]:
    """The options of `load_adapted` for a model that is trained: whole, or below a new adapter."""
    if isinstance(config, TrainingConfig) and config.use_peft:
        return {"four_bits": FourBits.of(config)}
    return {"merged": True}


def load_language_model(
    resolved: Resolved, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, **options
) -> PreTrainedModel:
    """Load a causal language model with the options of a config; `options` may be those of `load_adapted` too."""
    return load_adapted(load_causal_lm, resolved, **loading_options(config), tokenizer=tokenizer, **options)


def load_policy(
    resolved: Resolved,
    config: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    temperature: float = 1.0,
    frozen: bool = False,
    **options,
) -> Policy:
    """Load a policy onto a device and choose its reader; `frozen` disables its gradients.

    Within `sharing_models`, frozen policies of one model share its weights, also at different temperatures.
    """
    if not frozen:
        model = onto(device, load_language_model(resolved, config, tokenizer, **training_options(config), **options))
        if not options.get("dropout"):
            require_no_noise(model)
        return policy_to_train(model, config, resolved.label, temperature)

    def load() -> Policy:
        return frozen_policy(onto(device, load_language_model(resolved, config, tokenizer, **options)), temperature)

    read_as = (tokenizer_digest(tokenizer), *sorted(options.items()))
    found = shared(("policy", *_identity(resolved, config, device), *read_as), load)
    return Policy(found.model, found.reader, temperature, entropy=False).eval()


def policy_to_train(model: PreTrainedModel, config: ModelConfig, parent: str, temperature: float = 1.0) -> Policy:
    """A policy that is trained: all weights, or with `use_peft` a new adapter on them; `parent` names the model."""
    if isinstance(config, TrainingConfig) and config.use_peft:
        add_adapter(model, config, parent)
    return Policy(model, inspect_model(model), temperature).train()


def frozen_policy(model: PreTrainedModel, temperature: float = 1.0) -> Policy:
    """A policy that is only read."""
    return Policy(model, inspect_model(model), temperature, entropy=False).eval().requires_grad_(False)


def load_reward_model(
    resolved: Resolved, config: ModelConfig, device: torch.device, below: PreTrainedModel | None = None
) -> RewardModel:
    """Load a frozen reward model onto a device; within `sharing_models` it is loaded once.

    below: the base of the reward model in memory, whose weights it uses.
    """
    if below is not None:
        return read_reward_model(classifier_on(below, resolved)).eval().requires_grad_(False)

    def load() -> RewardModel:
        model = load_adapted(load_sequence_classifier, resolved, **loading_options(config))
        return read_reward_model(onto(device, model)).eval().requires_grad_(False)

    return shared(("reward model", *_identity(resolved, config, device)), load)


def load_classifier(resolved: Resolved, config: ModelConfig, device: torch.device) -> PreTrainedModel:
    """Load a frozen sequence classifier that is read by its own forward pass.

    Raises:
        MismatchError: its scores are not its own logits, since it was trained on the mean of the hidden states.
    """

    def load() -> PreTrainedModel:
        model = load_sequence_classifier(resolved.location, revision=resolved.revision, **loading_options(config))
        if getattr(model.config, "score_pooling", None) == "mean":
            raise MismatchError(
                f"{resolved.label}: found score_pooling mean, which plain transformers cannot compute; expected a "
                "reward model that reads the last token, or reward_tokenization: ids"
            )
        return onto(device, model).eval().requires_grad_(False)

    return shared(("classifier", *_identity(resolved, config, device)), load)


def _identity(resolved: Resolved, config: ModelConfig, device: torch.device) -> tuple[Any, ...]:
    """A key of the loaded weights: the model, the options for loading and the device."""
    return (resolved.location, resolved.revision, resolved.identity, *loading_options(config).values(), str(device))


def onto(device: torch.device, model: PreTrainedModel) -> PreTrainedModel:
    """Move a model to a device."""
    return model.to(device)  # type: ignore[arg-type]  # transformers' wrapper hides that it is a method


def require_same_tokenizer(
    policy: Resolved, other: Resolved, tokenizer: PreTrainedTokenizerBase, trust_remote_code: bool = False
) -> None:
    """Check that a reward model or reference has the policy's tokenizer; their PAD may differ.

    Raises:
        MismatchError: the tokenizers differ; the message names both models.
    """
    theirs = tokenizer_of(other, trust_remote_code)
    if not same_but_for_pad(tokenizer, theirs):
        found, expected = (tokenizer_digest(one)[:12] for one in (theirs, tokenizer))
        raise MismatchError(
            f"{other.label}: found tokenizer {found}, expected {expected} of the policy {policy.label}; "
            "use models that come from one SFT model"
        )


def packed_rows(config: TrainingConfig, examples: Sequence[Example]) -> list[list[int]] | None:
    """The examples of each row, by number, if the config packs them; else None."""
    if not isinstance(config, SftConfig) or not config.packing:
        return None
    return fill_rows(tree_lengths(examples), config.lengths().total)


def example_schedule(
    run: Run, examples: Sequence[Example], *, layout: Layout
) -> tuple[Callable[[Any, int], Iterator[Window]], int]:
    """The windows of a stage that trains on fixed examples, and the number of updates.

    Raises:
        ConfigError: the schedule of the learning rate does not fit that number.
    """
    config, ranks = run.config, run.accelerator.num_processes
    size = config.per_device_train_batch_size * config.gradient_accumulation_steps * run.shares
    bins, room = packed_rows(config, examples), config.lengths().total
    if bins is not None:
        run.log.say(f"packing: {len(examples)} examples in {len(bins)} rows of up to {room} tokens")
    total = total_steps(len(examples if bins is None else bins), size, config.num_train_epochs, config.max_steps)
    require_schedule(config, total)

    def windows(_prepared: Any, start: int) -> Iterator[Window]:
        return example_windows(
            examples,
            steps=total,
            micro_batch_size=config.per_device_train_batch_size,
            micro_batch_tokens=config.micro_batch_tokens,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            layout=layout,
            start=start,
            rank=run.accelerator.process_index,
            world_size=ranks,
            shares=run.shares,
            device=run.device,
            bins=bins,
            bin_tokens=room,
        )

    return windows, total
