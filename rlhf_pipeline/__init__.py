"""Train a language model by RLHF (SFT, reward model, PPO) and by DPO on the same data, and compare."""

__version__ = "0.1.0"
