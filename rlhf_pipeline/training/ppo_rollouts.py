"""The steps of PPO's rollouts: sample responses, run the models, cut windows, compute metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.algorithms.kl import adapted_kl_coef
from rlhf_pipeline.algorithms.moments import Moments
from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.data.batch import PackedBatch, merge_prompts, micro_batches, pack, reads
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import ActorCritic, Policy
from rlhf_pipeline.models.sharding import whole_actor
from rlhf_pipeline.rollout.functions import functions_of
from rlhf_pipeline.rollout.responses import answered, logprob_matrix, one_by_one, prompts_run, sample_for_prompts
from rlhf_pipeline.rollout.rewards import BadScores, RewardSource
from rlhf_pipeline.rollout.rollout import Estimates, Rollout, rollout_metrics, sampler_metrics
from rlhf_pipeline.rollout.vllm_engine import VllmEngine
from rlhf_pipeline.training.cost import JUDGE, CostMeter, ModelShape
from rlhf_pipeline.training.ppo_batches import Minibatches, PpoBatch, Sampled, Scored, cut_rows
from rlhf_pipeline.training.tracking import logged
from rlhf_pipeline.training.windows import Window, epoch_order


@dataclass(frozen=True)
class Judge:
    """A reward source that scores the logged rollouts and does not affect training.

    shape: the shape of its model, for its own cost; None for a function.
    """

    source: RewardSource
    shape: ModelShape | None


@dataclass
class PpoSetup:
    """The models and prompts of a PPO run, and the resources of this process.

    actor_critic: the module itself; the functions below also get the wrapped one. reward: scores whole responses.
    engine: samples instead of the policy. judge: scores the logged rollouts; nothing is trained on it. stream: the
    examples of the pretraining stream. kl_coef: beta of the next rollout, which changes with kl_target. moments: those
    of all scores before the next rollout, with normalize_rewards. shapes: the shapes of the models by role, for the
    cost. autocast: the precision of training. reduce: sums over all processes. together: runs work on every process; if
    it fails on one, it fails on all.
    """

    config: PpoConfig
    actor_critic: ActorCritic
    reference: Policy
    reward: RewardSource
    prompts: Sequence[Example]
    stop_ids: Sequence[int]
    meter: CostMeter
    shapes: dict[str, ModelShape]
    engine: VllmEngine | None = None
    judge: Judge | None = None
    stream: Sequence[Example] = ()
    memory: Memory = field(default_factory=Memory)
    device: torch.device | str = "cpu"
    autocast: Callable[[], AbstractContextManager] = nullcontext
    rank: int = 0
    world_size: int = 1
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums
    together: Callable[[Callable[[], Any]], Any] = lambda work: work()
    kl_coef: float = field(init=False)
    moments: Moments = field(init=False, default_factory=Moments)

    def __post_init__(self) -> None:
        self.kl_coef = self.config.kl_coef

    def adapt(self, metrics: Mapping[str, float]) -> None:
        """With `kl_target`, set the penalty of the rollout that follows the one with these metrics."""
        config = self.config
        if config.kl_target is not None and config.kl_horizon is not None:
            aim: dict[str, Any] = {"target": config.kl_target, "horizon": config.kl_horizon}
            before, episodes = metrics["objective/kl_coef"], config.rollout_batch_size
            self.kl_coef = adapted_kl_coef(before, metrics["objective/kl"], episodes=episodes, **aim)

    def generator(self, update: int, purpose: int) -> torch.Generator:
        """The generator for one purpose of an update (0: sampling, 1: shuffling), from seed, update and process."""
        seed = ((self.config.seed * 1_000_003 + update) * 8 + purpose) * 4096 + self.rank
        return torch.Generator().manual_seed(seed % 2**63)

    def close(self) -> None:
        """End the engine, if there is one."""
        if self.engine is not None:
            self.engine.close()

    def pack(self, chosen: Sequence[Example]) -> PackedBatch:
        """Responses as a batch for actor and critic."""
        layout = self.actor_critic.reader.layout
        # With a length x length mask, a tree of many responses costs more than it saves.
        trees = merge_prompts(chosen) if layout == "flat" else chosen
        return pack(trees, layout=layout).to(self.device)


def prompts_of(setup: PpoSetup, update: int) -> list[Example]:
    """This process's prompts for an update: consecutive prompts from passes over all prompts, each pass shuffled."""
    size = setup.config.prompts_per_rollout
    orders: dict[int, list[int]] = {}
    chosen = []
    for place in range(update * size, (update + 1) * size):
        epoch, index = divmod(place, len(setup.prompts))
        if epoch not in orders:
            orders[epoch] = epoch_order(len(setup.prompts), setup.config.seed, epoch)
        chosen.append(setup.prompts[orders[epoch][index]])
    return chosen[setup.rank :: setup.world_size]


