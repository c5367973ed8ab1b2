"""Arms that answer with demonstrations in the context of a policy, without training it."""

from __future__ import annotations

from collections.abc import Callable

from rlhf_pipeline.config.in_context import Method
from rlhf_pipeline.evaluation.sampled import Samples
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.measure.few_shot import few_shot
from rlhf_pipeline.measure.icdpo import icdpo
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.rollout.rewards import RewardSource

METHODS: dict[Method, Callable[[Bench, Resolved, RewardSource | None], Samples]] = {
    "few_shot": few_shot,
    "icdpo": icdpo,
}


def measure_in_context(bench: Bench, arm: Resolved, scorer: RewardSource | None = None) -> Samples:
    """Sample an arm by the bench's plan, and add every known figure; `scorer` replaces the bench's.

    Figures of its own: `context_tokens`, of the demonstrations before a prompt, and `tokens_read`, all tokens that
    forward passes read for one response: demonstrations, prompt and response.

    Raises:
        ConfigError: its demonstrations are not known, do not fit, or cannot be chosen.
    """
    assert arm.method is not None
    return METHODS[arm.method](bench, arm, scorer)
