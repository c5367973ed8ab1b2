"""`rlhf exact`: models of the built-in world against the optimum that is known in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_pipeline.errors import ConfigError, Fault, RunFailed
from rlhf_pipeline.evaluation.best_of_n import ChooserLaw
from rlhf_pipeline.evaluation.optimum import (
    Frontier,
    RewardLaw,
    beta_grid,
    frontier,
    kl_divergence,
    optimum,
    policy_figures,
)
from rlhf_pipeline.measure.bench import set_up
from rlhf_pipeline.measure.leaves import TRUTH, Leaves, Reward, trained_reward
from rlhf_pipeline.measure.training_loss import excess_training_losses, trained_by_dpo
from rlhf_pipeline.models.sharing import sharing_models
from rlhf_pipeline.registry.parents import beta_of, reference_of, reward_model_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.roles import role_of
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.reward_names import WORLD_NAMES
from rlhf_pipeline.stages.common import find_model
from rlhf_pipeline.training.run import make_accelerator
from rlhf_pipeline.training.tracking import console, jsonable

FRONTIER_TOLERANCE = 1e-4
"""What rounding in fp32 log-probabilities may lift a policy above the frontier, in units of reward."""

FIGURES = ("reward", "kl", "objective", "gap", "attainable")


@dataclass
class Judge:
    """What models are set against: the tables, the reward of the objective, and a reward model for the rest.

    few: prompts of the figures that need a reward model's score of every response.
    """

    leaves: Leaves
    reward: Reward
    beta: float | None  # asked for, for all models
    usual_beta: float  # of models that were not trained at one
    reward_model: str | None
    few: int
    reward_models: Mapping[str, str] = field(default_factory=dict)  # by policy, where seeds have one each
    frontiers: dict[int, Frontier] = field(default_factory=dict)

    def beta_for(self, model: Resolved) -> float:
        """The beta that a model is judged at: the one asked for, else its own, else that of the first that has one."""
        return self.beta or beta_of(model) or self.usual_beta

    def learned_for(self, model: Resolved) -> str | None:
        """The reward model that a DPO policy is set against: that of its seed, else the one of all."""
        return self.reward_models.get(model.label, self.reward_model)

    def count(self, reward: Reward) -> int:
        """How many prompts a figure over this reward is taken over."""
        learned = any(source != "world" for _, source in reward)
        total = len(self.leaves.prompts)
        return min(self.few, total) if learned else total

    def frontier(self, count: int) -> Frontier:
        """The Gibbs frontier of the objective's reward over the first `count` prompts."""
        if count not in self.frontiers:
            laws = [RewardLaw.of(self.leaves.reference[i], self.leaves.reward(self.reward, i)) for i in range(count)]
            self.frontiers[count] = frontier(laws, beta_grid())
        return self.frontiers[count]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def objective_row(judge: Judge, logprobs: list[Tensor], beta: float) -> dict[str, Any]:
    """Expected reward, KL, objective and gap of a policy, means over prompts, and the same prompt by prompt.

    share = (J - J_ref) / (J* - J_ref) of the means: 1 at the optimum, 0 at the reference.

    Raises:
        RunFailed: when the policy has more reward than its KL allows: no policy can.
    """
    count = min(judge.count(judge.reward), len(logprobs))
    found = [
        policy_figures(logprobs[i], judge.leaves.reference[i], judge.leaves.reward(judge.reward, i), beta)
        for i in range(count)
    ]
    row: dict[str, Any] = {name: _mean([getattr(item, name) for item in found]) for name in FIGURES}
    row["share"] = 1.0 - row["gap"] / row["attainable"] if row["attainable"] > 0 else None
    row["prompts"] = count
    row["per_prompt"] = {name: [getattr(item, name) for item in found] for name in FIGURES}
    row["below_frontier"] = judge.frontier(count).bound(row["kl"]) - row["reward"]
    if row["below_frontier"] < -FRONTIER_TOLERANCE:
        raise RunFailed(
            f"a policy of mean reward {row['reward']:.6f} at a KL of {row['kl']:.6f} lies above the exact frontier by "
            f"{-row['below_frontier']:.2g}: no policy can, so a figure is wrong; please report it"
        )
    return row


