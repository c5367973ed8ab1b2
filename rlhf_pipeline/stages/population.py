"""The population of preference pairs of `world:verdicts`: fresh pairs at every step, with their exact labels.

Both responses of a pair are drawn independently from one proposal mu(. | x). The label is not drawn; it is given as its
probability p = sigma(R(y_1) - R(y_2)). If the Bradley-Terry model holds and mu has full support, the minimiser of DPO's
expected loss is pi_ref exp(R / beta) / Z for every mu, so only optimisation keeps a run from it (Rafailov et al. 2023,
section 4 and theorem 1). Proposals:

* mixture: one half pi_ref and one half the exact optimum, so that likely responses of the optimum are in the pairs;
* reference: pi_ref, as when pairs are collected from the SFT model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import Layout, PackedBatch, micro_batches, pack
from rlhf_pipeline.data.load import SourceReport
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.closed_forms import optimum, require_mass, world_reward
from rlhf_pipeline.evaluation.enumerate import leaf_logprobs
from rlhf_pipeline.evaluation.enumeration import ResponseTree
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.training.windows import ExampleBatch, PairFacts, Window, counts_of

Proposal = Literal["mixture", "reference"]


@dataclass(frozen=True)
class PromptTable:
    """All L responses to one prompt: reference log-probabilities, rewards, cumulative proposal; each (L,) float64."""

    prompt: Example
    ref_logprobs: Tensor
    reward: Tensor
    cumulative: Tensor


class Population:
    """Draws pairs with their exact reference log-probabilities and label probabilities.

    Args:
        reference: the frozen reference; it scores every response once.
        prompts: prompts of the world. beta: the beta of the mixture's optimum. reading: options of `leaf_logprobs`.
    """

    def __init__(
        self,
        reference: Policy,
        prompts: Sequence[Example],
        *,
        stop_id: int,
        response_length: int,
        beta: float,
        proposal: Proposal = "mixture",
        device: torch.device | str = "cpu",
        **reading: Any,
    ):
        self.tree = ResponseTree(len(world.VOCABULARY), stop_id, response_length)
        self.beta, self.proposal = beta, proposal
        self.tables = []
        for prompt in prompts:
            logprobs = leaf_logprobs(reference, prompt.prompt_ids, self.tree, device=device, **reading)
            require_mass(logprobs, "the reference")
            reward = world_reward(prompt.prompt_ids, self.tree)
            mass = logprobs.exp()
            if proposal == "mixture":
                mass = (mass + optimum(logprobs, reward, beta).exp()) / 2
            self.tables.append(PromptTable(prompt, logprobs, reward, mass.cumsum(0)))

    def draw(self, count: int, generator: torch.Generator) -> tuple[list[Example], PairFacts]:
        """Draw `count` pairs from the proposal, with equal numbers per prompt (up to one).

        The response that is named chosen is drawn with the label's probability. The facts hold the reference's
        log-probabilities, (count, 2), and the probability that the chosen response is preferred, (count,), as float64.
        """
        start = int(torch.randint(len(self.tables), (), generator=generator))
        numbers = torch.rand(count, 3, dtype=torch.float64, generator=generator)
        examples: list[Example | None] = [None] * count
        logprobs, targets = torch.empty(count, 2, dtype=torch.float64), torch.empty(count, dtype=torch.float64)
        for offset, table in enumerate(self.tables):
            rows = torch.tensor(range((offset - start) % len(self.tables), count, len(self.tables)), dtype=torch.long)
            drawn = numbers[rows]
            leaves = torch.searchsorted(table.cumulative, drawn[:, :2] * table.cumulative[-1], right=True)
            leaves = leaves.clamp_max(self.tree.num_leaves - 1)
            reward = table.reward[leaves]
            first_wins = torch.sigmoid(reward[:, 0] - reward[:, 1])
            flip = drawn[:, 2] >= first_wins
            leaves = torch.where(flip[:, None], leaves.flip(1), leaves)
            logprobs[rows], targets[rows] = table.ref_logprobs[leaves], torch.where(flip, 1 - first_wins, first_wins)
            for row, pair in zip(rows.tolist(), leaves.tolist(), strict=True):
                examples[row] = Example(
                    table.prompt.prompt_ids,
                    [self.tree.completion(leaf) for leaf in pair],
                    [bool(self.tree.ended[leaf]) for leaf in pair],
                    table.prompt.prompt_key,
                    f"{world.NAME} population",
                    label_probability=float(targets[row]),
                )
        return examples, PairFacts(logprobs, targets)  # type: ignore[return-value]

    def windows(
        self,
        *,
        steps: int,
        micro_batch_size: int,
        accumulation: int,
        seed: int,
        layout: Layout,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        shares: int | None = None,
        device: torch.device | str = "cpu",
        micro_batch_tokens: int | None = None,
    ) -> Iterator[Window]:
        """Windows of fresh pairs; they depend only on seed, size and step, so resuming needs no state.

        shares: see `example_windows`.
        """

        def packed(drawn: Sequence[Example]) -> PackedBatch:
            return pack(drawn, layout=layout).to(device)

        size = micro_batch_size * accumulation * (shares or world_size)
        # With fewer pairs than ranks, every rank must take part in the backward pass.
        mine, weight = (list(range(rank, size, world_size)), 1.0) if rank < size else ([0], 0.0)
        for step in range(start, steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            examples, facts = self.draw(size, generator)
            batches = []
            for group in micro_batches([examples[i] for i in mine], micro_batch_size, micro_batch_tokens):
                members = [mine[i] for i in group]
                drawn = [examples[i] for i in members]
                known = PairFacts(facts.ref_logprobs[members].to(device), facts.target[members].to(device))
                batches.append(ExampleBatch(packed(drawn), members, weight, facts=known, examples=drawn, pack=packed))
            yield Window(batches, counts_of(examples), epoch=float(step + 1))

    def report(self, prompts: SourceReport, pairs: int) -> SourceReport:
        """The manifest's entry for the pairs; its digest is that of the prompts, the only data read."""
        name = f"{prompts.source} population ({self.proposal})"
        return replace(prompts, source=name, format="pair", source_rows=pairs, rows=pairs, kept=pairs)
