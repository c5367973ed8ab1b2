"""Running mean and standard deviation of numbers that come in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Count, mean and standard deviation (of the population) of the numbers so far."""

    count: float = 0.0
    mean: float = 0.0
    std: float = 0.0

    @staticmethod
    def of(values: Tensor, reduce: Callable[[Tensor], Tensor] = lambda sums: sums) -> Moments:
        """The moments of values (C,) on all processes together; reduce: sums over them."""
        values = values.double()
        count, total = reduce(torch.stack([torch.ones_like(values).sum(), values.sum()])).tolist()
        mean = total / count
        (square,) = reduce(((values - mean) ** 2).sum()[None]).tolist()
        return Moments(count, mean, (square / count) ** 0.5)

    def merged(self, more: Moments) -> Moments:
        """The moments of both sets of numbers together.

            n = n1 + n2        m = m1 + (m2 - m1) n2 / n        n s^2 = n1 s1^2 + n2 s2^2 + (m2 - m1)^2 n1 n2 / n

        Source: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1.
        """
        count, step = self.count + more.count, more.mean - self.mean
        square = self.count * self.std**2 + more.count * more.std**2 + step**2 * self.count * more.count / count
        return Moments(count, self.mean + step * more.count / count, (square / count) ** 0.5)
