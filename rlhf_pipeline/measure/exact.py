"""`rlhf exact`: compare models of the built-in world with the optimum, which is known in closed form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean

from torch import Tensor

from rlhf_pipeline.algorithms.preference import OBJECTIVES
from rlhf_pipeline.config.compare import ExactConfig
from rlhf_pipeline.config.reward_names import WORLD_NAMES
from rlhf_pipeline.errors import ConfigError, Fault, RunFailed
from rlhf_pipeline.evaluation.best_of_n import ChooserLaw
from rlhf_pipeline.evaluation.closed_forms import (
    GibbsFrontier,
    RewardLaw,
    beta_grid,
    frontier,
    kl_divergence,
    optimum,
    policy_figures,
)
from rlhf_pipeline.measure.bench import set_up
from rlhf_pipeline.measure.kept import identity_of, keep
from rlhf_pipeline.measure.leaves import TRUTH, Leaves, Reward, trained_reward
from rlhf_pipeline.measure.training_loss import excess_training_losses, trained_by_dpo
from rlhf_pipeline.models.sharing import sharing_models
from rlhf_pipeline.registry.optimum import own_moves
from rlhf_pipeline.registry.parents import beta_of, reference_of, rescaled_beta, reward_model_keys
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import role_of
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.report.figures import Exact, ExactBestOfN, ExactPerPrompt, ExactRow, Gap, Gibbs, TrainingLoss
from rlhf_pipeline.report.results import ExactResults
from rlhf_pipeline.stages.common import find_model
from rlhf_pipeline.training.accelerator import make_accelerator
from rlhf_pipeline.training.tracking import console

FRONTIER_TOLERANCE = 1e-4
"""Tolerance for a policy above the exact frontier, for rounding of fp32 log-probabilities, in units of reward."""


@dataclass
class ExactBench:
    """What models are compared with: the tables, the reward of the objective, and reward models.

    Args:
        few: number of prompts for figures that need a reward model's score of every response.
    """

    leaves: Leaves
    reward: Reward
    beta: float | None  # from the config, for all models; None: the one that each was trained at
    usual_beta: float  # of models that were not trained at a beta
    reward_model: str | None  # that DPO policies are compared with
    few: int
    reward_models: Mapping[str, str] = field(default_factory=dict)  # by policy, if each seed has its own
    frontiers: dict[int, GibbsFrontier] = field(default_factory=dict)

    def beta_of(self, model: Resolved) -> float:
        """The beta at which a model is measured: in units of the scores as they were before PPO scaled them."""
        return self.beta or rescaled_beta(model) or beta_of(model) or self.usual_beta

    def count(self, reward: Reward) -> int:
        """Number of prompts of the figures for this reward."""
        learned = any(source != "world" for _, source in reward)
        total = len(self.leaves.prompts)
        return min(self.few, total) if learned else total

    def frontier(self, count: int) -> GibbsFrontier:
        """The Gibbs frontier of the objective's reward over the first `count` prompts."""
        if count not in self.frontiers:
            laws = [RewardLaw.of(self.leaves.reference[i], self.leaves.reward(self.reward, i)) for i in range(count)]
            self.frontiers[count] = frontier(laws, beta_grid())
        return self.frontiers[count]


def exact_row(exact: ExactBench, model: Resolved | None, logprobs: Sequence[Tensor], beta: float) -> ExactRow:
    """Expected reward, KL, objective and gap of a policy, as means over prompts and for each prompt.

    share = (J - J_ref) / (J* - J_ref) of the means: 1 at the optimum, 0 at the reference.

    Args:
        model: None for the optimum. logprobs: for each prompt, the log-probabilities of all responses, (L,).

    Raises:
        RunFailed: the policy has more reward than is possible at its KL, so a figure is wrong.
    """
    leaves, label = exact.leaves, None if model is None else model.label
    count = min(exact.count(exact.reward), len(logprobs))
    found = [
        policy_figures(logprobs[i], leaves.reference[i], leaves.reward(exact.reward, i), beta) for i in range(count)
    ]
    per_prompt = {name: [getattr(item, name) for item in found] for name in ExactPerPrompt.model_fields}
    means = {name: fmean(values) for name, values in per_prompt.items()}
    below = exact.frontier(count).bound(means["kl"]) - means["reward"]
    if below < -FRONTIER_TOLERANCE:
        raise RunFailed(
            f"a policy of mean reward {means['reward']:.6f} at a KL of {means['kl']:.6f} lies above the exact frontier "
            f"by {-below:.2g}: no policy can, so a figure is wrong; please report it"
        )
    return ExactRow(
        name=label or "optimum",
        model=label,
        stage="optimum" if model is None else model.stage,
        digest=None if model is None else model.digest,
        beta=beta,
        reward=means["reward"],
        kl=means["kl"],
        objective=means["objective"],
        gap=means["gap"],
        attainable=means["attainable"],
        share=1.0 - means["gap"] / means["attainable"] if means["attainable"] > 0 else None,
        prompts=count,
        per_prompt=ExactPerPrompt(**per_prompt),
        below_frontier=below,
        gap_true=gap_to(exact, logprobs, TRUTH, beta),
        training_loss=None,
    )


