"""Sample responses of one policy, for reading."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.compare import GenerateConfig
from rlhf_pipeline.data.tokenizers import text_of
from rlhf_pipeline.evaluation.sampled import add_score, draw
from rlhf_pipeline.measure.bench import set_up
from rlhf_pipeline.models.memory import MEASURING_ADVICE, Memory
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.rewards import WorldReward
from rlhf_pipeline.stages.common import find_model
from rlhf_pipeline.training.accelerator import make_accelerator
from rlhf_pipeline.training.tracking import console


def run_generate(
    reference_text: str, config: GenerateConfig, home: Path, *, texts: Sequence[str] = (), raw: bool = False
) -> dict[str, Any]:
    """Responses of a policy to typed prompts, or to those of a source.

    A typed prompt is what a user says to a chat model; `raw`: the text itself, without the chat template.
    """
    registry = Registry(home)
    device = make_accelerator(config).device
    say = partial(console.print, markup=False)
    resolved = find_model(registry, reference_text, "policy", say=say)
    bench = set_up(
        registry,
        config,
        resolved,
        device,
        reference=None,
        samples=config.samples,
        seed=config.seed,
        say=lambda _: None,
        memory=Memory(say, advice=MEASURING_ADVICE),
        texts=texts,
        raw=raw,
    )
    if texts and not raw and bench.tokenizer.chat_template:
        say("note: each prompt is a user's turn in the model's chat template; --raw gives the model the text itself")
    for change in bench.data_changed:
        say(f"note: {change.text}")
    samples = draw(bench.policy(resolved), bench.plan)
    judge = bench.scorer or (WorldReward() if bench.knows_truth and config.reward_model else None)
    if judge is not None:
        add_score(samples, judge, "score", bench.plan)
    scores = iter(samples.values["score"].tolist()) if judge is not None else None
    if cut := [example for example in samples.examples if example.prompt_truncated]:
        first, more = cut[0], f" and {len(cut) - 1} more" if len(cut) > 1 else ""
        say(
            f"note: {first.where}{more}: longer than max_prompt_length {len(first.prompt_ids)}, cut on the left; the "
            f"model reads {text_of(bench.tokenizer, first.prompt_ids)!r}"
        )
    responses = []
    for place, example in enumerate(samples.examples):
        rows = []
        for ids, ended in zip(example.completions, example.ended, strict=True):
            text = text_of(bench.tokenizer, ids[: len(ids) - int(ended)])
            row: dict[str, Any] = {"text": text, "ended": ended, "tokens": len(ids)}
            if scores is not None:
                row["score"] = next(scores)
            rows.append(row)
        prompt = texts[place] if texts else example.prompt_text or text_of(bench.tokenizer, example.prompt_ids)
        responses.append({"prompt": prompt, "prompt_truncated": example.prompt_truncated, "responses": rows})
    return {
        "model": resolved.label,
        "temperature": config.temperature,
        "decoding": config.decoding.model_dump(),
        "seed": config.seed,
        "judge": judge.label if judge is not None else None,
        "data_changed": bench.data_changed,
        "responses": responses,
    }
