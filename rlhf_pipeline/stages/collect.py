"""Collect preference data: sample K responses per prompt from a policy and label them with a reward source."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_pipeline.config.base import moves_optimum
from rlhf_pipeline.config.collect import CollectConfig
from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.mentions import functions
from rlhf_pipeline.data.load import SourceReport, read_records
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.data.tokenizers import chat_template_digest, stop_ids, text_of, tokenizer_digest
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.memory import MEASURING_ADVICE, Memory
from rlhf_pipeline.models.needs import require_needs
from rlhf_pipeline.registry.lengths import with_lengths
from rlhf_pipeline.registry.parents import parents_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.rollout.llm_judge import copeland
from rlhf_pipeline.rollout.responses import prompts_run, sample_for_prompts
from rlhf_pipeline.rollout.scoring import by_example, score
from rlhf_pipeline.stages.common import find_model, load_policy, tokenizer_of
from rlhf_pipeline.stages.data import prompts_by_split
from rlhf_pipeline.stages.result import StageResult
from rlhf_pipeline.stages.reward_sources import load_reward
from rlhf_pipeline.training.accelerator import make_accelerator, seed_everything
from rlhf_pipeline.training.cost import CostMeter, ModelShape, reset_peak_memory
from rlhf_pipeline.training.tracking import console, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DRAWS_AT_ONCE = 2048


def preference_order(scores: Tensor, labels: str, generator: torch.Generator) -> Tensor:
    """Order the K responses to each prompt, best first.

    "bradley-terry" sorts by score plus Gumbel noise, which samples from the Plackett-Luce model at unit scale; for
    K = 2 the first response wins with probability sigma(r_1 - r_2). "rank" and "best" sort by score; ties keep the
    order of sampling.

    Args:
        scores: (P, K).

    Returns:
        (P, K) indices of the responses.
    """
    if labels != "bradley-terry":
        return torch.argsort(scores, dim=1, descending=True, stable=True)
    uniform = torch.rand(scores.shape, generator=generator, dtype=torch.float64)
    gumbel = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    return torch.argsort(scores.double() + gumbel, dim=1, descending=True, stable=True)


def to_row(
    example: Example,
    split: str,
    scores: Sequence[float],
    order: Sequence[int],
    labels: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ties: bool = False,
    flip_rate: float = 0.0,
) -> dict[str, Any]:
    """One labelled prompt as a row: a pair for K = 2, a ranking for larger K. The row has texts and token ids.

    With the labels "best" it is a demonstration, the best of the K responses (RAFT, Dong et al. 2023, algorithm 1).
    ties: whether responses with equal scores have equal ranks. flip_rate: e; a label that is right with probability p
    and then flipped with probability e has the probability (1 - 2 e) p + e.
    """

    def text(k: int) -> str:
        ids = example.completions[k]
        return text_of(tokenizer, ids[: len(ids) - int(example.ended[k])])

    row: dict[str, Any] = {"prompt": example.prompt_text, "prompt_ids": example.prompt_ids, "split": split}
    if labels == "best":
        k = order[0]
        kept = {"completion": text(k), "completion_ids": example.completions[k], "ended": example.ended[k]}
        return row | kept | {"score": scores[k]}
    if len(order) == 2:
        best, worst = order
        for name, k in (("chosen", best), ("rejected", worst)):
            row[name] = text(k)
            row[f"{name}_ids"] = example.completions[k]
            row[f"{name}_ended"] = example.ended[k]
            row[f"{name}_score"] = scores[k]
        if labels == "bradley-terry":
            right = 1 / (1 + math.exp(-(scores[best] - scores[worst])))
            row["label_probability"] = (1 - 2 * flip_rate) * right + flip_rate
        return row
    ranks = [0] * len(order)
    for rank, k in enumerate(order, start=1):
        ranks[k] = 1 + sum(score > scores[k] for score in scores) if ties else rank
    row["completions"] = [text(k) for k in range(len(order))]
    row["completion_ids"] = example.completions
    row["ended"] = list(example.ended)
    return row | {"ranks": ranks, "scores": list(scores)}


@dataclass(frozen=True)
class Collection:
    """What data are collected with: a policy, its tokenizer, and prompts with their splits.

    config: with the policy's lengths. reports: what was read of each split. moved: see `config.base.moves_optimum`.
    """

    config: CollectConfig
    registry: Registry
    policy: Resolved
    tokenizer: PreTrainedTokenizerBase
    prompts: list[tuple[Example, str]]
    reports: tuple[SourceReport, ...]
    device: torch.device
    meter: CostMeter
    memory: Memory
    say: Callable[[str], None]

    @classmethod
    def of(cls, config: CollectConfig, home: Path, *, notes: Sequence[str] = (), quiet: bool = False) -> Collection:
        """Find the policy and read the prompts; no weights are loaded.

        Raises:
            BadInput: the policy or the prompts cannot be used.
        """

        def say(text: str) -> None:
            if not quiet:
                console.print(text, markup=False)

        for note in notes:
            say(f"note: {note}")
        reset_peak_memory()
        meter, registry = CostMeter(), Registry(home)
        accelerator = make_accelerator(config)
        if accelerator.num_processes > 1:
            found = f"found {accelerator.num_processes} processes"
            raise BadInput(f"data collect: {found}, expected one; start it without a launcher")
        seed_everything(config.seed)
        config, told = with_lengths(config, registry)
        parent = find_model(registry, config.policy, "policy", say=say)
        if told:
            say(told)
        require_needs(config, parents_of(registry, config))
        tokenizer = tokenizer_of(parent, config.trust_remote_code, config)
        (data,) = config.sources()
        read = read_records(*data, home=home, skip_bad_rows=config.skip_bad_rows, splits=config.splits)
        for note in read.notes(functions=any(functions(config))):
            say(f"{read.source}: {note}")
        prompts, reports = prompts_by_split(read, config, tokenizer, Style.of(parent.config))
        memory = Memory(say, meter, advice=MEASURING_ADVICE)
        return cls(config, registry, parent, tokenizer, prompts, reports, accelerator.device, meter, memory, say)

    @property
    def at_once(self) -> dict[str, Any]:
        """How many responses are sampled or scored at once, with the memory that halves them."""
        return {"responses_at_once": self.config.per_device_eval_batch_size, "memory": self.memory}

    def generator(self) -> torch.Generator:
        """The random numbers of the responses, which depend on the seed and the first record."""
        return torch.Generator().manual_seed((self.config.seed + self.config.first_record * 1_000_003) % 2**63)

    def sample(self, generator: torch.Generator) -> Iterator[tuple[list[str], list[Example]]]:
        """Sample the responses in blocks, cycling through the prompts: the splits of a block, and its examples.

        The policy is loaded first. The generator may be used between two blocks.
        """
        config = self.config
        amount = f"{config.num} x {config.k} responses of {self.policy.label} to {len(self.prompts)} prompts"
        self.say(f"collecting {amount}, judge {config.judge}")
        policy = load_policy(self.policy, config, self.tokenizer, self.device, frozen=True)
        shape = ModelShape.of(policy.model)
        first, end = config.first_record, config.first_record + config.num
        for start in progress(range(first, end, DRAWS_AT_ONCE), "collecting"):
            block = [self.prompts[i % len(self.prompts)] for i in range(start, min(start + DRAWS_AT_ONCE, end))]
            sampled, _ = sample_for_prompts(
                policy,
                [example for example, _ in block],
                samples=config.k,
                response_length=config.lengths().response,
                stop_ids=stop_ids(self.tokenizer),
                generator=generator,
                temperature=config.temperature,
                **self.at_once,
                device=self.device,
            )
            options: dict[str, Any] = {"response_length": config.lengths().response, "device": self.device}
            self.meter.generate(shape, sampled, prompts_run(policy, sampled, **self.at_once, **options))
            yield [split for _, split in block], sampled

    def publish(
        self,
        records: Sequence[Mapping[str, Any]],
        dropped: Mapping[str, int],
        parents: Mapping[str, Resolved],
        *,
        number: int | None = None,
        cost: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
    ) -> StageResult:
        """Publish the records.

        Args:
            dropped: what was left out, by reason. parents: besides the policy. number: see `run_collect`.
            cost: default: what this process has spent. metrics: further ones.
        """
        config = self.config
        counts = dict(Counter(row["split"] for row in records))
        known = {"records": len(records), "dropped": dict(dropped), "by_split": counts, "judge": config.judge}
        made = {**known, **(metrics or {})}
        spent = self.meter.report() if cost is None else dict(cost)
        published = self.registry.publish_data(
            config.output_name,
            records,
            number=number,
            config=config.model_dump(mode="json"),
            config_digest=config_digest(config),
            parents={"policy": self.policy, **parents},
            data=[report.to_dict() for report in self.reports],
            tokenizer_digest=tokenizer_digest(self.tokenizer),
            chat_template_digest=chat_template_digest(self.tokenizer),
            seed=config.seed,
            metrics=made,
            moves_optimum=moves_optimum(config),
            cost=spent,
        )
        left_out = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        self.say(f"published {published.label}: {len(records)} records, left out: {left_out}")
        return StageResult("collect", published.label, str(published.path), "", made, spent)


def run_collect(
    config: CollectConfig,
    home: Path,
    *,
    notes: Sequence[str] = (),
    quiet: bool = False,
    number: int | None = None,
    **_options,
) -> StageResult:
    """Sample and label `num` records and publish them; pairs of identical responses are left out.

    number: the version number that is reserved for the records.
    """
    # 1. Policy, prompts, labeller.
    found = Collection.of(config, home, notes=notes, quiet=quiet)
    config, tokenizer, say = found.config, found.tokenizer, found.say
    parents: dict[str, Resolved] = {}
    if config.llm_judge is not None:
        chat = ChatModel.of(config.llm_judge, home)
        chat.probe()

        def scores_of(sampled: list[Example]) -> list[list[float]]:
            return copeland(chat, sampled, tokenizer)

    else:
        labeller = load_reward(found.registry, config.judge, config, found.policy, tokenizer, found.device, say=say)
        parents = {"judge": labeller.resolved} if labeller.resolved is not None else {}

        def scores_of(sampled: list[Example]) -> list[list[float]]:
            return by_example(score(labeller.scorer.score, sampled, **found.at_once), sampled)

    if config.labels == "rank":
        say("labels=rank moves the optimum: labels without errors carry no information on the size of a preference")
    if config.flip_rate:
        rate = f"flip_rate={config.flip_rate:g}"
        say(f"{rate} moves the optimum, but not that of loss_type robust with this label_smoothing")

    # 2. Sample and label in blocks.
    generator = found.generator()
    # Apart from the draws of the responses: these and the other labels stay as they are.
    flips = torch.Generator().manual_seed(((config.seed + config.first_record * 1_000_003) * 8 + 1) * 4096 % 2**63)
    dropped = {"identical_pair": 0}
    records: list[dict[str, Any]] = []
    for splits, sampled in found.sample(generator):
        values = scores_of(sampled)
        orders = preference_order(torch.tensor(values), config.labels, generator).tolist()
        if config.flip_rate:
            flipped = torch.rand(len(orders), generator=flips, dtype=torch.float64) < config.flip_rate
            orders = [order[::-1] if flip else order for order, flip in zip(orders, flipped.tolist(), strict=True)]
        for split, example, scored, order in zip(splits, sampled, values, orders, strict=True):
            if config.k == 2 and config.labels != "best" and example.completions[0] == example.completions[1]:
                dropped["identical_pair"] += 1
                continue
            if config.llm_judge is not None and len(set(scored)) == 1:
                dropped["tie"] = dropped.get("tie", 0) + 1
                continue
            ties = config.llm_judge is not None
            options: dict[str, Any] = {"ties": ties, "flip_rate": config.flip_rate}
            records.append(to_row(example, split, scored, order, config.labels, tokenizer, **options))

    # 3. Publish.
    return found.publish(records, dropped, parents, number=number)