def gap_to(exact: ExactBench, logprobs: Sequence[Tensor], reward: Reward, beta: float) -> Gap:
    """beta KL(pi || pi*_reward), the mean over the prompts of this reward."""
    count = min(exact.count(reward), len(logprobs))
    leaves = exact.leaves
    values = [
        beta * kl_divergence(logprobs[i], optimum(leaves.reference[i], leaves.reward(reward, i), beta))
        for i in range(count)
    ]
    return Gap(value=fmean(values), prompts=count, reward=list(reward))


def policy_row(exact: ExactBench, resolved: Resolved, beta: float) -> ExactRow:
    """All exact figures of one policy."""
    policy = exact.leaves.bench.policy(resolved)
    logprobs = [exact.leaves.logprobs(policy, index) for index in range(len(exact.leaves.prompts))]
    trained_on = trained_reward(exact.leaves.bench.registry, resolved)
    learned = exact.reward_models.get(resolved.label, exact.reward_model)
    parts: dict[str, Gap] = {}
    if trained_on is not None:
        parts["optimisation_gap"] = gap_to(exact, logprobs, trained_on, beta)
    if trained_by_dpo(resolved) and learned is not None and not _aims_elsewhere(resolved):
        parts["disagreement"] = gap_to(exact, logprobs, ((1.0, learned),), beta)
    for part in list(parts.values()):  # the total over the same prompts, so that the two can be compared
        parts["gap_true_there"] = gap_to(exact, logprobs[: part.prompts], TRUTH, beta)
    return exact_row(exact, resolved, logprobs, beta).model_copy(update=parts)


def _aims_elsewhere(resolved: Resolved) -> bool:
    """Whether the optimum of a DPO model is of another kind than that of a reward at some beta."""
    assert resolved.manifest is not None
    loss = resolved.manifest.config.get("loss_type")
    known = isinstance(loss, str) and loss in OBJECTIVES and OBJECTIVES[loss].optimum != "other"
    return not known or bool(own_moves(resolved.manifest).keys() - {"loss_type", "label_smoothing"})


def kept_row(exact: ExactBench, resolved: Resolved | None, beta: float, *, wait: bool = True) -> ExactRow:
    """`policy_row` of a policy, or `optimum_row` of the objective (None), from the cache if it is there.

    Raises:
        Busy: see `keep`.
    """
    bench, reference = exact.leaves.bench, exact.leaves.reference_model
    models = {f"reference {reference.label}": reference.identity}
    trained_on: Reward | None = None
    learned: str | None = None
    if resolved is not None:
        trained_on = trained_reward(bench.registry, resolved)
        learned = exact.reward_models.get(resolved.label, exact.reward_model)
        models[resolved.label] = resolved.identity
    sources = [source for reward in (exact.reward, trained_on or ()) for _, source in reward]
    models |= {source: identity_of(bench, source) for source in [*sources, *([learned] if learned else [])]}
    more = {"policy": resolved and resolved.label, "beta": beta, "reward": exact.reward, "trained_on": trained_on}
    more |= {"learned": learned, "few": exact.few}

    def make() -> object:
        row = optimum_row(exact, None, beta) if resolved is None else policy_row(exact, resolved, beta)
        return row.model_dump(mode="json", exclude_unset=True)

    return ExactRow.model_validate(keep(bench, "exact figures", models, make, wait=wait, **more))


def optimum_row(exact: ExactBench, model: Resolved | None, beta: float) -> ExactRow:
    """Measure the optimum under a reward model as a policy: the best result of training on this reward model.

    Args:
        model: None for the optimum of the objective itself.
    """
    own: Reward = exact.reward if model is None else ((1.0, model.label),)
    leaves = exact.leaves
    logprobs = [optimum(leaves.reference[i], leaves.reward(own, i), beta) for i in range(exact.count(own))]
    return exact_row(exact, model, logprobs, beta)


def best_of_n_exactly(exact: ExactBench, sizes: Sequence[int]) -> list[ExactBestOfN]:
    """Best-of-n of the reference, computed without sampling: chosen by the reward model if there is one, scored by the
    objective's reward."""
    chooser: Reward = TRUTH if exact.reward_model is None else ((1.0, exact.reward_model),)
    count, leaves = min(exact.count(chooser), exact.count(exact.reward)), exact.leaves
    laws = [
        ChooserLaw.of(
            leaves.reward(chooser, i).numpy(), leaves.reward(exact.reward, i).numpy(), leaves.reference[i].numpy()
        )
        for i in range(count)
    ]
    rows = []
    for n in sizes:
        found = [law.best_of(n) for law in laws]
        reward, kl = (fmean(values) for values in zip(*found, strict=True))
        rows.append(ExactBestOfN(n=n, chosen_by=chooser[0][1], prompts=count, reward=reward, kl=kl))
    return rows


