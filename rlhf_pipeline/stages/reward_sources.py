"""Load the reward sources that a config names: rewards, labellers, and the judge of a PPO run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.config.reward_names import WORLD_NAMES, is_function_name, load_function
from rlhf_pipeline.config.stages import ModelConfig
from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import FILLER
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.models.modules import RewardModel
from rlhf_pipeline.registry.adapters import require_same_base
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.rewards import FunctionReward, ModelReward, RewardSource, WorldReward
from rlhf_pipeline.stages.common import find_model, load_reward_model, require_same_tokenizer
from rlhf_pipeline.stages.gate import repeat_gates
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.ppo_rollouts import Judge

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BELIEVE_JUDGE = "its scores of the policy mean little"


@dataclass(frozen=True)
class LoadedReward:
    """A reward source, and its registered model if it has one."""

    source: RewardSource
    resolved: Resolved | None = None
    model: RewardModel | None = None


@dataclass(frozen=True)
class LoadedModel(LoadedReward):
    """A reward model as a source."""

    resolved: Resolved
    model: RewardModel


def load_reward(
    registry: Registry,
    text: str,
    config: ModelConfig,
    policy: Resolved,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    below: PreTrainedModel | None = None,
) -> LoadedReward:
    """Load one source: "world", module:function, or a reference to a reward model.

    below: the policy without the adapter that is trained; a reward model uses its weights (`shared_base`).

    Raises:
        MismatchError: the world cannot score this policy's vocabulary, the reference is not a reward model, or the
            reward model has another tokenizer.
    """
    if text in WORLD_NAMES:
        if not world.is_world_tokenizer(tokenizer):
            raise MismatchError(
                f"reward 'world': found the tokenizer of {policy.label} with {len(tokenizer)} tokens, expected that of "
                f"{world.NAME}; the world's true reward can score only its own words"
            )
        return LoadedReward(WorldReward())
    if is_function_name(text):
        return LoadedReward(FunctionReward(text, load_function(text), tokenizer))
    resolved = find_model(registry, text, "reward_model")
    require_same_tokenizer(policy, resolved, tokenizer, config.trust_remote_code)
    if below is not None:
        require_same_base(policy, resolved)
    model = load_reward_model(resolved, config, device, below)
    return LoadedModel(ModelReward(resolved.label, model, FILLER, device), resolved, model)


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
    judge = load_reward(run.registry, config.judge, config, policy, tokenizer, run.device)
    for reward in rewards:
        if _is_same(judge, reward):
            raise MismatchError(
                f"judge {config.judge!r}: found {_name(judge)}, the same as the training reward {_name(reward)}; "
                "expected a judge that the policy is not trained on; train a reward model on other pairs "
                "(rlhf train-rm dataset_train_split=judge), or remove judge"
            )
    say = run.log.say
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
    return Judge(judge.source, shape), judge.resolved


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
