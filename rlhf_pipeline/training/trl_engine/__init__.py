"""`engine: trl`: the same run on TRL's own trainer, to check the native loop against."""

from rlhf_pipeline.training.trl_engine.train import train_with_trl

__all__ = ["train_with_trl"]
