"""What a point of growth.py is measured with: models with random weights, made-up tokens, and steps that are timed.

The package's own windows, packing, step functions and loop; no command line and no run around them.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from bench_probe import Stopwatch
from bench_work import LEARNING_RATE, LLAMA, SEED
from growth_sizes import Sizes

from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.loading import model_of_config, new_config
from rlhf_pipeline.models.roles import Policy, RewardModel
from rlhf_pipeline.models.selfcheck import inspect_model, read_reward_model
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.loop import fit
from rlhf_pipeline.training.optimizer import make_optimizer, make_scheduler
from rlhf_pipeline.training.pairs import count_pairs
from rlhf_pipeline.training.windows import Loss, Window, example_windows

PAD = 0
FP32 = 4
Row = dict[str, Any]


def draw_examples(count: int, prompt: int, completions: Sequence[int], vocab_size: int) -> list[Example]:
    """Examples of arbitrary tokens, all with the same lengths."""
    draw = torch.Generator().manual_seed(SEED)

    def tokens(length: int) -> list[int]:
        return torch.randint(1, vocab_size, (length,), generator=draw).tolist()

    return [
        Example(tokens(prompt), [tokens(n) for n in completions], [True] * len(completions), str(i), f"example {i}")
        for i in range(count)
    ]


def draw_pairs(count: int, length: int, vocab_size: int) -> list[Example]:
    """Pairs with prompt : chosen : rejected = 2 : 1 : 1."""
    return draw_examples(count, length // 2, (length // 4, length // 4), vocab_size)


def _config(changes: dict[str, Any], vocab_size: int, longest: int) -> Any:
    """The config of bench_work.LLAMA with changes, and enough positions."""
    positions = max(longest, LLAMA["max_position_embeddings"])
    torch.manual_seed(SEED)
    return new_config({**LLAMA, **changes, "vocab_size": vocab_size, "max_position_embeddings": positions})


def make_policy(changes: dict[str, Any], vocab_size: int, longest: int) -> Policy:
    """A policy with random weights. changes: keys over those of bench_work.LLAMA; longest: sequence, in tokens."""
    model = model_of_config(_config(changes, vocab_size, longest), dtype=torch.float32)
    return Policy(model, inspect_model(model)).train()


def make_reward_model(changes: dict[str, Any], vocab_size: int, longest: int) -> RewardModel:
    """A reward model with random weights; arguments as of `make_policy`."""
    from transformers import AutoModelForSequenceClassification

    config = _config(changes, vocab_size, longest)
    config.num_labels, config.pad_token_id = 1, PAD
    return read_reward_model(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)).train()


def give_back() -> None:
    """Return freed memory to the system (glibc): what is resident then is what is in use."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def tensor_peak(run: Callable[[], Any]) -> int:
    """The most bytes of new tensors that are there at a time while `run` runs (on a CPU)."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    # What was there before does not appear when it is freed.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())), default=0)


def describe_window(shape: ModelShape, window: Window) -> dict[str, Any]:
    """Tokens of a window, those that are predicted, and what share of its FLOPs each part of the model has."""
    batches = [micro_batch.batch for micro_batch in window.micro_batches]
    tokens, predicted, context = (
        sum(getattr(batch, name) for batch in batches) for name in ("active_tokens", "num_tokens", "context_tokens")
    )
    total = sum(map(shape.batch_flops, batches))
    parts = {"attention": shape.forward_flops(0, context, 0), "head": shape.forward_flops(0, 0, predicted)}
    shares = {name: part / total for name, part in parts.items()}
    return {"tokens": tokens, "predicted": predicted, "shares": shares, "layout": batches[0].layout}


def timed(
    sizes: Sizes,
    model: Policy | RewardModel,
    examples: Sequence[Example],
    step: Callable[..., Loss],
    *,
    units: int,
    micro_batch: int,
    accumulation: int = 1,
    head: bool = True,
    tensors: bool = False,
) -> Row:
    """Train on examples until enough steps are timed.

    Args:
        step: called with a meter and a shape besides (model, micro-batch). units: what a step's time is divided by.
        head: whether the model has an output head. tensors: take one more step, for `tensor_bytes`.

    Returns:
        seconds of each timed step; of a step its units, FLOPs, and tokens and shares of FLOPs of the first;
        beyond_bytes: peak resident memory above that after the first step, when weights, gradients and AdamW's state
        are in memory (None where the system does not say); tensor_bytes: the same of tensors alone, without what the
        allocator keeps.
    """
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    meter, shape = CostMeter(), ModelShape.of(model.model, head=head)
    optimizer = make_optimizer(model.parameters(), learning_rate=LEARNING_RATE)
    steps = 1 + sizes.warmup + sizes.most
    scheduler = make_scheduler(optimizer, "linear", warmup_steps=0, total=steps)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    watch = Stopwatch(warmup=sizes.warmup, examples=units)
    about: dict[str, Any] = {}

    draw = functools.partial(
        example_windows,
        examples,
        micro_batch_size=micro_batch,
        accumulation=accumulation,
        seed=SEED,
        pad_id=PAD,
        layout=model.reader.layout,
        count=count_pairs,
    )

    def windows() -> Iterator[Window]:
        for window in draw(steps=steps):
            about.update(about or describe_window(shape, window))
            yield window
            times = watch.times[sizes.warmup :]
            if len(times) > sizes.least and times[-1] - times[0] >= sizes.seconds:
                return

    def updated(number: int, _metrics: dict[str, float], _window: Window) -> None:
        if number == 1:
            give_back()
            watch.ready(optimizer)
        else:
            watch.tick(meter.flops)

    train = functools.partial(
        fit,
        prepared,
        step=functools.partial(step, meter=meter, shape=shape),
        optimizer=optimizer,
        scheduler=scheduler,
        accelerator=accelerator,
        max_grad_norm=1.0,
    )
    train(windows(), on_update=updated)
    report = watch.report("ours", "", False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if tensors:
        optimizer.zero_grad(set_to_none=True)
        peak = tensor_peak(lambda: train(draw(steps=1), on_update=lambda *_: None))
        about["tensor_bytes"] = peak - FP32 * parameters  # of which the gradients are no part
    loaded = report["loaded_bytes"]
    return {
        "seconds": report["seconds"],
        "units": units,
        "flops": report["flops"] / report["steps"],
        **about,
        "parameters": parameters,
        "resident_bytes": loaded,
        "beyond_bytes": None if loaded is None else report["training_peak_bytes"] - loaded,
        "threads": report["threads"],
        "load": report["load"],
        "versions": report["versions"],
    }
