"""Load the reward sources that a config names: rewards, labellers, and the judge of a PPO run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from rlhf_pipeline.config.adapter import FourBits
from rlhf_pipeline.config.collect import SamplingConfig
from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.config.reward_names import PEOPLE_PREFIX, WORLD_NAMES, is_function_name, load_function
from rlhf_pipeline.config.rewards import LlmJudge
from rlhf_pipeline.config.stages import RewardConfigs
from rlhf_pipeline.data import world
from rlhf_pipeline.data.tokenizers import chat_template_digest, load_any_tokenizer
from rlhf_pipeline.errors import ConfigError, Fault, MismatchError
from rlhf_pipeline.models.modules import RewardModel
from rlhf_pipeline.registry.adapters import require_same_base
from rlhf_pipeline.registry.lengths import positions_of, require_positions
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.functions import FunctionReward
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.rollout.llm_judge import RatingReward
from rlhf_pipeline.rollout.rewards import CombinedReward, ModelReward, RewardSource, WorldReward
from rlhf_pipeline.rollout.text_reward import Form, TextReward
from rlhf_pipeline.stages.common import (
    find_model,
    load_classifier,
    load_reward_model,
    require_same_tokenizer,
    tokenizer_of,
)
from rlhf_pipeline.stages.gate import repeat_gates
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.ppo_rollouts import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BELIEVE_JUDGE = "its scores of the policy mean little"


@dataclass(frozen=True)
class LoadedReward:
    """A reward source, its model's reference if it has a model, and the model if it reads the policy's token ids."""

    source: RewardSource
    resolved: Resolved | None = None
    model: RewardModel | None = None
    say: Callable[[str], None] = lambda text: None

    @cached_property
    def scorer(self) -> RewardSource:
        """The source on its own: a response that it does not apply to has the score 0, which is logged once."""
        return CombinedReward(((1.0, self.source),), say=self.say) if self.source.skips else self.source


def load_reward(
    registry: Registry,
    text: str,
    config: RewardConfigs,
    policy: Resolved | None,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    below: PreTrainedModel | None = None,
    *,
    loads_on: torch.device | None = None,
    llm_judge: LlmJudge | None = None,
    say: Callable[[str], None] = lambda text: None,
    bill: Callable[[float], None] = lambda flops: None,
) -> LoadedReward:
    """Load one source: "world", module:function, a reference to a reward model, or a language model.

    Args:
        policy: None for a policy from random weights, which only the world and functions can score.
        below: the policy without the adapter that is trained; a reward model uses its weights (`shared_base`).
        loads_on: where a reward model that reads token ids is loaded, if not on the device.
        llm_judge: the language model that rates the responses; `text` is its label.
        say: logs a line. bill: receives the FLOPs of a reward model that reads text, as it computes them.

    Raises:
        MismatchError: the world cannot score this policy's vocabulary, the reference is not a reward model, or the
            reward model has another tokenizer.
    """
    if llm_judge is not None:
        return LoadedReward(RatingReward(text, ChatModel.of(llm_judge, registry.home), tokenizer), say=say)
    if text in WORLD_NAMES:
        if not world.is_world_tokenizer(tokenizer):
            whose = policy.label if policy is not None else "a new model"
            raise MismatchError(
                f"reward 'world': found the tokenizer of {whose} with {len(tokenizer)} tokens, expected that of "
                f"{world.NAME}; the world's true reward can score only its own words"
            )
        return LoadedReward(WorldReward())
    if text.startswith(PEOPLE_PREFIX):
        expected = "world, a reward model, or module:function: people only label data (rlhf data collect)"
        raise ConfigError(Fault(text, "no scorer of responses", expected))
    if is_function_name(text):
        return LoadedReward(FunctionReward(text, load_function(text), tokenizer), say=say)
    resolved = find_model(registry, text, "reward_model")
    assert policy is not None  # `check_selection` of the config
    form = form_of(resolved, config, policy, tokenizer)
    if form is not None:
        source = _text_reward(resolved, form, config, tokenizer, device, say, bill)
        say(source.reads)
        return LoadedReward(source, resolved)
    _require_positions(config, resolved)
    if below is not None:
        require_same_base(policy, resolved, FourBits.of(config) if isinstance(config, PpoConfig) else None)
    model = load_reward_model(resolved, config, loads_on or device, below)
    return LoadedReward(ModelReward(resolved.label, model, device), resolved, model)


def _require_positions(config: RewardConfigs, model: Resolved) -> None:
    """Check the positions of a reward model that reads the policy's tokens; evaluations check their own lengths."""
    if isinstance(config, PpoConfig | SamplingConfig):
        require_positions(config, model)


def refused_critic(model: Resolved) -> ConfigError:
    """The error of a critic that would start from a reward model that reads text."""
    found = f"found 'reward_model', but {model.label} has another tokenizer and reads the responses as text"
    fault = Fault("value_init", found, "sft or shared: the critic reads the policy's tokens", "set value_init: sft")
    return ConfigError(fault)


def check_reward_models(config: RewardConfigs, policy: Resolved, models: Mapping[str, Resolved]) -> None:
    """Check, without loading weights, that reward models (by role) can read the responses of a policy.

    Raises:
        MismatchError, ConfigError: what `load_reward` and PPO would refuse.
    """
    tokenizer = tokenizer_of(policy, config.trust_remote_code, config)
    forms = {role: form_of(model, config, policy, tokenizer) for role, model in models.items()}
    for role, form in forms.items():
        if form is None:
            _require_positions(config, models[role])
    if isinstance(config, PpoConfig) and config.value_init == "reward_model" and forms["reward_model"] is not None:
        raise refused_critic(models["reward_model"])