def measured_exactly(exact: ExactBench, models: Sequence[Resolved]) -> list[tuple[Resolved | None, float]]:
    """The models that have exact figures, each with its beta; then None, the optimum, with each of these betas."""
    betas = [exact.beta_of(model) for model in models]
    return [*zip(models, betas, strict=True), *((None, beta) for beta in sorted(set(betas)))]


def exact_figures(
    exact: ExactBench, models: Sequence[Resolved], losses: Mapping[str, TrainingLoss], best_of: Sequence[int] = ()
) -> Exact:
    """One row for each model, one for the optimum at each beta, and the exact frontier."""
    bench, rows = exact.leaves.bench, []
    for model, beta in measured_exactly(exact, models):
        if model is None:
            rows.append(kept_row(exact, None, beta))
            continue
        if role_of(model)[0] == "reward_model":
            rows.append(optimum_row(exact, model, beta))
        else:
            rows.append(kept_row(exact, model, beta).model_copy(update={"training_loss": losses.get(model.label)}))
        bench.say(f"measured {model.label} exactly")
    curve = exact.frontier(exact.count(exact.reward))
    return Exact(
        reward=" + ".join(source if weight == 1 else f"{weight:g} {source}" for weight, source in exact.reward),
        reference=exact.leaves.reference_model.label,
        reward_model=exact.reward_model,
        prompts=len(bench.plan.prompts),
        reward_model_prompts=min(exact.few, len(bench.plan.prompts)),
        responses=exact.leaves.tree.num_leaves,
        temperature=bench.config.temperature,
        rows=rows,
        best_of_n=best_of_n_exactly(exact, best_of),
        frontier=Gibbs(beta=curve.betas.tolist(), reward=curve.reward.tolist(), kl=curve.kl.tolist()),
    )


@sharing_models()
def run_exact(references: list[str], config: ExactConfig, home: Path) -> ExactResults:
    """Exact figures of policies and reward models."""
    say = partial(console.print, markup=False)
    # 1. Models, their reference, prompts.
    registry = Registry(home)
    device = make_accelerator(config).device
    models = [_find(registry, text, say) for text in references]
    reference = find_model(registry, config.reference, "policy", say=say) if config.reference else None
    long_run = find_model(registry, config.long_run, "policy") if config.long_run else None
    if long_run is not None and not trained_by_dpo(long_run):
        expected = "a DPO model, whose manifest names its reference and its beta"
        raise ConfigError(Fault("long_run", f"{long_run.label} was not trained by `rlhf dpo`", expected))
    known = [(model, found) for model in models if (found := reference_of(registry, model)) is not None]
    reference = reference or next((found for _, found in known), None)
    if reference is None:
        raise ConfigError(Fault(models[0].label, "its reference is not known", "--reference REF, the frozen SFT model"))
    for model, found in known:
        if found.digest != reference.digest:
            say(f"note: {model.label} was trained with {found.label}; KL is measured to {reference.label} for all")
    bench = set_up(registry, config, reference, device, reference=reference, samples=0, seed=0, say=say)

    # 2. What they are compared with; 3. rows.
    reward: Reward = TRUTH
    if config.reward not in WORLD_NAMES:
        reward = ((1.0, find_model(registry, config.reward, "reward_model", say=say).label),)
    learned = [model.label for model in models if role_of(model)[0] == "reward_model"]
    betas = [beta for model in models if (beta := beta_of(model)) is not None]
    usual_beta = betas[0] if betas else config.beta
    if usual_beta is None:
        raise ConfigError(Fault("beta", "none of these models was trained at a beta", "--beta B"))
    trained_on = reward_model_keys(registry, models).get("reward_model")
    exact = ExactBench(
        Leaves.of(bench),
        reward,
        beta=config.beta,
        usual_beta=usual_beta,
        reward_model=config.reward_model or trained_on or next(iter(learned), None),
        few=config.reward_model_prompts,
    )
    losses = excess_training_losses(bench, models, long_run) if config.training_loss else {}
    figures = exact_figures(exact, models, losses)
    return ExactResults(split=config.split, data_changed=bench.data_changed, **dict(figures))


def _find(registry: Registry, text: str, say: Callable[[str], None]) -> Resolved:
    role, _ = role_of(registry.resolve(text))
    return find_model(registry, text, "reward_model" if role == "reward_model" else "policy", say=say)
