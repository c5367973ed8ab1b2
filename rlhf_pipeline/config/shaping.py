"""Keys of `rlhf ppo` that change a score before it is a reward."""

from __future__ import annotations

from rlhf_pipeline.config.base import Keys, NonNegative, Positive, option


class WithShapedScores(Keys):
    """A config whose scores can be clipped, and lowered for length and for a missing end."""

    missing_eos_penalty: NonNegative | None = option(
        None, "penalty subtracted from the score of a cut response (TRL: none)", moves_optimum=True
    )
    reward_clip: Positive | None = option(
        None,
        "limit of a score: it is clipped to -reward_clip .. reward_clip, before penalties (TRL: none)",
        moves_optimum=True,
    )
    length_penalty: NonNegative | None = option(
        None, "penalty subtracted from the score for each token of a response (ours: none)", moves_optimum=True
    )
