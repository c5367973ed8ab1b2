"""The judge of a run of PPO: found, loaded, and checked to be another than what the policy is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.stages.gate import repeat_gates
from rlhf_pipeline.stages.rewards import LoadedReward, load_reward
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.judge import Judge
from rlhf_pipeline.training.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BELIEVE = "what it says of the policy says little"


def load_judge(
    run: Run, rewards: Sequence[LoadedReward], policy: Resolved, tokenizer: PreTrainedTokenizerBase
) -> tuple[Judge | None, Resolved | None]:
    """The judge that the config names and the model behind it, if there is one; its faults are said.

    Raises:
        MismatchError: it is one of the rewards, under whatever name, or cannot read the policy's tokens.
    """
    config = run.config
    if config.judge is None:
        return None, None
    judge = load_reward(run.registry, config.judge, config, policy, tokenizer, run.device)
    for reward in rewards:
        if _is_same(judge, reward):
            raise MismatchError(
                f"judge {config.judge!r} is {_name(judge)}, and the policy is trained on {_name(reward)}, which is the "
                "same; expected a judge that the policy is not trained on: train a reward model on other pairs "
                "(rlhf train-rm dataset_train_split=judge), or remove judge"
            )
    say = run.log.say
    if judge.resolved is not None:
        repeat_gates([judge.resolved], say, what="judge", believe=BELIEVE)
        for reward in rewards:
            theirs = _pairs_of(reward.resolved)
            shared = sorted({where for digest, where in _pairs_of(judge.resolved).items() if digest in theirs})
            if shared:
                both = f"judge {judge.source.label} and reward model {reward.source.label}"
                why = f"were trained on the same pairs ({', '.join(shared)}), so they share errors"
                say(f"WARNING: {both} {why}; a judge should be held out", style="yellow")
    say(f"judge: {judge.source.label} scores the rollouts that are logged, and nothing is trained on it")
    shape = None if judge.model is None else ModelShape.of(judge.model.model, head=False)
    return Judge(judge.source, shape, config.logging_steps), judge.resolved


def _is_same(judge: LoadedReward, reward: LoadedReward) -> bool:
    """Whether two sources are one: models by their weights, where those are known, else by where they come from."""
    if judge.resolved is None or reward.resolved is None:
        return judge.resolved is reward.resolved and judge.source.label == reward.source.label
    ours, theirs = judge.resolved, reward.resolved
    if ours.digest is not None and theirs.digest is not None:
        return ours.digest == theirs.digest
    return (ours.location, ours.revision) == (theirs.location, theirs.revision)


def _name(loaded: LoadedReward) -> str:
    """Its label, with the digest of a model."""
    digest = loaded.resolved.digest if loaded.resolved is not None else None
    return f"{loaded.source.label} {digest[:12]}" if digest else loaded.source.label


def _pairs_of(model: Resolved | None) -> dict[str, str]:
    """Digest -> source of the pairs that a model was trained on, as far as that is known."""
    if model is None or model.manifest is None:
        return {}
    return {entry.digest: f"{entry.source} [{entry.split}]" for entry in model.manifest.data}
