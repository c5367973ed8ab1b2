"""PPO's windows: rollout -> epochs -> minibatches, as a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.algorithms.policy import ImportanceWeights
from rlhf_pipeline.data.batch import PackedBatch, merge_prompts, micro_batches, pack, reads
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.roles import ActorCritic, Policy
from rlhf_pipeline.rollout.responses import answered, logprob_matrix, prompts_run, sample_for_prompts
from rlhf_pipeline.rollout.rewards import BadScores, RewardSource
from rlhf_pipeline.rollout.rollout import (
    Estimates,
    Rollout,
    apply_missing_eos_penalty,
    estimate,
    rollout_metrics,
    sampler_metrics,
)
from rlhf_pipeline.rollout.vllm_engine import VllmEngine
from rlhf_pipeline.training.cost import JUDGE, CostMeter, ModelShape
from rlhf_pipeline.training.judge import Judge
from rlhf_pipeline.training.ppo_batches import Collected, PpoBatch, PpoSettings, cut_rows
from rlhf_pipeline.training.tracking import logged
from rlhf_pipeline.training.windows import Window, epoch_order


@dataclass
class RolloutCollector:
    """Samples, scores and cuts rollouts into windows.

    actor_critic: the module itself; the wrapped one is handed to `windows`. reward: scores whole responses.
    """

    settings: PpoSettings
    actor_critic: ActorCritic
    reference: Policy
    reward: RewardSource
    prompts: Sequence[Example]
    meter: CostMeter
    shapes: dict[str, ModelShape]
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums
    autocast: Callable[[], AbstractContextManager] = nullcontext  # the precision that the policy is trained in
    rank: int = 0
    world_size: int = 1
    device: torch.device | str = "cpu"
    judge: Judge | None = None  # watches
    engine: VllmEngine | None = None  # samples; None: the model itself
    memory: Memory = field(default_factory=Memory)
    together: Callable[[Callable[[], Any]], Any] = lambda work: work()  # on every process, or on none
    refused: BadScores | None = None  # what the reward source said that is not finite

    def windows(self, module: nn.Module, start: int, total: int) -> Iterator[Window]:
        """The windows of updates start ... total - 1. `module` is what is called (wrapped or not)."""
        for update in range(start, total):
            self.actor_critic.actor_frozen = update < self.settings.critic_warmup_steps
            yield from self._update(module, update, total)

    def _prompts_of(self, update: int) -> list[Example]:
        """This rank's prompts: a continuous pass over shuffled prompts, a function of seed and update alone."""
        size = self.settings.rollout_size * self.world_size
        places = range(update * size, (update + 1) * size)
        orders: dict[int, list[int]] = {}
        chosen = []
        for place in places:
            epoch, index = divmod(place, len(self.prompts))
            if epoch not in orders:
                orders[epoch] = epoch_order(len(self.prompts), self.settings.seed, epoch)
            chosen.append(self.prompts[orders[epoch][index]])
        return chosen[self.rank :: self.world_size]

    def _generator(self, update: int, purpose: int) -> torch.Generator:
        seed = ((self.settings.seed * 1_000_003 + update) * 8 + purpose) * 4096 + self.rank
        return torch.Generator().manual_seed(seed % 2**63)

    def _update(self, module: nn.Module, update: int, total: int) -> Iterator[Window]:
        s = self.settings
        done: Collected = self.together(lambda: self._collect(module, update))
        rollout, sampled = done.rollout, done.rollout.examples
        estimates, importance = self._estimate(rollout), rollout.weights(s.importance_weight_cap)
        named = {"advantages": estimates.advantages, "returns": estimates.returns}
        self.together(lambda: done.require_finite(update + 1, named, self.actor_critic))
        metrics = rollout_metrics(rollout, estimates, kl_coef=s.kl_coef, reduce=self.reduce)
        metrics |= sampler_metrics(rollout.mask, importance, reduce=self.reduce)
        metrics["episodes"] = float((update + 1) * s.rollout_size * self.world_size)
        if self.judge is not None and logged(update + 1, self.judge.every, total):
            with self.meter.part(JUDGE), self.autocast():
                metrics |= self.judge.look(sampled, done.rows, done.packed, self.meter, self.reduce)
        # 4. Train: epochs x minibatches windows, the last of which ends the update.
        with self.meter.part("update"):
            for epoch, minibatches in enumerate(done.epochs):
                for number, minibatch in enumerate(minibatches):
                    packed = done.first[number] if epoch == 0 else self._packed(sampled, minibatch)
                    opening = epoch == 0 and number == 0
                    last = epoch == s.num_ppo_epochs - 1 and number == len(minibatches) - 1
                    window = self._window(minibatch, packed, rollout, estimates, importance, opening, last)
                    window.halvings = done.halvings
                    if last:
                        window.metrics = metrics
                    window.epoch = (update + 1) * s.rollout_size * self.world_size / len(self.prompts)
                    yield window

    def _collect(self, module: nn.Module, update: int) -> Collected:
        """The scored rollout of an update, cut into micro-batches.

        Raises:
            NotFinite: a reward, value or log-probability (the sampler's too) is not finite. RunFailed: out of memory.
        """
        s, memory = self.settings, self.memory
        # 1. Sample.
        with self.meter.part("generation"):
            sampled, run, sampler_logprobs = self._sample(module, update)
            prompt_lengths = [len(example.prompt_ids) for example in sampled]
            lengths = [len(example.completions[0]) for example in sampled]
            self.meter.generate(self.shapes["actor"], prompt_lengths, lengths, run)
        # 2. Cut into minibatches; the first epoch's micro-batches are packed once, scored, and trained on.
        shuffle = self._generator(update, 1)
        whole = [self._minibatches(sampled, shuffle) for _ in range(s.num_ppo_epochs)]
        # 3. Score with the training forward, the same micro-batches and precision.
        with self.meter.part("scoring"), self.autocast():

            def scored(halvings: int) -> Collected:
                epochs = [[cut_rows(minibatch, halvings) for minibatch in epoch] for epoch in whole]
                first = [self._packed(sampled, minibatch) for minibatch in epochs[0]]
                rollout = self._score(module, sampled, epochs[0], first)
                return Collected(replace(rollout, sampler_logprobs=sampler_logprobs), epochs, first, halvings)

            done = memory.repeat("training", scored)
        rewards = f"rewards of {self.refused.label if self.refused else self.reward.label}"
        named = {
            rewards: done.rollout.scores,
            "log-probabilities of the policy": done.rollout.logprobs,
            **({} if sampler_logprobs is None else {"log-probabilities of the sampler": sampler_logprobs}),
            "log-probabilities of the reference": done.rollout.ref_logprobs,
            "values": done.rollout.values,
        }
        done.require_finite(update + 1, named, self.actor_critic, {rewards: str(self.refused or "")})
        return done

    def _sample(self, module: nn.Module, update: int) -> tuple[list[Example], list[int] | None, Tensor | None]:
        """The responses; the lengths of the prompts that were run, or None for one each; and
        what another engine says of its tokens' log-probabilities, or None."""
        s, prompts, generator = self.settings, self._prompts_of(update), self._generator(update, 0)
        options: dict[str, Any] = {"samples": 1, "response_length": s.response_length, "stop_id": s.stop_id}
        options |= {"generator": generator, "temperature": s.temperature}
        if self.engine is not None:
            self.engine.load_weights(self.actor_critic)
            drawn = self.engine.generate([prompt.prompt_ids for prompt in prompts], **options)
            return answered(prompts, drawn)[0], None, logprob_matrix(drawn, s.response_length).to(self.device)
        at_once: dict[str, Any] = {"responses_at_once": s.rollout_size, "memory": self.memory}
        options |= {"pad_id": s.pad_id, "device": self.device, "module": module}
        sampled, _ = sample_for_prompts(self.actor_critic, prompts, **options, **at_once)
        return sampled, prompts_run(self.actor_critic, sampled, **at_once), None

    def _minibatches(self, sampled: Sequence[Example], generator: torch.Generator) -> list[list[list[int]]]:
        """A random partition of the responses: minibatches of micro-batches of row numbers."""
        order = torch.randperm(len(sampled), generator=generator).tolist()
        size = len(order) // self.settings.num_mini_batches
        minibatches = []
        for start in range(0, len(order), size):
            members = order[start : start + size]
            groups = micro_batches([sampled[i] for i in members], *self.settings.micro_batch)
            rows = [[members[i] for i in group] for group in groups]
            # Responses to one prompt stand together, so that they share it.
            minibatches.append([sorted(group, key=lambda row: (sampled[row].prompt_ids, row)) for group in rows])
        return minibatches

    def _packed(self, sampled: Sequence[Example], groups: Sequence[Sequence[int]]) -> list[PackedBatch]:
        return [self._pack([sampled[i] for i in rows]) for rows in groups]

    def _pack(self, chosen: Sequence[Example]) -> PackedBatch:
        layout = self.actor_critic.reader.layout
        # With a mask of length x length a tree of many responses would cost more than it saves.
        trees = merge_prompts(chosen) if layout == "flat" else chosen
        return pack(trees, self.settings.pad_id, layout=layout).to(self.device)

    @torch.no_grad()
    def _score(
        self,
        module: nn.Module,
        sampled: list[Example],
        minibatches: list[list[list[int]]],
        packed: list[list[PackedBatch]],
    ) -> Rollout:
        s, count, width = self.settings, len(sampled), self.settings.response_length
        matrices = {
            name: torch.zeros(count, width, device=self.device)
            for name in ("logprobs", "ref_logprobs", "values", "entropy")
        }
        scores = torch.zeros(count, device=self.device)
        lengths = torch.zeros(count, dtype=torch.long, device=self.device)
        self.refused = None
        for minibatch, batches in zip(minibatches, packed, strict=True):
            for rows, batch in zip(minibatch, batches, strict=True):
                self.memory.holds(len(rows))
                index = torch.tensor(rows, device=self.device)
                mine = module(batch)
                theirs = self.reference(self._for_layout(batch, sampled, rows, self.reference.reader.layout))
                values = {
                    "logprobs": mine.logprobs,
                    "ref_logprobs": theirs.logprobs,
                    "values": mine.values,
                    "entropy": mine.entropy,
                }
                for name, value in values.items():
                    matrices[name][index] = batch.padded(value, width).to(matrices[name].dtype)
                try:
                    scores[index] = self.reward.score([sampled[i] for i in rows], batch).to(scores)
                except BadScores as refused:  # told with the rollout's other figures
                    scores[index] = refused.scores.to(scores)
                    self.refused = self.refused or refused
                lengths[index] = batch.lengths
                for shape in self.shapes.values():
                    self.meter.score(shape, batch)
        ended = torch.tensor([example.ended[0] for example in sampled], device=self.device)
        return Rollout(
            examples=sampled,
            mask=torch.arange(width, device=self.device) < lengths[:, None],
            ended=ended,
            scores=apply_missing_eos_penalty(scores, ended, s.missing_eos_penalty),
            **matrices,
        )

    def _for_layout(
        self, batch: PackedBatch, sampled: Sequence[Example], rows: Sequence[int], layout: Any
    ) -> PackedBatch:
        if reads(layout, batch):
            return batch
        return pack([sampled[i] for i in rows], self.settings.pad_id, layout=layout).to(self.device)

    def _estimate(self, rollout: Rollout) -> Estimates:
        s = self.settings
        return estimate(
            rollout,
            kl_coef=s.kl_coef,
            gamma=s.gamma,
            lam=s.lam,
            whiten_advantages=s.whiten_advantages,
            whiten_rewards=s.whiten_rewards,
            reduce=self.reduce,
        )

    def _window(
        self,
        minibatch: list[list[int]],
        packed: list[PackedBatch],
        rollout: Rollout,
        estimates: Estimates,
        importance: ImportanceWeights | None,
        opening: bool,
        last: bool,
    ) -> Window:
        batches, tokens, sequences = [], 0, 0
        for rows, batch in zip(minibatch, packed, strict=True):
            index = torch.tensor(rows, device=self.device)
            batches.append(
                PpoBatch(
                    batch,
                    mask=rollout.mask[index],
                    old_logprobs=rollout.logprobs[index],
                    old_values=rollout.values[index],
                    advantages=estimates.advantages[index],
                    returns=estimates.returns[index],
                    first=opening,
                    weights=None if importance is None else importance.weights[index],
                    examples=[rollout.examples[i] for i in rows],
                    pack=self._pack,
                )
            )
            tokens += batch.num_tokens
            sequences += len(rows)
        sums = self.reduce(torch.tensor([tokens, sequences, len(batches)], dtype=torch.float64, device=self.device))
        total_tokens, total_sequences, total_batches = sums.tolist()
        counts = {
            "tokens": total_tokens,
            "sequences": total_sequences * self.settings.response_length,
            "first_tokens": total_tokens if opening else 0.0,
            "first_batches": total_batches if opening else 0.0,
        }
        return Window(batches, counts, ends_update=last)
