"""The judge of a PPO run: a reward source that scores the rollouts and does not affect training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.rollout.rewards import RewardSource
from rlhf_pipeline.training.cost import CostMeter, ModelShape


@dataclass(frozen=True)
class Judge:
    """A reward source that nothing is trained on.

    shape: the shape of its model, for its own cost; None for a function. every: it scores every `every`-th update.
    """

    source: RewardSource
    shape: ModelShape | None
    every: int

    @torch.no_grad()
    def look(
        self,
        sampled: Sequence[Example],
        rows: Iterable[Sequence[int]],
        packed: Iterable[PackedBatch],
        meter: CostMeter,
        reduce: Callable[[Tensor], Tensor],
    ) -> dict[str, float]:
        """Mean and standard deviation of the judge's scores over the responses of a rollout, on all ranks.

        Args:
            sampled: C responses. rows: for each batch of `packed`, the indices of its responses in `sampled`.
        """
        sums = []
        for members, batch in zip(rows, packed, strict=True):
            scores = self.source.score([sampled[i] for i in members], batch).cpu().double()
            flops = 0.0 if self.shape is None else self.shape.batch_flops(batch)
            added = torch.tensor([len(scores), scores.sum(), (scores**2).sum(), flops], dtype=torch.float64)
            sums.append(added.to(batch.lengths.device))
        count, total, square, flops = reduce(torch.stack(sums).sum(0)).tolist()
        meter.judge_flops += flops
        mean = total / count
        return {"objective/judge": mean, "objective/judge_std": max(square / count - mean**2, 0.0) ** 0.5}
