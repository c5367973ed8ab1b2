"""The points of growth.py, each measured in a process of its own.

    python scripts/growth_points.py SERIES VALUE [--threads N] [--quick]

The last line on stdout is a list of rows as JSON, one for each variant of the point.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from bench_work import SEED, write_rows
from growth_sizes import QUICK, SERIES, THREADS, Sizes
from growth_work import PAD, Row, draw_examples, draw_pairs, make_policy, make_reward_model, timed

from rlhf_pipeline.config.base import Lengths
from rlhf_pipeline.data import load
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import train_byte_level_bpe
from rlhf_pipeline.models.roles import Policy
from rlhf_pipeline.stages.dpo import dpo_step
from rlhf_pipeline.stages.reward import reward_step
from rlhf_pipeline.training.reference_cache import completion_logprob_sums, examples_digest
from rlhf_pipeline.training.windows import epoch_order

BETA = 0.1
LIMITS = Lengths(512, 512, 1024)


def reference_logprobs(policy: Policy, examples: Sequence[Example], sizes: Sizes) -> torch.Tensor:
    """(examples, 2): what a stage finds in its cache."""
    return completion_logprob_sums(policy, examples, responses_at_once=2 * sizes.pairs, pad_id=PAD, device="cpu")


def length(sizes: Sizes, value: int) -> list[Row]:
    """DPO on pairs of `value` tokens: the reference's log-probabilities cached, then computed in each step."""
    pairs = sizes.pairs_of(value)
    examples = draw_pairs(2 * pairs, value, sizes.vocab_size)
    policy, frozen = (make_policy(sizes.model, sizes.vocab_size, value) for _ in range(2))
    frozen.requires_grad_(False)
    rows = []
    for variant, reference in (("cached", reference_logprobs(frozen, examples, sizes)), ("online", frozen)):
        step = functools.partial(dpo_step, beta=BETA, reference=reference)
        rows.append({"variant": variant, **timed(sizes, policy, examples, step, units=pairs, micro_batch=pairs)})
    return rows


def vocabulary(sizes: Sizes, value: int) -> list[Row]:
    """DPO with `value` tokens in the vocabulary of a narrow model, reference cached."""
    examples = draw_pairs(2 * sizes.pairs, sizes.vocabulary_length, value)
    policy = make_policy(sizes.small, value, sizes.vocabulary_length)
    step = functools.partial(dpo_step, beta=BETA, reference=reference_logprobs(policy, examples, sizes))
    return [timed(sizes, policy, examples, step, units=sizes.pairs, micro_batch=sizes.pairs, tensors=True)]


