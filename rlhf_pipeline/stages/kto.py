"""KTO (Ethayarajh et al. 2024): responses labelled good or bad, the reference point z0 of each step, the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.kto import kto_loss, reference_point
from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.kto import KTO
from rlhf_pipeline.data.batch import counted
from rlhf_pipeline.data.examples import Example, prompt_keys
from rlhf_pipeline.data.tokenize import cut_prompt
from rlhf_pipeline.data.tokenizers import stop_ids
from rlhf_pipeline.errors import DataError, Fault
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.rollout.responses import prompts_run, sample_for_prompts
from rlhf_pipeline.stages.preference_pairs import Pairs, ReferenceScores, recorded_pairs
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.open_run import Run
from rlhf_pipeline.training.ranks import together
from rlhf_pipeline.training.reference_cache import completion_logprob_sums
from rlhf_pipeline.training.session import Metrics
from rlhf_pipeline.training.windows import ExampleBatch, Loss, Window

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIDES = {"chosen": "desirable", "rejected": "undesirable"}
"""TRL's word for a side in the names of metrics, and the name of its count in a window."""


@dataclass(frozen=True)
class LabelledBatch(ExampleBatch):
    """A micro-batch of single responses. z0: of its window, in nats. sides: those of SIDES that the window has."""

    z0: float = 0.0
    sides: tuple[str, ...] = ()


def kto_step(
    model: Policy,
    micro_batch: LabelledBatch,
    *,
    config: DpoConfig,
    desirable: Tensor,
    reference: ReferenceScores | None,
    meter: CostMeter,
    shape: ModelShape,
) -> Loss:
    """Loss of a micro-batch of single responses; its denominator is all responses of the window, of both labels.

    Metrics have TRL's names: `chosen` are means over the desirable responses, `rejected` over the undesirable ones.

    Args:
        desirable: (examples,) 1 or 0. reference: see `dpo_step`; (examples, 1).
    """
    batch, weight = micro_batch.batch, micro_batch.weight
    scores = model(batch)
    meter.train(shape, batch)
    meter.tokens_trained += batch.active_tokens
    logprobs = batch.per_completion(scores.logprobs)
    if isinstance(reference, Tensor):
        ref_logprobs = reference[micro_batch.indices, 0].to(logprobs.device)
    else:
        assert reference is not None
        with torch.no_grad():
            ref_logprobs = batch.per_completion(reference(batch).logprobs)
        meter.score(shape, batch)
    good = desirable[micro_batch.indices].to(logprobs)
    result = kto_loss(
        logprobs,
        ref_logprobs,
        good,
        micro_batch.z0,
        beta=config.beta,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )
    metrics = {"entropy": (scores.entropy.sum() * weight, "tokens")}
    for side, mine in zip(SIDES, (good, 1.0 - good), strict=True):
        if side in micro_batch.sides:
            metrics[f"rewards/{side}"] = ((mine * result.rewards).sum() * weight, SIDES[side])
            metrics[f"logps/{side}"] = ((mine * logprobs.detach()).sum() * weight, SIDES[side])
    checked = {"log-probabilities of the policy": logprobs, "log-probabilities of the reference": ref_logprobs}
    return Loss({"dpo": (result.loss * weight, "prompts", 1.0)}, metrics, checked)


def with_margins(metrics: Metrics) -> Metrics:
    """Add the mean reward of the desirable responses minus that of the undesirable ones, if a window has both."""
    sides = [metrics.get(f"rewards/{side}") for side in SIDES]
    return metrics if None in sides else {**metrics, "rewards/margins": sides[0] - sides[1]}  # type: ignore[operator]


def mismatched(examples: Sequence[Example], members: Sequence[int], longest: int, bos: int | None) -> list[Example]:
    """Each prompt of a window with a response to another prompt.

    It is the response of the example before it in the window, whose first follows its last, or of the nearest one
    before that with another prompt; in a window of one prompt alone, that of the nearest one before it in the data.

    Args:
        members: the numbers of the window's examples, in order; two prompts at least are among all examples.
        longest: tokens of a prompt with its response; a longer prompt is cut on the left. bos: see `cut_prompt`.
    """
    window, found = [examples[index] for index in members], []
    for place, one in enumerate(window):
        in_window = (window[place - back] for back in range(1, len(window)))
        in_data = (examples[(members[place] - back) % len(examples)] for back in range(1, len(examples)))
        before = next(other for other in chain(in_window, in_data) if other.prompt_key != one.prompt_key)
        room = longest - len(before.completions[0])
        ids = cut_prompt(one.prompt_ids, room, bos)
        found.append(replace(one, prompt_ids=ids, completions=before.completions, ended=before.ended))
    return found


def require_two_prompts(examples: Sequence[Example], where: str) -> None:
    """Check that a response to another prompt exists.

    Raises:
        DataError: all examples have the same prompt.
    """
    if len(set(prompt_keys(examples))) < 2:
        found = f"one prompt in all {len(examples)} rows to train on, so none has a response to another one for z0"
        raise DataError(Fault(where, found, "two prompts at least, or kto_kl 'sampled'"))


