"""PPO's windows: rollout -> epochs -> minibatches, as a generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_pipeline.data.batch import PackedBatch, merge_prompts, micro_batches, pack, reads
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.roles import ActorCritic, Policy
from rlhf_pipeline.rollout.responses import prompts_run, sample_for_prompts
from rlhf_pipeline.rollout.rewards import RewardSource
from rlhf_pipeline.rollout.rollout import (
    Estimates,
    Rollout,
    apply_missing_eos_penalty,
    estimate,
    rollout_metrics,
)
from rlhf_pipeline.training.cost import JUDGE, CostMeter, ModelShape
from rlhf_pipeline.training.judge import Judge
from rlhf_pipeline.training.tracking import logged
from rlhf_pipeline.training.windows import Window, epoch_order


@dataclass(frozen=True)
class PpoBatch:
    """A micro-batch of responses; matrices are (C, R), fixed while the policy moves."""

    batch: PackedBatch
    mask: Tensor
    old_logprobs: Tensor
    old_values: Tensor
    advantages: Tensor
    returns: Tensor
    first: bool  # of the first minibatch of the first epoch, where ratio must be 1


@dataclass(frozen=True)
class PpoSettings:
    """The knobs of sampling and estimation, under their config names. sizes are per rank."""

    rollout_size: int
    num_ppo_epochs: int
    num_mini_batches: int
    micro_batch: tuple[int, int | None]  # most responses, most tokens
    response_length: int
    temperature: float
    kl_coef: float
    gamma: float
    lam: float
    whiten_advantages: bool
    whiten_rewards: bool
    missing_eos_penalty: float | None
    critic_warmup_steps: int
    seed: int
    stop_id: int
    pad_id: int


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
        # 1. Sample.
        with self.meter.part("generation"):
            sampled, _ = sample_for_prompts(
                self.actor_critic,
                self._prompts_of(update),
                samples=1,
                response_length=s.response_length,
                stop_id=s.stop_id,
                pad_id=s.pad_id,
                generator=self._generator(update, 0),
                temperature=s.temperature,
                batch_size=s.rollout_size,
                device=self.device,
                module=module,
            )
            prompt_lengths = [len(example.prompt_ids) for example in sampled]
            lengths = [len(example.completions[0]) for example in sampled]
            run = prompts_run(self.actor_critic, sampled, s.rollout_size)
            self.meter.generate(self.shapes["actor"], prompt_lengths, lengths, run)
        # 2. Cut into minibatches; the first epoch's micro-batches are packed once, scored, and trained on.
        shuffle = self._generator(update, 1)
        epochs = [self._minibatches(sampled, shuffle) for _ in range(s.num_ppo_epochs)]
        first = [[self._pack(sampled, micro) for micro in minibatch] for minibatch in epochs[0]]
        # 3. Score with the training forward, the same micro-batches and precision.
        with self.meter.part("scoring"), self.autocast():
            rollout = self._score(module, sampled, epochs[0], first)
        estimates = self._estimate(rollout)
        metrics = rollout_metrics(rollout, estimates, kl_coef=s.kl_coef, reduce=self.reduce)
        metrics["episodes"] = float((update + 1) * s.rollout_size * self.world_size)
        if self.judge is not None and logged(update + 1, self.judge.every, total):
            with self.meter.part(JUDGE), self.autocast():
                rows, batches = chain.from_iterable(epochs[0]), chain.from_iterable(first)
                metrics |= self.judge.look(sampled, rows, batches, self.meter, self.reduce)
        # 4. Train: epochs x minibatches windows, the last of which ends the update.
        with self.meter.part("update"):
            for epoch, minibatches in enumerate(epochs):
                for number, minibatch in enumerate(minibatches):
                    packed = first[number] if epoch == 0 else [self._pack(sampled, micro) for micro in minibatch]
                    opening = epoch == 0 and number == 0
                    last = epoch == s.num_ppo_epochs - 1 and number == len(minibatches) - 1
                    window = self._window(minibatch, packed, rollout, estimates, opening, last)
                    if last:
                        window.metrics = metrics
                    window.epoch = (update + 1) * s.rollout_size * self.world_size / len(self.prompts)
                    yield window

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

    def _pack(self, sampled: Sequence[Example], rows: Sequence[int]) -> PackedBatch:
        layout = self.actor_critic.reader.layout
        chosen = [sampled[i] for i in rows]
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
        for minibatch, batches in zip(minibatches, packed, strict=True):
            for rows, batch in zip(minibatch, batches, strict=True):
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
                scores[index] = self.reward.score([sampled[i] for i in rows], batch).to(scores)
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
