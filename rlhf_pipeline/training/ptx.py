"""The pretraining stream of PPO-ptx: a batch of examples in each optimizer step that trains the actor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from rlhf_pipeline.training.ppo_rollouts import PpoSetup
from rlhf_pipeline.training.windows import Window, cut_micro_batches, example_windows

SEED = 2**32
"""Between the seed of the prompts' order and that of the stream's; a config's seed is below it."""


def stream_windows(setup: PpoSetup, start: int) -> Iterator[Window]:
    """Yield the batches of the stream from update `start` on; their order depends only on the seed and the step."""
    config = setup.config
    return example_windows(
        setup.stream,
        steps=config.stream_steps(config.updates),
        start=config.stream_steps(start),
        size=config.stream_batch_size,
        micro_batch_size=config.per_device_train_batch_size,
        micro_batch_tokens=config.micro_batch_tokens,
        accumulation=1,
        seed=config.seed + SEED,
        layout=setup.actor_critic.reader.layout,
        rank=setup.rank,
        world_size=setup.world_size,
        device=setup.device,
    )


def with_stream(window: Window, batch: Window) -> Window:
    """A window of PPO with a batch of the stream, whose loss is divided by the batch's own tokens on all ranks.

    The stream's micro-batches come first: gradients of divided weights are added up in the last one, which has to use
    the critic too.
    """
    first = cut_micro_batches(batch.micro_batches, window.halvings)
    counts = window.counts | {"ptx_tokens": batch.counts["tokens"]}
    return replace(window, micro_batches=[*first, *window.micro_batches], counts=counts)
