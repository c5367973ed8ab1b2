"""DPO's pairs and rankings, from the rows of a source or the population of the built-in world; held-out metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import PackedBatch, common_layout
from rlhf_pipeline.data.examples import Example, made_once
from rlhf_pipeline.data.load import SourceReport
from rlhf_pipeline.errors import DataError, Fault, MismatchError
from rlhf_pipeline.evaluation.enumerate import walk_counts
from rlhf_pipeline.evaluation.preference_metrics import pair_differences, preference_metrics
from rlhf_pipeline.models.modules import Policy, TokenScores
from rlhf_pipeline.rollout.scoring import most_responses
from rlhf_pipeline.stages.common import example_schedule
from rlhf_pipeline.stages.data import StageData, preference_kind
from rlhf_pipeline.stages.population import Population
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.pairs import Criterion, recorded_margins
from rlhf_pipeline.training.precision import uses_bf16
from rlhf_pipeline.training.reference_cache import ReferenceLogprobs, cached_logprobs, completion_logprob_sums
from rlhf_pipeline.training.windows import Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ReferenceScores = Tensor | Callable[[PackedBatch], TokenScores]


def label_probabilities(examples: Sequence[Example]) -> Tensor:
    """The recorded probability that the first response of each example is preferred, (examples,) float64.

    Raises:
        DataError: an example has no `label_probability`.
    """
    lacking = [example for example in examples if example.label_probability is None]
    if lacking:
        expected = "label_probability, as `rlhf data collect` records it for pairs with labels: bradley-terry"
        found = f"no label_probability in {len(lacking)} of {len(examples)} rows, which soft_labels needs"
        raise DataError(Fault(lacking[0].where, found, expected, "or set soft_labels: false"))
    return torch.tensor([example.label_probability for example in examples], dtype=torch.float64)


def require_pairs(examples: Sequence[Example]) -> None:
    """Check that no example is a ranking, which has no one other response to compare a length with.

    Raises:
        DataError: an example has more than two responses.
    """
    ranked = [example for example in examples if len(example.completions) > 2]
    if ranked:
        size = len(ranked[0].completions)
        found = f"rankings in {len(ranked)} of {len(examples)} rows, the first of {size} responses"
        expected, fix = "pairs: ld_alpha compares the lengths of two responses", "or remove ld_alpha"
        raise DataError(Fault(ranked[0].where, found, expected, fix))


@dataclass(frozen=True)
class Pairs:
    """The windows of a run, and what is known of its pairs besides their tokens.

    examples: empty if pairs are drawn at every step. reference, targets, margins: see `dpo_step`. evaluate: returns the
    metrics on held-out pairs; None without held-out pairs.
    """

    examples: Sequence[Example]
    reports: tuple[SourceReport, ...]
    windows: Callable[[Any, int], Iterator[Window]]
    total: int
    reference: ReferenceScores | None = None
    targets: Tensor | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    margins: Tensor | None = None


def recorded_pairs(
    run: Run, policy: Policy, frozen: Policy | None, frozen_digest: str | None, tokenizer: PreTrainedTokenizerBase
) -> Pairs:
    """The pairs and rankings of the config's sources, with cached log-probabilities of the reference if there is one.

    Raises:
        DataError: a ranking has ties and the loss accepts none, `ld_alpha` meets a ranking, or there is nothing to
            train on.
    """
    config, criterion = run.config, Criterion.of(run.config)
    data = StageData(config, run.registry.home, run.log.say)
    examples, reports = data.training(tokenizer)
    held_out, _ = data.held_out(preference_kind(config), tokenizer)
    if config.ld_alpha is not None:
        require_pairs(examples)
    targets = label_probabilities(examples) if config.soft_labels else None
    margins = recorded_margins(examples) if config.use_margin else None
    layout = common_layout(*(model.reader.layout for model in (policy, frozen) if model is not None))
    windows, total = example_schedule(run, examples, layout=layout)
    reference: ReferenceScores | None = None
    held_out_reference: Tensor | None = None
    if frozen is not None:
        reference, held_out_reference = _read_reference(run, frozen, frozen_digest, examples, held_out)

    def evaluate() -> dict[str, float]:
        """Accuracy and sigmoid loss of the implicit rewards on held-out pairs and rankings."""
        rows = made_once(held_out)
        logprobs = completion_logprob_sums(policy, rows, **_reading(run, rows))
        rewards = criterion.rewards(logprobs, held_out_reference, response_lengths(rows, logprobs.shape[1]))
        metrics = preference_metrics(*pair_differences(rewards.tolist(), rows))
        return {f"eval_{name}": value for name, value in metrics.items()}

    return Pairs(examples, reports, windows, total, reference, targets, evaluate if held_out else None, margins)


def response_lengths(examples: Sequence[Example], width: int) -> Tensor:
    """(examples, width) tokens of the responses, 1 where an example has no more of them."""
    rows = [[len(ids) for ids in example.completions] for example in examples]
    return torch.tensor([row + [1] * (width - len(row)) for row in rows])


def _reading(run: Run, examples: Sequence[Example]) -> dict[str, Any]:
    at_once = run.config.per_device_eval_batch_size * most_responses(examples)
    return {"responses_at_once": at_once, "memory": run.memory, "device": run.device}


def _read_reference(
    run: Run, frozen: Policy, digest: str | None, examples: Sequence[Example], held_out: Sequence[Example]
) -> tuple[ReferenceScores, Tensor]:
    """What `dpo_step` reads of the reference, and its log-probabilities of the held-out responses."""
    config = run.config
    cache = run.registry.home / "cache"
    key = {"model": digest, "dtype": config.dtype, "bf16": uses_bf16(config)}

    def referred(rows: Sequence[Example]) -> ReferenceLogprobs:
        return cached_logprobs(frozen, rows, cache, key, agree=run.everywhere, **_reading(run, rows))

    def score_reference(batch: PackedBatch) -> TokenScores:
        with run.accelerator.autocast():  # the precision of the policy's training
            return frozen(batch)

    with run.meter.part("reference"), run.accelerator.autocast():
        held_out_reference = referred(held_out).logprobs
        if not config.caches_reference or config.engine != "native":  # TRL's trainer computes its own
            return score_reference, held_out_reference
        found = referred(examples)
        run.log.say(f"reference log-probabilities: {'from the cache' if found.hit else 'computed and cached'}")
        # Counted also when the cache had them: the cost of an arm must not depend on earlier runs.
        shape = ModelShape.of(frozen.model)
        run.meter.flops += found.flops(shape, examples) if run.checkpoint is None else 0.0
    return found.logprobs, held_out_reference


def fresh_pairs(
    run: Run, policy: Policy, frozen: Policy | None, frozen_digest: str | None, tokenizer: PreTrainedTokenizerBase
) -> Pairs:
    """Pairs of the built-in world, drawn at every step with their exact label probabilities.

    Raises:
        MismatchError: the policy's tokenizer is not that of the world.
    """
    assert frozen is not None  # the pairs are drawn from it; the config refuses losses without a reference
    config, size = run.config, run.config.per_device_train_batch_size * run.config.gradient_accumulation_steps
    if not world.is_world_tokenizer(tokenizer):
        raise MismatchError(
            f"{config.model_name_or_path}: found a tokenizer of {len(tokenizer)} tokens, expected that of "
            f"{world.NAME}, whose responses are enumerated"
        )
    data = StageData(config, run.registry.home, run.log.say)
    prompts, reports = data.training(tokenizer)
    with run.meter.part("population"):
        population = Population(
            frozen,
            prompts,
            stop_id=tokenizer.eos_token_id,
            response_length=config.sampled_lengths().response,
            beta=config.beta,
            proposal=config.population_proposal,
            device=run.device,
            memory=run.memory,
        )
    if run.checkpoint is None:  # count the reference's pass over all responses
        shape = ModelShape.of(frozen.model)
        counts = (walk_counts(len(prompt.prompt_ids), population.tree) for prompt in prompts)
        run.meter.flops += sum(shape.forward_flops(*count) for count in counts)
    report = population.report(reports[0], config.max_steps * size * run.shares)
    run.log.say(f"pairs: drawn at every step from {len(prompts)} prompts, proposal {config.population_proposal}")

    def windows(_prepared: Any, start: int) -> Iterator[Window]:
        return population.windows(
            steps=config.max_steps,
            micro_batch_size=config.per_device_train_batch_size,
            micro_batch_tokens=config.micro_batch_tokens,
            accumulation=config.gradient_accumulation_steps,
            seed=config.seed,
            layout=policy.reader.layout,
            start=start,
            rank=run.accelerator.process_index,
            world_size=run.accelerator.num_processes,
            shares=run.shares,
            device=run.device,
        )

    return Pairs([], (report,), windows, config.max_steps)
