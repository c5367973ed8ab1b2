"""The watches of each stage. docs/health.md lists them: condition, usual meaning, what to change."""

from rlhf_pipeline.health.examples import DPO, REWARD, SFT
from rlhf_pipeline.health.ppo import PPO
from rlhf_pipeline.health.weights import WEIGHTS_STUCK

WATCHES = {
    stage: (*watches, WEIGHTS_STUCK)
    for stage, watches in {"sft": SFT, "reward": REWARD, "ppo": PPO, "dpo": DPO}.items()
}
