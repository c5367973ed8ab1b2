"""Choose an SFT model by the reward of its samples (`select_by: reward`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.data.tokenizers import stop_ids
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.rollout.responses import sample_for_prompts
from rlhf_pipeline.rollout.rewards import RewardSource
from rlhf_pipeline.rollout.scoring import score
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.stages.reward_sources import load_reward
from rlhf_pipeline.training.open_run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 7_919  # of the draws: other numbers than those of the run
MEASURED = {"reward": "eval_reward", "length": "eval_response_length"}


@dataclass(frozen=True)
class Selection:
    """The held-out prompts, and the reward that a policy's responses to them get.

    resolved: the reward model; None for a function or the world.
    """

    run: Run
    policy: Policy
    prompts: Sequence[Example]
    reward: RewardSource
    stops: Sequence[int]
    resolved: Resolved | None

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Mean reward and tokens of one response to each prompt, at temperature 1, always with the same random numbers.

        Source: Ouyang et al. 2022 (InstructGPT), section 3.5: the SFT model is chosen by the reward-model score on the
        validation set, because it overfits on the validation loss after one epoch.
        """
        config = self.run.config
        assert isinstance(config, SftConfig)
        at_once: dict[str, Any] = {"responses_at_once": config.per_device_eval_batch_size, "memory": self.run.memory}
        sampled, _ = sample_for_prompts(
            self.policy,
            self.prompts,
            samples=1,
            response_length=config.sampled_lengths().response,
            stop_ids=self.stops,
            generator=torch.Generator().manual_seed(config.seed * 1_000_003 + SEED),
            device=self.run.device,
            **at_once,
        )
        rewards = score(self.reward.score, sampled, **at_once).double()
        lengths = [len(example.completions[0]) for example in sampled]
        return {MEASURED["reward"]: float(rewards.mean()), MEASURED["length"]: sum(lengths) / len(lengths)}


def selection_of(
    run: Run, policy: Policy, data: StageData, parent: Resolved | None, tokenizer: PreTrainedTokenizerBase
) -> Selection | None:
    """The selection of a config; None if it is by the loss.

    Raises:
        ConfigError: the split has no prompts, or what `load_reward` raises.
    """
    config = run.config
    assert isinstance(config, SftConfig)
    if config.select_by != "reward" or config.select_reward is None:
        return None
    prompts, _ = data.split("prompt", config.dataset_test_split, tokenizer, limit=config.select_prompts, required=False)
    if not prompts:
        found = f"the split {config.dataset_test_split!r} has no prompts to sample responses to"
        raise ConfigError(Fault("select_by", found, "a dataset_test_split with prompts"))
    loaded = load_reward(run.registry, config.select_reward, config, parent, tokenizer, run.device, say=run.log.say)
    run.log.say(f"select_by: {loaded.scorer.label} on one response to each of {len(prompts)} held-out prompts")
    return Selection(run, policy, prompts, loaded.scorer, stop_ids(tokenizer), loaded.resolved)