def sample_responses(setup: PpoSetup, module: nn.Module, update: int) -> Sampled:
    """Sample `num_generations` responses from the policy (or the engine with its weights) to each prompt of an update.

    The examples have one response each; those to one prompt are neighbours.

    Raises:
        RunFailed: memory ran out.
    """

    def sampled() -> Sampled:
        with setup.meter.part("generation"):
            found, prompts = _sample(setup, module, update)
            setup.meter.generate(setup.shapes["actor"], found.examples, prompts)
        return found

    return setup.together(sampled)


def _sample(setup: PpoSetup, module: nn.Module, update: int) -> tuple[Sampled, list[int] | None]:
    """The responses, and the lengths of the prompts that were run (None: one prompt per response)."""
    config, prompts = setup.config, prompts_of(setup, update)
    width = config.lengths().response
    options: dict[str, Any] = {"samples": config.num_generations, "response_length": width, "stop_ids": setup.stop_ids}
    options |= {"generator": setup.generator(update, 0), "temperature": config.temperature}
    if setup.engine is not None:
        setup.engine.load_weights(setup.actor_critic)
        tokens = setup.actor_critic.reader.tokens
        drawn = setup.engine.generate([prompt.prompt_ids for prompt in prompts], tokens=tokens, **options)
        examples, _ = answered(prompts, drawn)
        return Sampled(one_by_one(examples), logprob_matrix(drawn, width).to(setup.device)), None
    at_once: dict[str, Any] = {"responses_at_once": len(prompts) * config.num_generations, "memory": setup.memory}
    options |= {"device": setup.device, "module": module}
    with whole_actor(setup.actor_critic):
        examples, _ = sample_for_prompts(setup.actor_critic, prompts, **options, **at_once)
    return Sampled(one_by_one(examples)), prompts_run(
        setup.actor_critic, examples, **at_once, response_length=width, device=setup.device
    )


