"""`rlhf init`: an experiment in one file for somebody's own preference pairs, with lengths and sizes from the data."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_pipeline.config.names import is_name
from rlhf_pipeline.data.blank import blank_prompts
from rlhf_pipeline.data.check import describe
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.records import Record, plain
from rlhf_pipeline.data.sources import local_path
from rlhf_pipeline.data.splits import FRACTIONS, assign_splits, carries_splits
from rlhf_pipeline.data.tokenizers import load_tokenizer, train_byte_level_bpe
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.registry import Registry, Resolved, Version
from rlhf_pipeline.stages.common import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED = 5000
"""Records whose lengths are looked at: enough for a quantile."""
FEW = 1500
"""Below so many pairs the default shares leave too little to the judge and to the test."""
SHARES_OF_FEW = {"train": 0.6, "judge": 0.2, "validation": 0.05, "test": 0.15}
JUDGED, TESTED = 200, 100
"""Fewer pairs for the judge, or fewer test prompts, are worth a warning."""
VOCABULARY = 4096
POSITIONS = 512
"""Longest sequence that a model from scratch is made for."""


@dataclass(frozen=True)
class Starter:
    """What the file is made of. pairs: usable rows that say which response is better. model: None is from scratch."""

    name: str
    dataset: str
    model: str | None
    seeds: int
    pairs: int
    faulty: int
    splits: dict[str, int]
    shares: dict[str, float] | None
    max_prompt_length: int
    response_length: int
    warnings: list[str] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether there are pairs that a judge can be trained on."""
        return self.splits.get("judge", 0) > 0


