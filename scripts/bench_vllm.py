"""Tokens per second of PPO's two samplers and of transformers' `generate`, side by side in one process.

    .peer/vllm/bin/python scripts/bench_vllm.py MODEL [--prompts N] [--tokens N] [--rounds N] [--threads N]

The environment is that of `make vllm`; `make bench-vllm MODEL=FOLDER` runs it. Every sampler draws the same number of
tokens for the same prompts in fp32. No response ends early. The rounds alternate, after one round without a clock, in
which vLLM compiles its sampling kernel. Prints a table with the median over the rounds, by processor time and by wall
time. The hand-over of the weights to vLLM, once in an update of PPO, has a row of its own.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.models.loading import load_causal_lm
from rlhf_pipeline.rollout.responses import sample_for_prompts
from rlhf_pipeline.rollout.vllm_engine import VllmEngine
from rlhf_pipeline.stages.common import frozen_policy

SHORTEST, LONGEST, SEED = 16, 48, 0
NATIVE, VLLM, GENERATE, HAND_OVER = "native", "vllm", "transformers' generate", "weights to vllm"
Timed = dict[str, list[tuple[float, float]]]
"""Processor seconds and wall seconds of each round, by the name of the work."""


def made_up_prompts(count: int, vocabulary: int) -> list[list[int]]:
    """Prompts of random tokens, 16 to 48 long."""
    generator = torch.Generator().manual_seed(SEED)
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,), generator=generator).tolist()
    return [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]


def timed(work: Callable[[], Sequence[Sequence[int]] | None], expected: list[int]) -> tuple[float, float]:
    """Processor seconds and wall seconds of one call, whose responses must have the expected lengths."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = work()
    taken = time.process_time() - cpu, time.perf_counter() - wall
    if found is not None and (lengths := [len(ids) for ids in found]) != expected:
        raise SystemExit(f"found responses of {sorted(set(lengths))} tokens; expected {expected[0]} in each")
    return taken


def measure(model: str, *, prompts: int, tokens: int, rounds: int, memory: float) -> Timed:
    """Time the rounds of every sampler with the weights of one model."""
    policy = frozen_policy(load_causal_lm(model, dtype=torch.float32), 1.0)
    lm = policy.language_model
    asked = made_up_prompts(prompts, lm.config.vocab_size)
    examples = [Example(ids, [], [], prompt_key=str(row), where="made up") for row, ids in enumerate(asked)]
    options: dict[str, Any] = {"samples": 1, "response_length": tokens, "stop_ids": []}
    width = max(map(len, asked))
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in asked])
    attention = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in asked])
    engine = VllmEngine(policy, model, dtype="float32", max_length=LONGEST + tokens, memory=memory, seed=SEED)

    def native() -> list[list[int]]:
        generator = torch.Generator().manual_seed(SEED)
        _, drawn = sample_for_prompts(policy, examples, generator=generator, responses_at_once=prompts, **options)
        return [response.ids for (response,) in drawn]

    def vllm() -> list[list[int]]:
        drawn = engine.generate(asked, generator=torch.Generator().manual_seed(SEED), **options)
        return [response.ids for response in drawn]

    @torch.no_grad()
    def generate() -> list[list[int]]:
        exact = {"min_new_tokens": tokens, "max_new_tokens": tokens, "pad_token_id": 0}
        drawn = lm.generate(padded, attention_mask=attention, do_sample=True, top_k=0, top_p=1.0, **exact)
        return drawn[:, width:].tolist()

    works = {NATIVE: native, HAND_OVER: lambda: engine.load_weights(policy), VLLM: vllm, GENERATE: generate}
    found: Timed = {name: [] for name in works}
    try:
        for number in range(rounds + 1):
            for name, work in works.items():
                taken = timed(work, [tokens] * prompts)
                if number:
                    found[name].append(taken)
            print(f"round {number} of {rounds}" if number else "warm", file=sys.stderr)
    finally:
        engine.close()
    return found


def table(found: Timed, tokens: int) -> str:
    """The medians as a Markdown table. tokens: of a round, all responses together."""
    lines = [
        "| | tokens a second, processor time | tokens a second, wall time | native is faster by (processor time) |",
        "| --- | --- | --- | --- |",
    ]
    base = statistics.median(cpu for cpu, _ in found[NATIVE])
    for name in (NATIVE, VLLM, GENERATE):
        cpu, wall = (statistics.median(each) for each in zip(*found[name], strict=True))
        lines.append(f"| {name} | {tokens / cpu:.0f} | {tokens / wall:.0f} | {cpu / base:.2f} x |")
    cpu, wall = (statistics.median(each) for each in zip(*found[HAND_OVER], strict=True))
    return "\n".join([*lines, "", f"{HAND_OVER}: {cpu:.2f} s of processor time, {wall:.2f} s"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a folder with a model, such as that of scripts/smollm2.py")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of each response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=float, default=0.2, help="vllm_gpu_memory_utilization")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    sizes = {"prompts": asked.prompts, "tokens": asked.tokens}
    found = measure(asked.model, **sizes, rounds=asked.rounds, memory=asked.memory)
    print(f"{asked.prompts} prompts x {asked.tokens} tokens, fp32, {asked.threads} thread(s), {asked.rounds} rounds\n")
    print(table(found, asked.prompts * asked.tokens))


if __name__ == "__main__":
    main()