def shuffled_minibatches(setup: PpoSetup, sampled: Sampled, update: int) -> list[Minibatches]:
    """A random partition of the responses for each epoch: minibatches of micro-batches of row numbers.

    The responses to one prompt stay together: prompts are shuffled, and micro-batches are made of whole trees.
    """
    config, examples, shuffle = setup.config, sampled.examples, setup.generator(update, 1)
    group, tree = config.num_generations, config.responses_per_tree(setup.world_size)
    epochs = []
    for _ in range(config.num_ppo_epochs):
        prompts = torch.randperm(len(examples) // group, generator=shuffle).tolist()
        order = [prompt * group + number for prompt in prompts for number in range(group)]
        size = len(order) // config.num_mini_batches
        minibatches = []
        for start in range(0, len(order), size):
            members = [order[first : first + tree] for first in range(start, start + size, tree)]
            trees = [merge_prompts([examples[i] for i in rows])[0] for rows in members]
            groups = micro_batches(trees, config.per_device_train_batch_size // tree, config.micro_batch_tokens)
            rows = [[i for number in numbers for i in members[number]] for numbers in groups]
            # Responses to one prompt are adjacent, so that they share it.
            minibatches.append([sorted(group, key=lambda row: (examples[row].prompt_ids, row)) for group in rows])
        epochs.append(minibatches)
    return epochs


def score_responses(
    setup: PpoSetup, module: nn.Module, update: int, sampled: Sampled, epochs: list[Minibatches]
) -> Scored:
    """Score the responses with policy, reference, critic and reward, using the forward pass of training.

    The micro-batches of the first epoch are packed once, scored and then trained on, so the first ratio is 1.

    Raises:
        NotFinite: a reward, value or log-probability (also of the sampler) is not finite. RunFailed: memory ran out.
    """

    def attempt(halvings: int) -> tuple[Scored, BadScores | None]:
        cut = [[cut_rows(minibatch, halvings) for minibatch in minibatches] for minibatches in epochs]
        first = [[setup.pack([sampled.examples[i] for i in rows]) for rows in minibatch] for minibatch in cut[0]]
        for function in functions_of(setup.reward):
            function.at(update, setup.config.updates)
        rollout, refused = run_models(setup, module, sampled, cut[0], first)
        return Scored(update, rollout, cut, first, halvings), refused

    def scored() -> Scored:
        with setup.meter.part("scoring"), setup.autocast():
            found, refused = setup.memory.repeat("training", attempt)
        rollout = found.rollout
        rewards = f"rewards of {(refused or setup.reward).label}"
        named = {rewards: rollout.scores, "log-probabilities of the policy": rollout.logprobs}
        if rollout.sampler_logprobs is not None:
            named["log-probabilities of the sampler"] = rollout.sampler_logprobs
        named["log-probabilities of the reference"] = rollout.ref_logprobs
        if rollout.values is not None:
            named["values"] = rollout.values
        found.require_finite(named, setup.actor_critic, {rewards: str(refused or "")})
        return found

    return setup.together(scored)


@torch.no_grad()
def run_models(
    setup: PpoSetup, module: nn.Module, sampled: Sampled, minibatches: Minibatches, packed: list[list[PackedBatch]]
) -> tuple[Rollout, BadScores | None]:
    """The rollout, and the first error about rewards that are not finite, which `score_responses` raises."""
    examples, width = sampled.examples, setup.config.lengths().response
    count, device = len(examples), setup.device
    names = ("logprobs", "ref_logprobs", "entropy", *(["values"] if setup.config.has_critic else []))
    matrices = {name: torch.zeros(count, width, device=device) for name in names}
    scores = torch.zeros(count, device=device)
    lengths = torch.zeros(count, dtype=torch.long, device=device)
    refused: BadScores | None = None
    for minibatch, batches in zip(minibatches, packed, strict=True):
        for rows, batch in zip(minibatch, batches, strict=True):
            setup.memory.holds(len(rows))
            chosen, index = [examples[i] for i in rows], torch.tensor(rows, device=device)
            policy, layout = module(batch), setup.reference.reader.layout
            readable = batch if reads(layout, batch) else pack(chosen, layout=layout).to(device)
            reference = setup.reference(readable)
            found = {**vars(policy), "ref_logprobs": reference.logprobs}
            for name, matrix in matrices.items():
                matrix[index] = batch.padded(found[name], width).to(matrix.dtype)
            try:
                scores[index] = setup.reward.score(chosen, batch).to(scores)
            except BadScores as bad:
                scores[index] = bad.scores.to(scores)
                refused = refused or bad
            lengths[index] = batch.lengths
            for shape in setup.shapes.values():
                setup.meter.score(shape, batch)
    ended = torch.tensor([example.ended[0] for example in examples], device=device)
    values = matrices.pop("values", None)
    rollout = Rollout(
        examples=examples,
        mask=torch.arange(width, device=device) < lengths[:, None],
        ended=ended,
        scores=scores,
        sampler_logprobs=sampled.logprobs,
        values=values,
        **matrices,
    )
    return rollout, refused


def check_and_describe(setup: PpoSetup, scored: Scored, estimates: Estimates) -> dict[str, float]:
    """The metrics of a rollout, including those of the judge.

    Raises:
        NotFinite: an advantage or return is not finite.
    """
    config, rollout = setup.config, scored.rollout
    named = {"advantages": estimates.advantages}
    if estimates.returns is not None:
        named["returns"] = estimates.returns
    setup.together(lambda: scored.require_finite(named, setup.actor_critic))
    metrics = rollout_metrics(rollout, estimates, kl_coef=setup.kl_coef, reduce=setup.reduce) | scored.told
    if config.kl_target is not None:
        metrics["objective/kl_coef"] = setup.kl_coef
    metrics |= sampler_metrics(rollout.mask, estimates.importance, reduce=setup.reduce)
    metrics["episodes"] = float((scored.update + 1) * config.rollout_batch_size)
    for function in functions_of(setup.reward):
        metrics |= {f"reward/{name}": sum(values) / len(values) for name, values in function.logged.items()}
    if setup.judge is not None and logged(scored.update + 1, config.logging_steps, config.updates):
        with setup.meter.part(JUDGE), setup.autocast():
            metrics |= judged(setup, setup.judge, scored)
    return metrics


@torch.no_grad()
def judged(setup: PpoSetup, judge: Judge, scored: Scored) -> dict[str, float]:
    """Mean and standard deviation of the judge's scores over the responses of a rollout, on all ranks."""
    sums = []
    for rows, batch in zip(scored.rows, scored.packed, strict=True):
        scores = judge.source.score([scored.rollout.examples[i] for i in rows], batch).cpu().double()
        flops = 0.0 if judge.shape is None else judge.shape.batch_flops(batch)
        added = torch.tensor([len(scores), scores.sum(), (scores**2).sum(), flops], dtype=torch.float64)
        sums.append(added.to(batch.lengths.device))
    count, total, square, flops = setup.reduce(torch.stack(sums).sum(0)).tolist()
    setup.meter.judge_flops += flops
    mean = total / count
    return {"objective/judge": mean, "objective/judge_std": max(square / count - mean**2, 0.0) ** 0.5}


def minibatch_window(
    setup: PpoSetup, scored: Scored, estimates: Estimates, metrics: dict[str, float], epoch: int, number: int
) -> Window:
    """One minibatch as a window; the last minibatch of the last epoch ends the update and carries the metrics."""
    config, rollout = setup.config, scored.rollout
    ref_logprobs = rollout.ref_logprobs if config.kl_in in ("loss", "response_loss") else None
    first, last = (epoch, number) == (0, 0), (epoch, number) == (len(scored.epochs) - 1, len(scored.epochs[0]) - 1)
    importance = estimates.importance
    weights = None if importance is None else importance.weights
    batches, tokens, sequences = [], 0, 0
    for place, rows in enumerate(scored.epochs[epoch][number]):
        examples = [rollout.examples[i] for i in rows]
        batch = setup.pack(examples) if epoch else scored.first[number][place]
        index = torch.tensor(rows, device=setup.device)
        batches.append(
            PpoBatch(
                batch,
                mask=rollout.mask[index],
                old_logprobs=rollout.logprobs[index],
                old_values=None if rollout.values is None else rollout.values[index],
                advantages=estimates.advantages[index],
                returns=None if estimates.returns is None else estimates.returns[index],
                first=first,
                ref_logprobs=None if ref_logprobs is None else ref_logprobs[index],
                weights=None if weights is None else weights[index],
                examples=examples,
                pack=setup.pack,
            )
        )
        tokens += batch.num_tokens
        sequences += len(rows)
    sums = setup.reduce(torch.tensor([tokens, sequences, len(batches)], dtype=torch.float64, device=setup.device))
    total_tokens, total_sequences, total_batches = sums.tolist()
    counts = {
        "tokens": total_tokens,
        "sequences": total_sequences * config.lengths().response,
        "responses": total_sequences,
        "first_tokens": total_tokens if first else 0.0,
        "first_batches": total_batches if first else 0.0,
    }
    epochs_done = (scored.update + 1) * config.prompts_per_rollout / len(setup.prompts)
    return Window(batches, counts, last, metrics if last else {}, epochs_done, scored.halvings)
