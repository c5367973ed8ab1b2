"""Measure how time and memory grow: DPO with length, data, vocabulary, micro-batch; a reward model with completions.

    .venv/bin/python scripts/growth.py [SERIES ...] [--quick]

Prints one table per series: the median time of a unit of work, its ratio to the lowest of the series (near 1 if the
cost is linear), and the peak of resident memory above that before the timed steps. The model is a Llama with random
weights and random tokens, with the package's own windows, step functions and loop. It takes a few minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench_probe import Stopwatch
from bench_work import LEARNING_RATE, LLAMA, SEED, synthetic_pairs, write_rows

from rlhf_pipeline.config.lengths import Lengths
from rlhf_pipeline.data.load import examples_of, read_records
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import train_byte_level_bpe
from rlhf_pipeline.models.loading import model_of_config, new_config
from rlhf_pipeline.models.modules import Policy, RewardModel
from rlhf_pipeline.models.selfcheck import inspect_model, read_reward_model
from rlhf_pipeline.stages.dpo import dpo_step
from rlhf_pipeline.stages.reward import reward_step
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.loop import fit
from rlhf_pipeline.training.optimizer import make_optimizer, make_scheduler
from rlhf_pipeline.training.pairs import Criterion
from rlhf_pipeline.training.reference_cache import completion_logprob_sums
from rlhf_pipeline.training.windows import Loss, example_windows

PAD = 0
SMALL = {"hidden_size": 64, "intermediate_size": 172}  # for the vocabulary series, so that the weights stay small
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SERIES = {
    "length": ("tokens of a pair", "a token", (128, 256, 512, 1024, 2048), (16, 32)),
    "data": ("examples", "an example, from the file to token ids", (1_000, 10_000, 100_000), (40, 80)),
    "vocabulary": ("vocabulary", "a pair", (2**10, 2**12, 2**15, 2**17), (64, 128)),
    "completions": ("completions of a prompt", "a completion", (2, 4, 8, 16), (2, 4)),
    "batch": ("pairs of a micro-batch", "a pair", (1, 2, 4, 8, 16, 32, 64), (2, 4)),
}
"""The growing quantity, the unit of the time, the values, and the values with --quick."""

Times = tuple[list[float], int | None]
"""Seconds of each timed step, and the peak of memory above that before the steps, in bytes (Linux)."""


def draw(count: int, prompt: int, completions: Sequence[int], vocabulary: int) -> list[Example]:
    """Examples of arbitrary tokens, all with the same lengths."""
    numbers = torch.Generator().manual_seed(SEED)

    def tokens(length: int) -> list[int]:
        return torch.randint(1, vocabulary, (length,), generator=numbers).tolist()

    return [
        Example(tokens(prompt), [tokens(n) for n in completions], [True] * len(completions), str(i), f"example {i}")
        for i in range(count)
    ]


def config_of(changes: dict[str, Any], vocabulary: int, longest: int = 0) -> Any:
    """A config of transformers: bench_work.LLAMA with changes, and enough positions."""
    torch.manual_seed(SEED)
    positions = max(longest, LLAMA["max_position_embeddings"])
    return new_config({**LLAMA, **changes, "vocab_size": vocabulary, "max_position_embeddings": positions})


def reward_model_of(config: Any) -> RewardModel:
    from transformers import AutoModelForSequenceClassification

    config.num_labels, config.pad_token_id = 1, PAD
    return read_reward_model(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)).train()


def timed(
    model: Policy | RewardModel,
    examples: list[Example],
    step: Callable[..., Loss],
    steps: int,
    micro_batch: int,
    accumulation: int = 1,
) -> Times:
    """Train on examples; the first two steps, which allocate gradients and optimizer state, are not timed."""
    from accelerate import Accelerator

    accelerator, watch = Accelerator(cpu=True), Stopwatch(warmup=1, examples=1)

    def updated(number: int, *_: Any) -> None:
        if number == 1:
            with contextlib.suppress(OSError, AttributeError):
                ctypes.CDLL(None).malloc_trim(0)  # glibc: resident memory is then the memory in use
            watch.ready()
        else:
            watch.tick()

    optimizer = make_optimizer(model.parameters(), learning_rate=LEARNING_RATE)
    scheduler = make_scheduler(optimizer, "linear", warmup_steps=0, total=steps + 2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    windows = example_windows(
        examples,
        micro_batch_size=micro_batch,
        accumulation=accumulation,
        seed=SEED,
        layout=model.reader.layout,
        steps=steps + 2,
    )
    fit(
        prepared,
        windows,
        step=partial(step, meter=CostMeter(), shape=ModelShape.of(model.model, head=isinstance(model, Policy))),
        optimizer=optimizer,
        scheduler=scheduler,
        accelerator=accelerator,
        max_grad_norm=1.0,
        on_update=updated,
    )
    found = watch.report("ours", "", False)
    loaded = found["loaded_bytes"]
    return found["seconds"], None if loaded is None else found["training_peak_bytes"] - loaded


def dpo(config: Any, pairs: list[Example], steps: int, micro_batch: int, accumulation: int = 1) -> Times:
    """DPO with precomputed log-probabilities of the reference."""
    model = model_of_config(config, dtype=torch.float32)
    policy = Policy(model, inspect_model(model)).train()
    known = completion_logprob_sums(policy, pairs, responses_at_once=2 * micro_batch, device="cpu")
    return timed(
        policy, pairs, partial(dpo_step, criterion=Criterion(0.1), reference=known), steps, micro_batch, accumulation
    )


def read_and_tokenise(count: int, vocabulary: int) -> Times:
    """Read a file of `count` short pairs and convert it to examples."""
    rows = [{key: text[:40] for key, text in row.items()} for row in synthetic_pairs(min(count, 1000))]
    tokenizer = train_byte_level_bpe((text for row in rows for text in row.values()), vocabulary)
    rows = [{**rows[i % len(rows)], "prompt": f"{i} {rows[i % len(rows)]['prompt']}"} for i in range(count)]
    options: dict[str, Any] = {"kind": "pair", "split": "train", "fractions": {"train": 1.0}}
    with tempfile.TemporaryDirectory() as folder:
        source = write_rows(Path(folder) / "pairs.jsonl", rows)
        begin = time.perf_counter()
        examples_of(read_records(source), tokenizer=tokenizer, lengths=Lengths(512, 512, 1024), **options)
        return [time.perf_counter() - begin], None


def measure(series: str, value: int, quick: bool) -> tuple[Times, int]:
    """Time one point of a series; returns the times, and the units of work in each."""
    model, vocabulary, steps = (TINY, 300, 2) if quick else ({}, 4096, 8)
    if series == "length":
        pairs = 8 if value <= 1024 else 4
        examples = draw(2 * pairs, value // 2, (value // 4, value // 4), vocabulary)
        return dpo(config_of(model, vocabulary, value), examples, steps, pairs), pairs * value
    if series == "data":
        return read_and_tokenise(value, vocabulary), value
    if series == "vocabulary":
        examples = draw(16, 256, (128, 128), value) if not quick else draw(16, 8, (4, 4), value)
        return dpo(config_of(model or SMALL, value), examples, steps, 8), 8
    if series == "completions":  # a prompt with all completions is one tree, as in `rlhf train-rm`
        prompts = 16 // value
        examples = draw(2 * prompts, 64, [32] * value, vocabulary)
        return timed(reward_model_of(config_of(model, vocabulary)), examples, reward_step, steps, prompts), 16
    pairs = 4 if quick else 64  # of a step, in micro-batches of `value`
    examples = draw(pairs, 32, (16, 16), vocabulary)
    return dpo(config_of(model, vocabulary), examples, steps, value, pairs // value), pairs


def table(series: str, found: Sequence[tuple[int, Times, int]]) -> Iterator[str]:
    """The lines of a Markdown table. found: value, times and units of work of each point."""
    grows, unit, *_ = SERIES[series]
    each = [statistics.median(seconds) / units for _, (seconds, _), units in found]
    yield f"| {grows} | µs for {unit} | over the lowest | peak memory, MiB |"
    yield "| ---: | ---: | ---: | ---: |"
    for (value, (_, memory), _), cost in zip(found, each, strict=True):
        peak = "-" if memory is None else f"{memory / 2**20:,.0f}"
        yield f"| {value:,} | {1e6 * cost:,.1f} | {cost / min(each):.2f} | {peak} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("series", nargs="*", metavar="SERIES", help=f"some of {', '.join(SERIES)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="tiny models: a smoke test whose figures mean nothing")
    options = parser.parse_args(arguments)
    if unknown := set(options.series) - set(SERIES):
        parser.error(f"no such series: {', '.join(sorted(unknown))}; expected some of {', '.join(SERIES)}")
    for series in options.series or SERIES:
        points = SERIES[series][3 if options.quick else 2]
        found = [(value, *measure(series, value, options.quick)) for value in points]
        print(f"\n## {series}\n", *table(series, found), sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
