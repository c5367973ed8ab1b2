"""Keys of `rlhf ppo` that change a score before it is a reward."""

from __future__ import annotations

from rlhf_pipeline.config.base import Keys, NonNegative, Positive, option


class WithShapedScores(Keys):
    """A config whose scores can be scaled and clipped, and lowered for length and for a missing end."""

    reward_scale: Positive = option(
        1.0,
        "factor c of every score, before clip and penalties; the optimum at kl_coef b is that of the score itself at "
        "b / c (ours: 1)",
        moves_optimum=True,
    )
    normalize_rewards: bool = option(
        False,
        "subtract the mean of all scores of the run so far, and divide by their standard deviation, before "
        "reward_scale, clip and penalties; kl_coef then acts like kl_coef x the deviation (ours: off)",
        moves_optimum=True,
    )

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

    @property
    def rescales(self) -> bool:
        """Whether beta has another unit than the reward source's own scores."""
        return self.normalize_rewards or self.reward_scale != 1