def gap_to(judge: Judge, logprobs: list[Tensor], reward: Reward, beta: float) -> dict[str, Any]:
    """beta KL(pi || pi*_reward), mean over the prompts that this reward allows for."""
    count = min(judge.count(reward), len(logprobs))
    leaves = judge.leaves
    values = [
        beta * kl_divergence(logprobs[i], optimum(leaves.reference[i], leaves.reward(reward, i), beta))
        for i in range(count)
    ]
    return {"value": _mean(values), "prompts": count, "reward": [[weight, source] for weight, source in reward]}


def policy_row(judge: Judge, resolved: Resolved, beta: float) -> dict[str, Any]:
    """All exact figures of one policy."""
    policy = judge.leaves.bench.policy(resolved)
    logprobs = [judge.leaves.logprobs(policy, index) for index in range(len(judge.leaves.prompts))]
    row = objective_row(judge, logprobs, beta) | {"gap_true": gap_to(judge, logprobs, TRUTH, beta)}
    trained_on = trained_reward(judge.leaves.bench.registry, resolved)
    learned = judge.learned_for(resolved)
    if trained_on is not None:
        row["optimisation_gap"] = gap_to(judge, logprobs, trained_on, beta)
    if trained_by_dpo(resolved) and learned is not None:
        row["disagreement"] = gap_to(judge, logprobs, ((1.0, learned),), beta)
    for part in ("optimisation_gap", "disagreement"):
        if part in row:  # the total over the same prompts, so that the two can be read side by side
            row["gap_true_there"] = gap_to(judge, logprobs[: row[part]["prompts"]], TRUTH, beta)
    return row


def reward_model_row(judge: Judge, resolved: Resolved, beta: float) -> dict[str, Any]:
    """The optimum under a reward model, judged as a policy: the best that training on it can lead to."""
    own: Reward = ((1.0, resolved.label),)
    leaves = judge.leaves
    logprobs = [optimum(leaves.reference[i], leaves.reward(own, i), beta) for i in range(judge.count(own))]
    return objective_row(judge, logprobs, beta) | {"gap_true": gap_to(judge, logprobs, TRUTH, beta)}


def optimum_row(judge: Judge, beta: float) -> dict[str, Any]:
    """The optimum itself."""
    leaves, count = judge.leaves, judge.count(judge.reward)
    logprobs = [optimum(leaves.reference[i], leaves.reward(judge.reward, i), beta) for i in range(count)]
    return objective_row(judge, logprobs, beta) | {"gap_true": gap_to(judge, logprobs, TRUTH, beta)}


def best_of_n_exactly(judge: Judge, sizes: Sequence[int]) -> list[dict[str, Any]]:
    """Best-of-n of the reference, without sampling: chosen by the reward model where there is one, judged by the
    objective's reward."""
    chooser: Reward = TRUTH if judge.reward_model is None else ((1.0, judge.reward_model),)
    count, leaves = min(judge.count(chooser), judge.count(judge.reward)), judge.leaves
    laws = [
        ChooserLaw.of(
            leaves.reward(chooser, i).numpy(), leaves.reward(judge.reward, i).numpy(), leaves.reference[i].numpy()
        )
        for i in range(count)
    ]
    rows = []
    for n in sizes:
        found = [law.best_of(n) for law in laws]
        row = {"n": n, "chosen_by": chooser[0][1], "prompts": count}
        rows.append(row | {"reward": _mean([value for value, _ in found]), "kl": _mean([kl for _, kl in found])})
    return rows


