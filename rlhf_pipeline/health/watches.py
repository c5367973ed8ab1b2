"""The watches of each stage: what is seen, what it usually means, which knob to turn; docs/health.md is their list."""

from rlhf_pipeline.health.examples import DPO, REWARD, SFT
from rlhf_pipeline.health.ppo import PPO

WATCHES = {"sft": SFT, "reward": REWARD, "ppo": PPO, "dpo": DPO}