def _up(value: int) -> int:
    """The next multiple of eight."""
    return max(8, -(-value // 8) * 8)


def _lengths(prompt: int, response: int, positions: int | None) -> tuple[int, int, list[str]]:
    """Limits that hold all but a hundredth of the data, and what a model's positions take of them."""
    prompt, response = _up(prompt), _up(response + 1)  # its EOS
    if positions is None or prompt + response <= positions:
        return prompt, response, []
    response = min(response, max(8, positions * response // (prompt + response)))
    told = f"the model has {positions} positions, 99 % of prompts and responses need more: the rest is cut or left out"
    return positions - response, response, [told]


def _warnings(splits: dict[str, int], prompts: int) -> list[str]:
    """What the size of the data means for the answer."""
    said = []
    if splits.get("judge", 0) < JUDGED:
        said.append(
            f"{splits.get('judge', 0)} pairs for the judge: it may be no better than 'the longer response wins', "
            "and then it decides nothing"
        )
    if prompts < TESTED:
        width = 100 * 1.96 * 0.5 / math.sqrt(max(prompts, 1))
        said.append(f"{prompts} test prompts: a win rate is known to about +- {width:.0f} points of a hundred")
    return said


def plan_starter(source: str, *, model: str | None, seeds: int, folder: Path, home: Path) -> Starter:
    """Read the pairs and choose lengths, splits and sizes.

    Args:
        source: preference pairs or rankings. model: to start from; None: from scratch. folder: where the file will lie.

    Raises:
        BadInput: the source says nothing of preferences, or there is no such model.
    """
    found = read_records(source, home=home, skip_bad_rows=True)
    records = [record for record in found.records if record.kind in ("pair", "ranking")]
    if not records:
        kinds = ", ".join(sorted({record.kind for record in found.records})) or "nothing"
        raise BadInput(f"{source}: found {kinds}, expected pairs or rankings: which of two responses is better")
    few = not carries_splits(records, source) and len(records) < FEW
    shares = SHARES_OF_FEW if few else None
    assigned = assign_splits(records, shares or FRACTIONS, source)
    splits = dict(Counter(assigned))
    tested = len({record.prompt_key for record, split in zip(records, assigned, strict=True) if split == "test"})
    learned = [record for record, split in zip(records, assigned, strict=True) if split == "train"]
    blank = blank_prompts(found.records, source_tokenizer_digest=found.tokenizer_digest)
    resolved = None if model is None else Registry(home).resolve(model)
    tokenizer, positions = _tokenizer(learned or records, resolved)
    measured = describe(replace(found, records=records[:MEASURED]), tokenizer=tokenizer)["lengths"]
    if not {"prompt", "chosen"} <= measured.keys():
        raise BadInput(f"{source}: no pair with a prompt that {model or 'a tokenizer'} can read; see rlhf data check")
    longest = max(measured[name]["p99"] for name in ("chosen", "rejected"))
    prompt, response, told = _lengths(measured["prompt"]["p99"], longest, positions)
    path = local_path(source)
    stem = "pairs" if path is None else path.name.partition(".")[0]
    return Starter(
        name=stem if is_name(stem) else "pairs",
        dataset=source if path is None else os.path.relpath(path, folder),
        model=_model(resolved, model, folder),
        seeds=seeds,
        pairs=len(records),
        faulty=len({item.fault.where for item in [*found.faults, *blank]}),
        splits=splits,
        shares=shares,
        max_prompt_length=prompt,
        response_length=response,
        warnings=told + _warnings(splits, tested),
    )


def _tokenizer(learned: Sequence[Record], resolved: Resolved | None) -> tuple[PreTrainedTokenizerBase, int | None]:
    """What measures lengths, and the positions of the model; without a model what `sft` would train."""
    if resolved is not None:
        return load_tokenizer(resolved.location, revision=resolved.revision), positions_of(resolved)
    texts = (plain(text) for record in learned for text in (record.prompt or "", record.completions[0]))
    return train_byte_level_bpe(texts, VOCABULARY), POSITIONS


def _model(resolved: Resolved | None, model: str | None, folder: Path) -> str | None:
    """How the file names a model: the version as it is now, a directory from where the file lies, or a hub id."""
    if resolved is None or isinstance(resolved, Version):
        return None if resolved is None else resolved.label
    return model if resolved.path is None else os.path.join(".", os.path.relpath(resolved.path, folder))


def render_starter(plan: Starter) -> str:
    """The experiment's YAML, with a comment wherever somebody may want another value."""
    scratch, small = plan.model is None, plan.splits.get("train", plan.pairs) < 2000
    device, parts = (16, 1 if small else 2) if scratch else (4, 4 if small else 8)
    rollout = 64 if small else 128
    values = {
        "pairs": f"{plan.pairs:,}",
        "name": plan.name,
        "seeds": json.dumps(list(range(plan.seeds))),
        "start": _SCRATCH if scratch else f"    model_name_or_path: {json.dumps(plan.model, ensure_ascii=False)}\n",
        "dataset": json.dumps(plan.dataset, ensure_ascii=False),
        "skip": _SKIP.format(plan.faulty) if plan.faulty else "",
        "shares": f"      split_fractions: &shares {json.dumps(plan.shares)}\n" if plan.shares else "",
        "prompt": plan.max_prompt_length,
        "response": plan.response_length,
        "size": f"    per_device_train_batch_size: {device}\n    gradient_accumulation_steps: {parts}\n",
        "device": device,
        "rollout": rollout,
        "episodes": 100 * rollout,
        "judged": "    judge: judge                             # watches the responses and moves nothing\n",
        "again": "    num_train_epochs: 3                      # few pairs: three times over\n" if small else "",
        "sft_rate": "1.0e-3" if scratch else "1.0e-5",
        "reward_rate": "1.0e-4" if scratch else "1.0e-5",
        "ppo_rate": "5.0e-5" if scratch else "3.0e-6",
        "dpo_rate": "1.0e-4" if scratch else "1.0e-6",
        "compared": "".join(
            f"  {line}\n"
            for line, wanted in (
                ("judge: judge", plan.judged),
                ("split_fractions: *shares", plan.shares),
                ("skip_bad_rows: true", plan.faulty),
            )
            if wanted
        ),
    }
    values["judge"] = _JUDGE.format_map(values) if plan.judged else ""
    values["judged"] = values["judged"] if plan.judged else ""
    return _FILE.format_map(values)


_SCRATCH = f"""\
    # No model was named: a small one from scratch. `rlhf init --model REF` starts from another.
    model_init: {{model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 4,
      num_attention_heads: 4, num_key_value_heads: 4, tie_word_embeddings: true,
      max_position_embeddings: {POSITIONS}, initializer_range: 0.05}}
    tokenizer_init: {{type: byte_level_bpe, vocab_size: {VOCABULARY}}}
    completion_only_loss: false              # it has to learn the language too
    num_train_epochs: 5
"""
_SKIP = "      skip_bad_rows: true                    # {} faulty rows: `rlhf data check` names them\n"
_JUDGE = """\
  judge:                                     # on pairs that no arm sees; its seed keeps it one for all
    stage: train-rm
    model_name_or_path: sft
    <<: *data
    dataset_train_split: judge
    num_train_epochs: 3
    learning_rate: {reward_rate}
    warmup_steps: 0.1
{size}    seed: 1000
"""
_FILE = """\
# SFT, reward model, PPO and DPO on {pairs} preferences, compared. Keys: docs/experiments.md, docs/config.md.
#   rlhf run THIS --dry-run        checks everything, trains nothing
#   rlhf run THIS                  runs it; what is done is skipped, what was stopped goes on
name: {name}
seeds: {seeds}                             # each draws reward model, PPO and DPO anew
stages:
  sft:                                       # on the preferred responses
    stage: sft
{start}    <<: &data
      dataset_name: {dataset}
{skip}{shares}\
      max_prompt_length: {prompt:<19} # tokens, enough for 99 %; longer prompts are cut from the left
      response_length: {response:<21} # tokens with the end; longer responses are left out
    learning_rate: {sft_rate}
    lr_scheduler_type: cosine
    warmup_steps: 0.05
{size}    save_steps: 100                          # a killed run goes on from here
  reward:
    stage: train-rm
    model_name_or_path: sft
    <<: *data
    learning_rate: {reward_rate}
    warmup_steps: 0.1
{again}{size}    save_steps: 100
{judge}\
  ppo:
    stage: ppo
    model_name_or_path: sft
    reward_model_path: reward
{judged}\
    <<: *data
    kl_coef: 0.1                             # PPO's beta: the same as DPO's, so that both have one optimum
    learning_rate: {ppo_rate}
    total_episodes: {episodes:<24} # responses in all: 100 updates
    rollout_batch_size: {rollout:<20} # responses in an update
    num_mini_batches: 4
    per_device_train_batch_size: {device}
    save_steps: 10
  dpo:
    stage: dpo
    model_name_or_path: sft
    <<: *data
    beta: 0.1
    learning_rate: {dpo_rate}
    warmup_steps: 0.1
{again}{size}    save_steps: 100
# One point each says little of two methods that trade reward against KL: try several betas.
# sweep: {{ppo.kl_coef: [.03, .1, .3], dpo.beta: [.03, .1, .3]}}
compare:
  arms: [ppo, dpo]
  baseline: sft
{compared}  samples: 4
"""
