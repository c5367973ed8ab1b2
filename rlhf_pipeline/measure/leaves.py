"""The tables for exact figures: log-probabilities and rewards of every response to every prompt."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

from rlhf_pipeline.config.reward_names import WORLD_NAMES, names_a_model
from rlhf_pipeline.data import world
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.disk.kept import claimed
from rlhf_pipeline.errors import MismatchError
from rlhf_pipeline.evaluation.closed_forms import require_mass, world_reward
from rlhf_pipeline.evaluation.enumerate import leaf_logprobs, leaf_scores
from rlhf_pipeline.evaluation.enumeration import ResponseTree
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import Policy, RewardModel
from rlhf_pipeline.registry.optimum import own_moves
from rlhf_pipeline.registry.parents import reward_models_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.stages.common import find_model, load_reward_model, require_same_tokenizer
from rlhf_pipeline.training.tensor_cache import read_tensor, write_tensor

Reward = tuple[tuple[float, str], ...]
"""A weighted sum of sources: "world", or references to reward models."""

TRUTH: Reward = ((1.0, "world"),)


def trained_reward(registry: Registry, resolved: Resolved) -> Reward | None:
    """The reward whose optimum a PPO policy was trained towards.

    None for a policy that was not trained by PPO, for a function or language model as reward, and if an option moved
    the optimum (a penalty, gamma, a temperature).

    Raises:
        MismatchError: its parents are not the reward models of its config, or have other files now.
    """
    manifest = resolved.manifest
    if manifest is None or manifest.stage != "ppo" or own_moves(manifest):
        return None
    config = manifest.config
    parts = config.get("reward_functions") or [{"source": config.get("reward_model_path"), "weight": 1.0}]
    models = reward_models_of(registry, resolved)
    reward = []
    for part in parts:
        source = part["source"]
        if source is None or not (source in WORLD_NAMES or names_a_model(source)):
            return None
        if source in WORLD_NAMES:
            source = "world"
        elif (model := next(models, None)) is not None:
            source = model.label
        else:
            raise MismatchError(f"{resolved.label}: the reward {source!r} of its config is not among its parents")
        reward.append((float(part.get("weight", 1.0)), source))
    return tuple(reward)


class _Reading(TypedDict):
    rows_at_once: int
    memory: Memory
    device: torch.device


@dataclass
class Leaves:
    """Tables of one bench: made at first use; scores of reward models are cached on disk by digest."""

    bench: Bench
    reference_model: Resolved
    tree: ResponseTree
    reference: list[Tensor] = field(default_factory=list)  # per prompt (L,) float64
    _truth: dict[int, Tensor] = field(default_factory=dict)
    _models: dict[str, RewardModel] = field(default_factory=dict)

    @classmethod
    def of(cls, bench: Bench) -> Leaves:
        """Evaluate the reference on the tree of responses for every prompt of the bench.

        Raises:
            MismatchError: the model's responses are not those of the built-in world.
        """
        reference, policy = bench.reference, bench.reference_policy() if bench.knows_truth else None
        if reference is None or policy is None:
            raise MismatchError(
                f"exact figures need models of {world.NAME} with a known reference: its responses can be listed; use "
                "`rlhf evaluate` or `rlhf compare` for sampled figures"
            )
        outputs = policy.model.get_output_embeddings().weight.shape[0]
        if outputs != len(world.VOCABULARY):
            raise MismatchError(
                f"{reference.label}: found {outputs} outputs, expected {len(world.VOCABULARY)}, the words of "
                f"{world.NAME}"
            )
        stop, *others = bench.plan.stop_ids
        if others:
            raise MismatchError(
                f"{reference.label}: found {1 + len(others)} tokens that end a response, expected one; exact figures "
                "list all responses with one stop token: use sampled figures"
            )
        tree = ResponseTree(outputs, stop, bench.plan.response_length)
        leaves = cls(bench, reference, tree)
        leaves.reference = [leaves.logprobs(policy, index) for index in range(len(bench.plan.prompts))]
        return leaves

    @property
    def prompts(self) -> list[Example]:
        return self.bench.plan.prompts

    @property
    def _reading(self) -> _Reading:
        plan = self.bench.plan
        return _Reading(rows_at_once=plan.responses_at_once, memory=plan.memory, device=self.bench.device)

    def logprobs(self, policy: Policy, index: int) -> Tensor:
        """Log-probabilities of a policy for one prompt, (L,), checked to sum to 1."""
        found = leaf_logprobs(policy, self.prompts[index].prompt_ids, self.tree, **self._reading)
        require_mass(found, f"prompt {index + 1}")
        return found

    def reward(self, reward: Reward, index: int) -> Tensor:
        """Values of a weighted reward for one prompt, (L,) float64."""
        total = torch.zeros(self.tree.num_leaves, dtype=torch.float64)
        for weight, source in reward:
            table = self._world(index) if source == "world" else self._scores(source, index).double()
            total = total + weight * table
        return total

    def _world(self, index: int) -> Tensor:
        if index not in self._truth:
            self._truth[index] = world_reward(self.prompts[index].prompt_ids, self.tree)
        return self._truth[index]

    def _scores(self, text: str, index: int) -> Tensor:
        """Scores of one reward model, from the cache if its files, the prompt and the tree are the same."""
        bench = self.bench
        resolved = find_model(bench.registry, text, "reward_model")
        key = {
            "model": resolved.identity,
            "dtype": bench.config.dtype,
            "prompt": self.prompts[index].prompt_ids,
            "tree": [self.tree.vocabulary, self.tree.stop_id, self.tree.horizon],
        }
        name = sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        path: Path = bench.registry.home / "cache" / f"leaves-{name[:32]}.safetensors"
        if resolved.identity is None:
            return self._scored(resolved, index)
        if (stored := self._stored(path)) is not None:
            return stored
        with claimed(path):  # a table takes seconds: one process makes it, others wait
            if (stored := self._stored(path)) is None:
                stored = self._scored(resolved, index)
                write_tensor(path, stored)
        return stored

    def _stored(self, path: Path) -> Tensor | None:
        """The table of a file; None if it is not there, damaged, or of another tree."""
        found = read_tensor(path)
        return found if found is not None and found.shape == (self.tree.num_leaves,) else None

    def _scored(self, resolved: Resolved, index: int) -> Tensor:
        return leaf_scores(self._model(resolved), self.prompts[index].prompt_ids, self.tree, **self._reading)

    def _model(self, resolved: Resolved) -> RewardModel:
        if resolved.label not in self._models:
            bench = self.bench
            require_same_tokenizer(self.reference_model, resolved, bench.tokenizer, bench.config.trust_remote_code)
            bench.say(f"scoring every response with {resolved.label}: {self.tree.num_leaves:,} per prompt")
            self._models[resolved.label] = load_reward_model(resolved, bench.config, bench.device)
        return self._models[resolved.label]