def form_of(
    resolved: Resolved, config: RewardConfigs, policy: Resolved, tokenizer: PreTrainedTokenizerBase
) -> Form | None:
    """The form in which a reward model reads text, by `reward_tokenization`; None if it reads the policy's token ids.

    Raises:
        MismatchError: the tokenizers differ, and text was not asked for or the model is of the registry; or `chat`
            was asked for and there is no chat template.
    """
    how, trust = config.reward_tokenization, config.trust_remote_code
    theirs = load_any_tokenizer(resolved.location, resolved.revision, trust)
    template = chat_template_digest(theirs)
    if how == "chat" and template is None:
        raise MismatchError(
            f"{resolved.label}: found no chat template, expected one with reward_tokenization chat; "
            "set reward_tokenization: text"
        )
    if how in ("auto", "ids"):
        foreign = how == "auto" and resolved.manifest is None
        own_template = template not in (None, chat_template_digest(tokenizer))
        encoder = theirs.eos_token_id is None  # an encoder's tokenizer
        try:
            if not (foreign and (encoder or own_template)):
                require_same_tokenizer(policy, resolved, tokenizer, trust)
                return None
        except MismatchError as error:
            if not foreign:
                raise MismatchError(f"{error}, or set reward_tokenization: text (or chat)") from None
    if how != "text" and template is not None:
        return "chat"
    separates = theirs.num_special_tokens_to_add(pair=True) > theirs.num_special_tokens_to_add(pair=False)
    return "pair" if separates else "plain"


def _text_reward(
    resolved: Resolved,
    form: Form,
    config: RewardConfigs,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    say: Callable[[str], None],
    bill: Callable[[float], None],
) -> TextReward:
    """A reward model that reads decoded responses."""
    model = load_classifier(resolved, config, device)
    theirs = load_any_tokenizer(resolved.location, resolved.revision, config.trust_remote_code)
    theirs.truncation_side = "left"
    shape = ModelShape.of(model, head=False)
    limits = [
        limit
        for limit in (positions_of(resolved), theirs.model_max_length)
        if limit is not None and 0 < limit < 1 << 31
    ]

    def count(lengths: Sequence[int]) -> None:
        # The tokens of an encoder see the whole input, those of a decoder only what is before them.
        context = sum(n * n if form == "pair" else n * (n + 1) // 2 for n in lengths)
        bill(shape.forward_flops(sum(lengths), context, 0))

    longest = min(limits, default=None)
    return TextReward(resolved.label, model, theirs, tokenizer, form, device, longest, say, count)


def load_judge(
    run: Run[PpoConfig], rewards: Sequence[LoadedReward], policy: Resolved, tokenizer: PreTrainedTokenizerBase
) -> tuple[Judge | None, Resolved | None]:
    """Load the judge that the config names, with its model if it has one, and log warnings about it.

    Raises:
        MismatchError: the judge is one of the rewards, under any name, or cannot read the policy's tokens.
    """
    config = run.config
    if config.judge is None:
        return None, None
    say, meter = run.log.say, run.meter
    judge = load_reward(
        run.registry, config.judge, config, policy, tokenizer, run.device, say=say, bill=meter.count_judge
    )
    for reward in rewards:
        if _is_same(judge, reward):
            raise MismatchError(
                f"judge {config.judge!r}: found {_name(judge)}, the same as the training reward {_name(reward)}; "
                "expected a judge that the policy is not trained on; train a reward model on other pairs "
                "(rlhf train-rm dataset_train_split=judge), or remove judge"
            )
    if judge.resolved is not None:
        repeat_gates([judge.resolved], say, what="judge", believe=BELIEVE_JUDGE)
        for reward in rewards:
            theirs = _pairs_of(reward.resolved)
            shared = sorted({where for digest, where in _pairs_of(judge.resolved).items() if digest in theirs})
            if shared:
                both = f"judge {judge.source.label} and reward model {reward.source.label}"
                why = f"were trained on the same pairs ({', '.join(shared)}), so they share errors"
                say(f"WARNING: {both} {why}; a judge should be held out", style="yellow")
    say(f"judge: {judge.source.label} scores the logged rollouts; nothing is trained on it")
    shape = None if judge.model is None else ModelShape.of(judge.model.model, head=False)
    return Judge(judge.scorer, shape), judge.resolved


def _is_same(judge: LoadedReward, reward: LoadedReward) -> bool:
    """Whether two sources are the same; models compare by their digests if known, otherwise by location."""
    if judge.resolved is None or reward.resolved is None:
        return judge.resolved is reward.resolved and judge.source.label == reward.source.label
    ours, theirs = judge.resolved, reward.resolved
    if ours.digest is not None and theirs.digest is not None:
        return ours.digest == theirs.digest
    return (ours.location, ours.revision) == (theirs.location, theirs.revision)


def _name(loaded: LoadedReward) -> str:
    """The label of a source, with the digest of its model if known."""
    digest = loaded.resolved.digest if loaded.resolved is not None else None
    return f"{loaded.source.label} {digest[:12]}" if digest else loaded.source.label


def _pairs_of(model: Resolved | None) -> dict[str, str]:
    """The data that a model was trained on, digest -> source; {} if unknown."""
    if model is None or model.manifest is None:
        return {}
    return {entry.digest: f"{entry.source} [{entry.split}]" for entry in model.manifest.data}
