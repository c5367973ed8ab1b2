"""`engine: trl`: the same run with TRL's own trainer, as a check of the native loop."""

from rlhf_pipeline.training.trl_engine.train import train_with_trl

__all__ = ["train_with_trl"]