def exact_figures(
    judge: Judge, models: list[Resolved], excess: dict[str, Any] | None = None, best_of: Sequence[int] = ()
) -> dict[str, Any]:
    """One row for each model, one for the optimum at each beta that occurs, and the frontier that none may cross."""
    bench, rows = judge.leaves.bench, []
    for model in models:
        beta = judge.beta_for(model)
        make = reward_model_row if role_of(model)[0] == "reward_model" else policy_row
        row = {"name": model.label, "model": model.label, "stage": model.stage, "digest": model.digest, "beta": beta}
        rows.append(row | make(judge, model, beta) | {"training_loss": (excess or {}).get(model.label)})
        bench.say(f"measured {model.label} exactly")
    for beta in sorted({row["beta"] for row in rows}):
        row = {"name": "optimum", "model": None, "stage": "optimum", "digest": None, "beta": beta}
        rows.append(row | optimum_row(judge, beta) | {"training_loss": None})
    curve = judge.frontier(judge.count(judge.reward))
    return {
        "reward": " + ".join(source if weight == 1 else f"{weight:g} {source}" for weight, source in judge.reward),
        "reference": judge.leaves.reference_model.label,
        "reward_model": judge.reward_model,
        "prompts": len(bench.plan.prompts),
        "reward_model_prompts": min(judge.few, len(bench.plan.prompts)),
        "responses": judge.leaves.tree.num_leaves,
        "temperature": bench.config.temperature,
        "rows": rows,
        "best_of_n": best_of_n_exactly(judge, best_of),
        "frontier": {"beta": curve.betas.tolist(), "reward": curve.reward.tolist(), "kl": curve.kl.tolist()},
    }


@sharing_models()
def run_exact(references: list[str], config: Any, home: Path, *, quiet: bool = False) -> dict[str, Any]:
    """Exact figures of policies and reward models, as a dict that JSON can hold."""

    def say(text: str) -> None:
        if not quiet:
            console.print(text, markup=False)

    # 1. Models, their reference, prompts.
    registry = Registry(home)
    device = make_accelerator(config).device
    models = [_find(registry, text, say) for text in references]
    reference = find_model(registry, config.reference, "policy", say=say) if config.reference else None
    long_run = find_model(registry, config.long_run, "policy") if config.long_run else None
    if long_run is not None and not trained_by_dpo(long_run):
        expected = "a DPO model, whose manifest names its reference and its beta"
        raise ConfigError(Fault("long_run", f"{long_run.label} does not say that `rlhf dpo` trained it", expected))
    known = [found for model in models if (found := reference_of(registry, model)) is not None]
    reference = reference or next(iter(known), None)
    if reference is None:
        raise ConfigError(Fault(models[0].label, "its reference is not known", "--reference REF, the frozen SFT model"))
    for model, found in ((model, reference_of(registry, model)) for model in models):
        if found is not None and found.digest != reference.digest:
            say(f"note: {model.label} was trained against {found.label}; KL is measured to {reference.label} for all")
    bench = set_up(registry, config, reference, device, reference=reference, samples=0, seed=0, say=say)

    # 2. What they are set against; 3. rows.
    reward: Reward = TRUTH
    if config.reward not in WORLD_NAMES:
        reward = ((1.0, find_model(registry, config.reward, "reward_model", say=say).label),)
    learned = [model.label for model in models if role_of(model)[0] == "reward_model"]
    betas = [beta for model in models if (beta := beta_of(model)) is not None]
    usual_beta = betas[0] if betas else config.beta
    if usual_beta is None:
        raise ConfigError(Fault("beta", "none of these models was trained at a beta", "--beta B, the price of KL"))
    judge = Judge(
        Leaves.of(bench),
        reward,
        beta=config.beta,
        usual_beta=usual_beta,
        reward_model=config.reward_model or reward_model_of(registry, models) or next(iter(learned), None),
        few=config.reward_model_prompts,
    )
    excess = excess_training_losses(bench, models, long_run) if config.training_loss else None
    figures = exact_figures(judge, models, excess)
    return jsonable({"split": config.split, "data_changed": bench.data_changed, **figures})


def _find(registry: Registry, text: str, say: Any) -> Resolved:
    role, _ = role_of(registry.resolve(text))
    return find_model(registry, text, "reward_model" if role == "reward_model" else "policy", say=say)
