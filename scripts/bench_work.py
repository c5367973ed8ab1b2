"""The work of bench.py for both sides: examples, prompts, a tokenizer and two models."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.config.lengths import Lengths
from rlhf_pipeline.data.kinds import as_kind
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.records import plain
from rlhf_pipeline.data.tokenize import Example, tokenize
from rlhf_pipeline.data.tokenizers import load_tokenizer, train_byte_level_bpe
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.training.windows import epoch_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SEED = 0
LEARNING_RATE = 1e-5
# Median and 95th percentile of the tokens of HH's harmless-base/test under its own BPE of 4,096.
HH_LENGTHS = {"prompt": (103, 377), "chosen": (29, 131), "rejected": (39, 161)}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Sizes:
    """The amount of work. Warm-up (in steps; PPO: in updates) is in addition to `examples` and `episodes`.

    group: responses to a prompt of RLOO and GRPO; their rollouts have as many responses as those of PPO.
    model: of random weights, if no pretrained one is given. lora: the rank of the adapters; 0: all weights are trained.
    """

    examples: int = 320
    batch: int = 8
    warmup: int = 4
    max_length: int = 512
    vocab_size: int = 4096
    episodes: int = 128
    rollout: int = 32
    warmup_updates: int = 1
    prompt_length: int = 128
    new_tokens: int = 48
    ppo_epochs: int = 4
    group: int = 8
    minibatches: int = 4
    synthetic_rows: int = 2300
    model: dict[str, Any] = field(default_factory=lambda: dict(LLAMA))
    lora: int = 0

    @property
    def pairs(self) -> int:
        return self.examples + self.warmup * self.batch

    @property
    def prompts(self) -> int:
        return self.episodes + self.warmup_updates * self.rollout


QUICK = Sizes(
    examples=16,
    warmup=1,
    vocab_size=512,
    episodes=8,
    rollout=8,
    new_tokens=4,
    ppo_epochs=2,
    group=4,
    synthetic_rows=200,
    model={**LLAMA, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
)


# For a pretrained model of some hundred million parameters: minutes for each run on two cores.
PRETRAINED = Sizes(examples=16, batch=4, warmup=1, episodes=8, rollout=8)


def synthetic_pairs(count: int, seed: int = SEED) -> list[dict[str, str]]:
    """Transcripts of invented words; their lengths are log-normal with HH's medians and 95th percentiles."""
    draw = random.Random(seed)
    letters = ("bdfgklmnprstvz", "aeiou")
    words = ["".join(draw.choice(part) for _ in range(draw.randint(1, 3)) for part in letters) for _ in range(1200)]
    words = sorted(set(words), key=lambda word: (len(word), word))  # short words are more frequent
    weights = [1 / (rank + 10) for rank in range(len(words))]

    def text(part: str, less: int = 0) -> str:
        median, high = HH_LENGTHS[part]
        length = round(draw.lognormvariate(math.log(median), math.log(high / median) / 1.645)) - less
        return " " + " ".join(draw.choices(words, weights, k=max(1, length)))

    frame = "\n\nHuman:{}\n\nAssistant:"  # a dozen tokens with the end token of the response
    return [
        {
            "prompt": frame.format(text("prompt", 8)),
            "chosen": text("chosen", 1),
            "rejected": text("rejected", 1),
        }
        for _ in range(count)
    ]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def length_table(pairs: Sequence[Example], prompts: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Median and 95th percentile of tokens."""
    parts = {
        "prompt": [len(e.prompt_ids) for e in pairs],
        "chosen": [len(e.completions[0]) for e in pairs],
        "rejected": [len(e.completions[1]) for e in pairs],
        "prompt of PPO": [len(e.prompt_ids) for e in prompts],
    }
    return {
        name: {"median": statistics.median(found), "p95": sorted(found)[round(0.95 * (len(found) - 1))]}
        for name, found in parts.items()
    }


def make_models(folder: Path, tokenizer: PreTrainedTokenizerBase, sizes: Sizes, model: Path | None) -> dict[str, Any]:
    """Write a policy and a reward model on its trunk; return their paths and the policy's size.

    model: the folder of a pretrained policy; None: random weights.
    """
    import torch
    from transformers.utils import logging

    from rlhf_pipeline.models.loading import init_causal_lm, init_reward_model, load_causal_lm, save_model

    logging.set_verbosity_error()  # a head without weights is intended here
    logging.disable_progress_bar()
    if model is None:
        policy = init_causal_lm({**sizes.model, "vocab_size": sizes.vocab_size}, tokenizer, seed=SEED)
    else:
        policy = load_causal_lm(model, dtype=torch.float32)
    save_model(policy, tokenizer, folder / "policy")
    # The head that `rlhf train-rm` draws from this seed, so that both sides start from the same weights.
    reward = init_reward_model(folder / "policy", tokenizer, seed=SEED)
    save_model(reward, tokenizer, folder / "reward")
    return {
        "policy": str(folder / "policy"),
        "reward": str(folder / "reward"),
        "parameters": sum(p.numel() for p in policy.parameters()),
        "model": None if model is None else model.resolve().name,
    }


def prepare(folder: Path, source: Path | None, sizes: Sizes, threads: int, model: Path | None = None) -> dict[str, Any]:
    """Write everything that a run needs into a folder; returns the content of its work.json.

    model: the folder of a pretrained policy and its tokenizer; None: random weights.

    Raises:
        BadInput: the file does not exist, or has too few pairs or prompts that fit.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source is not None and not source.is_file():
        raise BadInput(f"--hh {source}: no such file; expected preference pairs (chosen, rejected), or leave it out")
    path = str(source or write_rows(folder / "synthetic.jsonl", synthetic_pairs(sizes.synthetic_rows)))
    records, _ = as_kind(read_records(path, skip_bad_rows=True).records, "pair", path)
    texts = [plain(text) for record in records for text in (record.prompt, *record.completions)]
    tokenizer = load_tokenizer(str(model)) if model else train_byte_level_bpe(texts, sizes.vocab_size)
    longest = Lengths(sizes.max_length, sizes.max_length, 2 * sizes.max_length)
    pairs, _ = tokenize(records, tokenizer, longest)
    prompts, _ = tokenize(records, tokenizer, longest, kind="prompt")
    # Prompt and longer response fit together, so that neither side cuts or drops a pair.
    pairs = [e for e in pairs if len(e.prompt_ids) + max(map(len, e.completions)) <= sizes.max_length][: sizes.pairs]
    prompts = [e for e in prompts if len(e.prompt_ids) <= sizes.prompt_length][: sizes.prompts]
    for what, found, wanted in (("pairs", pairs, sizes.pairs), ("prompts", prompts, sizes.prompts)):
        if len(found) < wanted:
            raise BadInput(f"{source}: {len(found)} {what} that are short enough; expected at least {wanted}")
    work = {
        "source": "synthetic" if source is None else source.name,
        "seed": SEED,
        "threads": threads,
        "learning_rate": LEARNING_RATE,
        "sizes": asdict(sizes),
        "lengths": length_table(pairs, prompts),
        "pairs": write_rows(
            folder / "pairs.jsonl",
            [dict(zip(("prompt", "chosen", "rejected"), (e.prompt_text, *e.completion_texts))) for e in pairs],
        ),
        # Of every pair both sides, each as a response with its label; as many rows as there are pairs.
        "labels": write_rows(
            folder / "labels.jsonl",
            [
                {"prompt": e.prompt_text, "completion": text, "label": good}
                for e in pairs
                for text, good in zip(e.completion_texts, (True, False))
            ][: len(pairs)],
        ),
        "prompts": write_rows(
            folder / "prompts.jsonl", [{"prompt": e.prompt_text, "prompt_ids": e.prompt_ids} for e in prompts]
        ),
        # The order of the package's loop; the peer gets its rows in the same order.
        "order": epoch_order(len(pairs), SEED, 0),
        "prompt_order": epoch_order(len(prompts), SEED, 0),
        **make_models(folder, tokenizer, sizes, model),
    }
    (folder / "work.json").write_text(json.dumps(work))
    return work
