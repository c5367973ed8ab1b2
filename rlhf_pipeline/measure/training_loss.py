"""How far the training loss of DPO models is above the best known loss on their data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_pipeline.config.dpo import DpoConfig
from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data.comparisons import Comparisons
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.measure.trained_on import owned_by, training_temperature
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.registry.adapters import four_bits_of
from rlhf_pipeline.registry.parents import parent_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import TrainingLoss
from rlhf_pipeline.stages.data import StageData, training_kind
from rlhf_pipeline.stages.population import Population
from rlhf_pipeline.stages.preference_pairs import label_probabilities
from rlhf_pipeline.training.pairs import Criterion, preference_loss, recorded_margins
from rlhf_pipeline.training.reference_cache import cached_logprobs, completion_logprob_sums

POPULATION_PAIRS = 4096


def trained_by_dpo(resolved: Resolved) -> bool:
    """Whether a model was trained by `rlhf dpo` and its manifest has the reference and beta."""
    made = None if resolved.method is not None else resolved.manifest
    return made is not None and made.stage == "dpo" and "reference" in made.parents and bool(made.config.get("beta"))


def _on_pairs(resolved: Resolved) -> bool:
    """Whether a model was `trained_by_dpo` by a loss on pairs or rankings; another loss has no minimum in common."""
    return trained_by_dpo(resolved) and resolved.config.get("loss_type") not in UNPAIRED


def dpo_reference(registry: Registry, resolved: Resolved) -> Resolved:
    """The reference of a model that was `trained_by_dpo`."""
    found = parent_of(registry, resolved, "reference")
    assert found is not None
    return found


def dpo_policies(bench: Bench, resolved: Resolved) -> tuple[Policy, Policy, dict[str, object]]:
    """A model that was `trained_by_dpo`, its reference as it was held in training, and the key of the latter's cache.

    Nothing is sampled: both are evaluated at the temperature that the policy was trained at.
    """
    assert resolved.manifest is not None
    reference, base = dpo_reference(bench.registry, resolved), resolved.manifest.parents.get("base")
    held = four_bits_of(resolved) if base is not None and base.digest == reference.digest else None
    temperature = training_temperature(resolved)
    known_as = reference.identity  # as in the DPO stage
    if known_as is not None and held is not None:
        known_as += f" {held}"
    key: dict[str, object] = {"model": known_as, "dtype": bench.config.dtype, "bf16": False}
    return bench.policy(resolved, temperature), bench.policy(reference, temperature, four_bits=held), key


def dpo_config(resolved: Resolved) -> DpoConfig:
    """The training config of a DPO model."""
    values = own_data(resolved)
    with owned_by(resolved, values, "leave its training loss out (--no-training-loss)"):
        return load_config("dpo", None, extra=values).of(DpoConfig)


def own_data(resolved: Resolved) -> dict[str, object]:
    """The values of a model's config, with collected data at the version that it was trained on."""
    values = {key: value for key, value in resolved.config.items() if value is not None}
    source = resolved.manifest.data[0].source if resolved.manifest and resolved.manifest.data else ""
    if source.startswith("collected:") and "dataset_name" in values:
        values["dataset_name"] = source
    return values


def problem_of(resolved: Resolved) -> tuple[object, ...]:
    """The data, reference, beta and loss of a DPO model; two models with the same ones can be compared."""
    manifest, config = resolved.manifest, dpo_config(resolved)
    assert manifest is not None
    keys = (
        *("beta", "loss_type", "loss_weights", "label_smoothing", "sft_weight", "f_divergence", "f_alpha"),
        *("simpo_gamma", "cpo_alpha"),
        *("soft_labels", "use_margin", "population_proposal", "max_train_samples"),
    )
    data = tuple(entry.digest for entry in manifest.data)
    return (manifest.parents["reference"].digest, data, *(getattr(config, key) for key in keys))


def _has_training_loss(resolved: Resolved) -> bool:
    """Whether the training loss follows from log-probabilities of whole responses, under a reference that stayed."""
    if not trained_by_dpo(resolved):
        return False
    config = dpo_config(resolved)
    return config.ld_alpha is None and not config.sync_ref_model