def balance(desirable: Tensor, config: DpoConfig, where: str) -> str:
    """What to say of the two labels and their weights: eq. 8 of the KTO paper wants 1 <= w_D n_D / (w_U n_U) <= 4/3.

    Raises:
        DataError: all responses have one label.
    """
    good = int(desirable.sum())
    bad = len(desirable) - good
    if not good or not bad:
        found = f"{good} desirable and {bad} undesirable responses to train on"
        fix = "with desirable ones alone use `rlhf sft`, on the rows without the column label"
        raise DataError(Fault(where, found, f"both: {config.loss_type} raises the ones and lowers the others", fix))
    ratio = config.desirable_weight * good / (config.undesirable_weight * bad)
    said = f"responses: {good} desirable, {bad} undesirable"
    if 1 <= ratio <= 4 / 3 + 1e-9:
        return said
    return (
        f"{said}; their weights are in the ratio {ratio:.3g}, the KTO paper advises 1 to 4/3: "
        f"desirable_weight {config.undesirable_weight * bad / good:.3g} gives 1"
    )


@dataclass(frozen=True)
class ReferencePoint:
    """Computes z0 of a window: see `kto_kl` of the config; in every process the same."""

    run: Run
    policy: Policy
    frozen: Policy
    tokenizer: PreTrainedTokenizerBase
    shape: ModelShape

    @property
    def options(self) -> dict[str, Any]:
        """The options for scoring responses."""
        at_once = self.run.config.per_device_eval_batch_size
        return {"responses_at_once": at_once, "memory": self.run.memory, "device": self.run.device}

    def of(self, examples: Sequence[Example], members: Sequence[int], step: int) -> float:
        """z0 of the window with these members."""
        run, accelerator = self.run, self.run.accelerator
        divided = accelerator.num_processes > 1 and not run.config.fsdp  # with fsdp all make the same passes

        def sums() -> Tensor:
            with run.meter.part("reference"):
                rows = self._responses(examples, members, step, divided)
                ratios = self._log_ratios(rows)
            return torch.tensor([float(ratios.sum()), float(len(rows))], device=run.device)

        found = together(accelerator, run.memory, sums)
        total, count = (accelerator.reduce(found, "sum") if divided else found).tolist()
        return reference_point(total, count)

    def _responses(
        self, examples: Sequence[Example], members: Sequence[int], step: int, divided: bool
    ) -> list[Example]:
        """This process's share of the responses that z0 is measured on."""
        config, accelerator = self.run.config, self.run.accelerator
        mine = slice(accelerator.process_index, None, accelerator.num_processes) if divided else slice(None)
        if config.kto_kl == "mismatched":
            longest = config.lengths().total
            return mismatched(examples, members, longest, self.tokenizer.bos_token_id)[mine]
        prompts = [examples[index] for index in members][mine]
        if not prompts:
            return []
        seed = (config.seed * 1_000_003 + step) * 4096 + accelerator.process_index
        length = config.sampled_lengths().response
        sampled, _ = sample_for_prompts(
            self.policy,
            prompts,
            samples=1,
            response_length=length,
            stop_ids=stop_ids(self.tokenizer),
            generator=torch.Generator().manual_seed(seed % 2**63),
            **self.options,
        )
        at_once = {key: self.options[key] for key in ("responses_at_once", "memory", "device")}
        run = prompts_run(self.policy, sampled, **at_once, response_length=length)
        self.run.meter.generate(self.shape, sampled, run)
        return sampled

    def _log_ratios(self, rows: Sequence[Example]) -> Tensor:
        """log pi / pi_ref of some responses, in the precision of training."""
        if not rows:
            return torch.zeros(0)
        self.run.meter.flops += 2 * self.shape.batch_flops(counted(rows))
        with self.run.accelerator.autocast():
            logprobs, ref = (
                completion_logprob_sums(model, rows, **self.options) for model in (self.policy, self.frozen)
            )
        return (logprobs - ref)[:, 0]


def labelled_responses(
    run: Run,
    policy: Policy,
    frozen: Policy | None,
    frozen_digest: str | None,
    tokenizer: PreTrainedTokenizerBase,
) -> Pairs:
    """The labelled responses of the config's sources; `targets` says which are desirable.

    Raises:
        DataError: there is nothing to train on, all responses have one label, or z0 needs a second prompt.
    """
    assert frozen is not None  # these losses read a reference
    pairs = recorded_pairs(run, policy, frozen, frozen_digest, tokenizer)
    config, examples = run.config, pairs.examples
    desirable = labels_of(examples)
    sources = " + ".join(report.source for report in pairs.reports)
    run.log.say(balance(desirable, config, sources))
    if config.loss_type == KTO and config.kto_kl == "mismatched":
        require_two_prompts(examples, sources)
    point = ReferencePoint(run, policy, frozen, tokenizer, ModelShape.of(policy.model))

    def windows(prepared: Any, start: int) -> Iterator[Window]:
        for step, window in enumerate(pairs.windows(prepared, start), start):
            good = float(desirable[list(window.members)].sum())
            window.counts |= {"desirable": good, "undesirable": len(window.members) - good}
            sides = tuple(side for side, name in SIDES.items() if window.counts[name])
            z0 = point.of(examples, window.members, step) if config.loss_type == KTO else 0.0
            window.micro_batches = [LabelledBatch(**vars(one), z0=z0, sides=sides) for one in window.micro_batches]
            window.metrics = {"kl": z0}
            yield window

    return replace(pairs, windows=windows, targets=desirable)


def labels_of(examples: Sequence[Example]) -> Tensor:
    """Whether each response is desirable: (examples,) 1 or 0."""
    return torch.tensor([float(bool(example.desirable)) for example in examples])