def batch(sizes: Sizes, value: int) -> list[Row]:
    """DPO on as many pairs in each step, in micro-batches of `value`, reference cached."""
    examples = draw_pairs(sizes.step_pairs, sizes.batch_length, sizes.vocab_size)
    policy = make_policy(sizes.model, sizes.vocab_size, sizes.batch_length)
    step = functools.partial(dpo_step, beta=BETA, reference=reference_logprobs(policy, examples, sizes))
    options = {"micro_batch": value, "accumulation": sizes.step_pairs // value}
    return [timed(sizes, policy, examples, step, units=sizes.step_pairs, **options)]


def all_pairs(ranking: Example) -> list[Example]:
    """The C(K, 2) pairs of a ranking, best first, as `engine: trl` takes it."""
    return [
        Example(ranking.prompt_ids, list(pair), [True, True], ranking.prompt_key, ranking.where)
        for pair in combinations(ranking.completions, 2)
    ]


def completions(sizes: Sizes, value: int) -> list[Row]:
    """A reward model on prompts with `value` completions: a prompt and all of them one tree, as `rlhf train-rm` takes
    them, then split into pairs."""
    prompts = max(1, sizes.step_completions // value)
    rankings = draw_examples(2 * prompts, sizes.prompt, [sizes.completion] * value, sizes.vocab_size)
    pairs = prompts * math.comb(value, 2)
    micro_batch = math.gcd(pairs, sizes.pairs)
    split = {"micro_batch": micro_batch, "accumulation": pairs // micro_batch}
    rows = []
    for variant, examples, options in (
        ("tree", rankings, {"micro_batch": prompts}),
        ("pairs", [pair for ranking in rankings for pair in all_pairs(ranking)], split),
    ):
        model = make_reward_model(sizes.model, sizes.vocab_size, sizes.prompt + sizes.completion)
        row = timed(sizes, model, examples, reward_step, units=prompts * value, head=False, **options)
        rows.append({"variant": variant, **row})
    return rows


def short_texts(count: int) -> list[dict[str, str]]:
    """Pairs of texts of made-up words, six in the prompt and four in each response."""
    parts = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
    draw = torch.Generator().manual_seed(SEED)
    words = [parts[i] + parts[j] for i, j in torch.randint(0, len(parts), (400, 2), generator=draw).tolist()]
    rows = []
    for places in torch.randint(0, len(words), (count, 14), generator=draw).tolist():
        texts = (" ".join(words[place] for place in part) for part in (places[:6], places[6:10], places[10:]))
        rows.append(dict(zip(("prompt", "chosen", "rejected"), (f" {text}" for text in texts))))
    return rows


@contextlib.contextmanager
def clocked_collections() -> Iterator[list[float]]:
    """Seconds of every run of Python's garbage collector."""
    spent: list[float] = []
    began = 0.0

    def watch(phase: str, _: dict[str, int]) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            spent.append(time.perf_counter() - began)

    gc.callbacks.append(watch)
    try:
        yield spent
    finally:
        gc.callbacks.remove(watch)


def data(sizes: Sizes, value: int) -> list[Row]:
    """DPO on a file of `value` short pairs: what it takes to get them ready, then the steps."""
    spent: dict[str, float] = {}

    @contextlib.contextmanager
    def clock(name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        spent[name] = time.perf_counter() - begin

    records_digest = load.records_digest

    def clocked_digest(records: Sequence[Record]) -> str:
        with clock("digest of records"):
            return records_digest(records)

    texts = short_texts(value)
    tokenizer = train_byte_level_bpe((text for row in texts[:1000] for text in row.values()), sizes.vocab_size)
    options: dict[str, Any] = {"kind": "pair", "split": "train", "fractions": {"train": 1.0}, "lengths": LIMITS}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(load, "records_digest", clocked_digest))
        source = write_rows(Path(stack.enter_context(tempfile.TemporaryDirectory())) / "pairs.jsonl", texts)
        del texts
        collections = stack.enter_context(clocked_collections())
        with clock("reading"):
            found = load.read_records(source)
        with clock("tokenising"):
            examples = load.examples_of(found, tokenizer=tokenizer, **options).examples
        spent["tokenising"] -= spent["digest of records"]  # which is made in between
        with clock("digest of ids"):
            examples_digest(examples)
        with clock("order of an epoch"):
            epoch_order(len(examples), SEED, 0)
    policy = make_policy(sizes.model, sizes.vocab_size, LIMITS.total)
    # Stand-ins for the cache: under random weights a token has about log(1 / V); to score all pairs would take long.
    per_token = -math.log(sizes.vocab_size)
    known = torch.tensor([[per_token * len(ids) for ids in example.completions] for example in examples])
    step = functools.partial(dpo_step, beta=BETA, reference=known)
    row = timed(sizes, policy, examples, step, units=sizes.data_pairs, micro_batch=sizes.data_pairs)
    return [{**row, "kept": len(examples), "setup": spent, "collector_seconds": sum(collections)}]


MEASURES = {"length": length, "data": data, "vocabulary": vocabulary, "completions": completions, "batch": batch}


def measure(series: str, value: int, sizes: Sizes, threads: int) -> list[Row]:
    """The rows of a point."""
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    return [{"series": series, "value": value, **row} for row in MEASURES[series](sizes, value)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One point of growth.py.")
    parser.add_argument("series", choices=SERIES)
    parser.add_argument("value", type=int)
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--quick", action="store_true", help="a tiny model and a few steps")
    options = parser.parse_args(arguments)
    with contextlib.redirect_stdout(sys.stderr):
        rows = measure(options.series, options.value, QUICK if options.quick else Sizes(), options.threads)
    print(json.dumps(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
