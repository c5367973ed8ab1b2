"""The watch of every stage on weights of 16 bits."""

from __future__ import annotations

from rlhf_pipeline.health.monitor import Facts, History, Watch


def weights_stuck(h: History, f: Facts) -> float | None:
    """Since the start, at least a third of the run ago, less than 5 % of a sample of the weights have changed.

    In fp32 nearly every weight with a gradient changes in one step of AdamW.
    """
    value = h.recent("weights/changed", 1)[0]
    return value if value < 0.05 else None


WEIGHTS_STUCK = Watch(
    "weights_stuck",
    ("weights/changed",),
    weights_stuck,
    "almost no weight has changed: bfloat16 keeps 8 bits of a weight, so a step below its 512th part rounds to nothing",
    "dtype float32 (with bf16 true for speed), or learning_rate up",
)
