"""This package's side of parity_ppo.py: its own functions on the same rollouts, and the comparison.

The peer gives a response that ended before the length limit one more slot: an absorbing step after the stop token with
the score, a value (read at the stop token) and no log-probability. "On the peer's slots" means: this package's
functions, unchanged, on masks that include this slot.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from rlhf_pipeline.algorithms.advantages import gae, token_rewards
from rlhf_pipeline.algorithms.masked import whiten
from rlhf_pipeline.algorithms.policy import clipped_value_loss
from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.modules import ActorCritic, Policy, RewardModel, make_actor_critic
from rlhf_pipeline.models.selfcheck import inspect_model, read_reward_model
from rlhf_pipeline.rollout.rewards import ModelReward
from rlhf_pipeline.rollout.rollout import Estimates, Rollout
from rlhf_pipeline.stages import ppo
from rlhf_pipeline.training import ppo_rollouts
from rlhf_pipeline.training.cost import CostMeter, ModelShape
from rlhf_pipeline.training.ppo_batches import PpoBatch
from rlhf_pipeline.training.ppo_rollouts import PpoSetup
from rlhf_pipeline.training.windows import Loss, Window

FP32 = 1e-5
Weights = dict[str, Tensor]


def nine_digits(number: float | str) -> float:
    """A number rounded to 9 significant digits, which is exact for fp32."""
    return float(f"{float(number):.9g}")


@dataclass(frozen=True)
class Comparison:
    """One quantity of both sides. tolerance: limit of the largest absolute difference; None: it differs on purpose."""

    case: str
    quantity: str
    peer: Tensor
    ours: Tensor
    tolerance: float | None = FP32
    why: str = ""

    def __post_init__(self) -> None:
        assert self.peer.shape == self.ours.shape, (self.case, self.quantity, self.peer.shape, self.ours.shape)

    @property
    def difference(self) -> float:
        return float((self.ours.double() - self.peer.double()).abs().max())

    @property
    def agrees(self) -> bool:
        return self.tolerance is None or self.difference <= self.tolerance

    def as_dict(self) -> dict[str, Any]:
        """The row of the report, with the figures of both sides if they are few."""
        row = {"case": self.case, "quantity": self.quantity, "difference": float(f"{self.difference:.3g}")}
        row |= {"tolerance": self.tolerance, "why": self.why}
        if self.ours.numel() > (8 if self.tolerance is not None else 64):
            return row
        sides = {"peer": self.peer, "ours": self.ours}
        numbers = {side: [nine_digits(x) for x in value.flatten().tolist()] for side, value in sides.items()}
        return {**row, **{side: found if self.ours.ndim else found[0] for side, found in numbers.items()}}


def bessel(mask: Tensor) -> float:
    """sqrt((n - 1) / n) for n active entries: the ratio of 1 / std with the unbiased variance to ours."""
    count = int(mask.sum())
    return math.sqrt((count - 1) / count)


class Case:
    """One setting: the models, our rollout and our losses, and the peer's figures as tensors."""

    def __init__(self, document: dict[str, Any], weights: Weights, name: str, **changes: Any):
        self.inputs, self.weights, self.name = document["inputs"], weights, name
        self.setting = {**self.inputs["cases"][name], **changes}
        self.arguments = self.setting["arguments"]
        self.width = self.inputs["response_length"]
        figures = document["peer"]["cases"][name]
        self.peer = {key: torch.tensor(value) for key, value in figures["rollout"].items()}
        self.peer_micro_batches, self.peer_metrics = figures["micro_batches"], figures["metrics"]
        self.examples = [
            Example(row["prompt"], [row["response"]], [row["ended"]], prompt_key=str(i), where=f"rollout {i}")
            for i, row in enumerate(self.inputs["rollouts"][self.setting["rollouts"]])
        ]
        peers_own = ("stop_token_id", "gradient_accumulation_steps")
        self.config = PpoConfig(
            model_name_or_path="peer",
            output_name="ours",
            max_steps=1,  # one update on all responses
            rollout_batch_size=len(self.examples),
            max_prompt_length=max(len(example.prompt_ids) for example in self.examples),
            response_length=self.width,
            seed=self.inputs["seed"],
            **{name: value for name, value in self.arguments.items() if name not in peers_own},
        )
        self.rollout, self.estimates, self.windows = self._run()
        self.mask = self.rollout.mask
        # The peer whitens with the unbiased variance, this package with the population variance.
        self.bessel = bessel(self.mask)

    def _load(self, auto_class: Any, prefix: str, **extra: Any) -> torch.nn.Module:
        from transformers import AutoConfig

        model = auto_class.from_config(AutoConfig.for_model(**self.inputs["model"], **extra), dtype=torch.float32)
        found = {key[len(prefix) + 1 :]: value for key, value in self.weights.items() if key.startswith(f"{prefix}/")}
        model.load_state_dict(found)
        return model.eval()

    def _policy(self, prefix: str) -> Policy:
        from transformers import AutoModelForCausalLM

        model = self._load(AutoModelForCausalLM, prefix)
        return Policy(model, inspect_model(model), self.arguments["temperature"])

    def _classifier(self, prefix: str) -> RewardModel:
        from transformers import AutoModelForSequenceClassification

        return read_reward_model(self._load(AutoModelForSequenceClassification, prefix, num_labels=1))

    def actor_critic(self, step: int = 0) -> ActorCritic:
        """Actor and critic with the peer's weights before its optimizer step number `step`."""
        prefix, critic = (f"{self.name}/{step}/", "critic") if step else ("", self.setting["critic"])
        actor, critic = self._policy(f"{prefix}actor"), self._classifier(f"{prefix}{critic}")
        temperature = self.arguments["temperature"]
        return make_actor_critic(
            actor.model, actor.reader, "reward_model", reward_model=critic, temperature=temperature
        )

    def _run(self) -> tuple[Rollout, Estimates, list[Window]]:
        """The project's own PPO with only the sampler replaced; rows in the order of the file."""
        model = self.actor_critic()
        setup = PpoSetup(
            self.config,
            model,
            self._policy("reference"),
            ModelReward("reward", self._classifier("reward")),
            [replace(example, completions=[], ended=[]) for example in self.examples],
            stop_ids=[self.inputs["stop_id"]],
            meter=CostMeter(),
            shapes={"actor": ModelShape.of(model.actor)},
        )

        def fixed(_, prompts, **__):
            return [self.examples[int(prompt.prompt_key)] for prompt in prompts], []

        with (
            mock.patch.object(ppo_rollouts, "sample_for_prompts", fixed),
            mock.patch.object(ppo, "check_and_describe", wraps=ppo.check_and_describe) as described,
        ):
            windows = list(ppo.ppo_windows(setup, model, 0))
        _, scored, estimates = described.call_args.args
        order = torch.tensor([int(example.prompt_key) for example in scored.rollout.examples]).argsort()

        def sort(part: Any) -> Any:
            return replace(part, **{k: v[order] for k, v in vars(part).items() if isinstance(v, Tensor)})

        return replace(sort(scored.rollout), examples=self.examples), sort(estimates), windows

    def raw(self, rollout: Rollout, *, whiten_rewards: bool = False) -> Estimates:
        """Estimates before the advantages are whitened."""
        mask, arguments = rollout.mask, self.arguments
        logprobs, ref_logprobs = rollout.logprobs, rollout.ref_logprobs
        rewards = token_rewards(rollout.scores, logprobs, ref_logprobs, mask, kl_coef=arguments["kl_coef"])
        if whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        discounts = {name: arguments[name] for name in ("gamma", "lam")}
        return Estimates(rewards, *gae(rewards, rollout.values, mask, **discounts))

    def slot_values(self, model: ActorCritic) -> Tensor:
        """Values (C, R) of the critic, also after the last token of a response shorter than the limit."""
        pad_id = self.inputs["pad_id"]
        # A filler token makes the packed forward pass read the critic at the last real token as well.
        longer = [replace(e, completions=[(e.completions[0] + [pad_id])[: self.width]]) for e in self.examples]
        batch = pack(longer, layout=model.reader.layout)
        return batch.padded(model(batch).values, self.width)

    @cached_property
    def slots(self) -> Rollout:
        """Our rollout on the peer's slots."""
        mask = torch.arange(self.width) < self.mask.sum(1, keepdim=True) + 1
        return replace(self.rollout, mask=mask, values=self.slot_values(self.actor_critic()).detach())

    def losses(self, micro_batch: PpoBatch, model: ActorCritic) -> Loss:
        """`ppo_step` of this package: sums."""
        return ppo.ppo_step(model, micro_batch, config=self.config, meter=CostMeter(), shapes={})

    def part(self, rows: list[int]) -> PpoBatch:
        """Some rows as a micro-batch."""
        batch, estimates = pack([self.examples[i] for i in rows]), self.estimates
        fixed = (self.mask, self.rollout.logprobs, self.rollout.values, estimates.advantages, estimates.returns)
        return PpoBatch(batch, *(matrix[rows] for matrix in fixed), first=True)

    def slot_value_loss(self, model: ActorCritic, rows: list[int] | None = None) -> tuple[Tensor, Tensor]:
        """Mean value loss and fraction of clipped tokens on the peer's slots, for some rows or all."""
        rows = list(range(len(self.examples))) if rows is None else rows
        matrices = (self.slot_values(model), self.slots.values, self.raw(self.slots).returns, self.slots.mask)
        limit, count = self.arguments["cliprange_value"], self.slots.mask[rows].sum()
        loss, clipped = clipped_value_loss(*(matrix[rows] for matrix in matrices), cliprange_value=limit)
        return loss / count, clipped / count

    def gradient(self, loss: Tensor, model: ActorCritic, role: str) -> Tensor:
        """The gradient of `loss`, flat, in the order of the peer's parameter names."""
        if role == "actor":
            named = dict(model.actor.named_parameters())
        else:
            named = {f"model.{name}": parameter for name, parameter in model.critic.named_parameters()}
            named["score.weight"] = model.value_head.weight
        names = [key.rpartition("/")[2] for key in self._gradient_keys(0, role)]
        parts = torch.autograd.grad(loss, [named[name] for name in names], retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def _gradient_keys(self, step: int, role: str) -> list[str]:
        return sorted(key for key in self.weights if key.startswith(f"{self.name}/{step}/grad/{role}/"))

    def peer_gradient(self, step: int, role: str) -> Tensor:
        """The peer's gradient at an optimizer step, flat."""
        return torch.cat([self.weights[key].flatten() for key in self._gradient_keys(step, role)])
