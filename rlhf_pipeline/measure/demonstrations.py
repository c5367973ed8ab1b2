"""Demonstrations of held-out prompts, as one side of a comparison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.evaluation.sampled import Samples
from rlhf_pipeline.measure.bench import Bench, add_rewards
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.report.figures import Interval
from rlhf_pipeline.report.results import Demonstrations
from rlhf_pipeline.stages.data import StageData


def demonstrations_of(bench: Bench, sft: Resolved | None, split: str) -> Samples | None:
    """Demonstrations of the bench's prompts with their figures, equally many for each; None if a prompt has none.

    They come from the same split of the SFT model's data as the prompts, so SFT was not trained on them.
    """
    if sft is None or sft.manifest is None or sft.manifest.stage != "sft":
        return None
    values = {key: value for key, value in sft.manifest.config.items() if value is not None}
    try:
        config = load_config("sft", None, extra=values).of(SftConfig)
        data = StageData(config, bench.registry.home, lambda _: None)
        found, _ = data.split("demonstration", split, bench.tokenizer, required=False)
    except BadInput:
        return None  # the source is missing: the comparison has no demonstrations
    by_prompt: dict[str, list[Example]] = {}
    for example in found:
        by_prompt.setdefault(example.prompt_key, []).append(example)
    counts = [len(by_prompt.get(prompt.prompt_key, ())) for prompt in bench.plan.prompts]
    each = min([*counts, bench.plan.samples])
    limit = bench.plan.response_length
    if each < 1:
        return None
    bench.compare_data(sft, data.sources("demonstration"))
    examples = []
    for prompt in bench.plan.prompts:
        chosen = by_prompt[prompt.prompt_key][:each]
        if any(len(example.completions[0]) > limit for example in chosen):
            return None
        completions = [example.completions[0] for example in chosen]
        examples.append(replace(prompt, completions=completions, ended=[example.ended[0] for example in chosen]))
    samples = Samples(examples, [example.prompt_key for example in examples for _ in example.completions])
    samples.values["length"] = np.array([len(ids) for e in examples for ids in e.completions], dtype=np.float64)
    add_rewards(bench, samples)
    return samples


def describe(samples: Samples) -> Demonstrations:
    """The entry of results.json for the demonstrations."""
    return Demonstrations(each=len(samples.examples[0].completions), metrics=Interval.table(samples.table()))