def _known_optimum(config: DpoConfig) -> bool:
    """Whether the loss of the exact optimum is known: of DPO on the population of the built-in world."""
    plain = config.loss_type == "sigmoid" and not config.label_smoothing and config.f_divergence == "reverse_kl"
    return config.population and plain


@torch.no_grad()
def training_loss(bench: Bench, resolved: Resolved) -> float:
    """Mean loss of a DPO model over its training pairs and rankings, with its SFT term.

    On the built-in world's population: over 4,096 pairs of it, drawn from a fixed seed, as the mean of
    KL(Bernoulli(p) || Bernoulli(sigma(h))) for the sigmoid loss without smoothing, which is the excess over the
    minimum, 0 at the exact optimum.
    """
    config = dpo_config(resolved)
    policy, frozen, key = dpo_policies(bench, resolved)
    data = StageData(config, bench.registry.home, lambda _: None)
    target: Tensor | None
    margin: Tensor | None = None
    least = 0.0  # the sum of the losses of the exact optimum, if it is known
    if config.population:
        prompts, _ = data.training(bench.tokenizer)
        population = Population(
            frozen,
            prompts,
            stop_id=bench.tokenizer.eos_token_id,
            response_length=config.sampled_lengths().response,
            beta=config.beta,
            proposal=config.population_proposal,
            device=bench.device,
            rows_at_once=bench.plan.responses_at_once,
            memory=bench.plan.memory,
        )
        examples: Sequence[Example]
        examples, facts = population.draw(POPULATION_PAIRS, torch.Generator().manual_seed(0))
        ref_logprobs, target = facts.ref_logprobs, facts.target
        if _known_optimum(config):
            least = float(torch.special.entr(torch.stack([facts.target, 1 - facts.target])).sum())
    else:
        examples, _ = data.training(bench.tokenizer)
        bench.compare_data(resolved, data.sources(training_kind(config)))
        ref_logprobs = cached_logprobs(frozen, examples, bench.registry.home / "cache", key, **bench.reading).logprobs
        target = label_probabilities(examples) if config.soft_labels else None
        margin = recorded_margins(examples) if config.use_margin else None
    logprobs = completion_logprob_sums(policy, examples, **bench.reading).double()
    compared = Comparisons.of(examples)
    criterion = Criterion.of(config)
    total = preference_loss(
        criterion,
        compared.gather(logprobs),
        compared.gather(ref_logprobs.double()),
        torch.tensor([len(ids) for example in examples for ids in example.completions]),
        compared,
        target=target,
        margin=margin,
    ).loss
    found = float(total) / len(examples) - least / len(examples)
    if criterion.sft_weight:
        chosen = sum(len(example.completions[0]) for example in examples)
        found -= criterion.sft_weight * float(logprobs[:, 0].sum()) / chosen
    return found


def excess_training_losses(
    bench: Bench, models: Sequence[Resolved], long_run: Resolved | None
) -> dict[str, TrainingLoss]:
    """The training loss of each DPO model and its excess over the best known loss, by label.

    The best known loss is the smallest of the models with the same data, reference, beta and loss, including
    `long_run`; a single model has no excess (None). On the world's population it is the loss of the exact optimum.
    """
    measured = [model for model in models if _has_training_loss(model) and _on_pairs(model)]
    candidates = list(measured)
    if long_run is not None and _on_pairs(long_run) and long_run.label not in {model.label for model in candidates}:
        candidates.append(long_run)
    losses = {model.label: training_loss(bench, model) for model in candidates}
    result = {}
    for model in measured:
        peers = [other for other in candidates if problem_of(other) == problem_of(model)]
        best = min(peers, key=lambda other: losses[other.label])
        exact = _known_optimum(dpo_config(model))
        known = exact or len(peers) > 1
        result[model.label] = TrainingLoss(
            training_loss=losses[model.label],
            best="exact optimum" if exact else best.label,
            excess=(losses[model.label] - (0.0 if exact else losses[best.label])) if known else None,
        )
    return result
