"""The file that `rlhf init` writes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

VOCABULARY = 4096
TEMPLATE = "chatml"
"""The chat template of a model that has none, if the data are messages."""
POSITIONS = 512
"""The longest sequence, in tokens, of a model from scratch."""


@dataclass(frozen=True)
class Quick:
    """The sizes of a first look (`rlhf init --quick`).

    rows: most training pairs of a stage. episodes: PPO's responses. prompts: test prompts, and held-out rows.
    """

    rows: int = 512
    episodes: int = 256
    prompts: int = 64


@dataclass(frozen=True)
class Starter:
    """The values of the file. pairs: number of usable preferences. model: None trains one from scratch.

    cut: whether lengths were reduced to the positions of the model. templated: whether the experiment gives the model a
    chat template. tested: number of test prompts that are not in the training split. lora: whether all stages train
    adapters on the weights of `model`. quick: the sizes of a first look; None: an experiment of the usual sizes.
    """

    name: str
    dataset: str
    model: str | None
    seeds: int
    pairs: int
    faulty: int
    splits: dict[str, int]
    train: str
    test: str
    shares: dict[str, float] | None
    max_prompt_length: int
    response_length: int
    cut: bool = False
    templated: bool = False
    tested: int = 0
    lora: bool = False
    quick: Quick | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def judged(self) -> bool:
        """Whether there are pairs that a judge can be trained on."""
        return self.splits.get("judge", 0) > 0


def _quoted(text: str | None) -> str:
    """A text as a double-quoted YAML string."""
    return json.dumps(text, ensure_ascii=text is not None and not text.isprintable())


def render_starter(plan: Starter) -> str:
    """The experiment's YAML, with a comment at values that a user may want to change."""
    scratch, quick, small = plan.model is None, plan.quick, plan.splits[plan.train] < 2000
    device, parts = (16, 1 if small or quick else 2) if scratch else (4, 4 if small or quick else 8)
    rollout = 32 if quick else 64 if small else 128
    episodes = quick.episodes if quick else 100 * rollout
    size = f"    per_device_train_batch_size: {device}\n    gradient_accumulation_steps: {parts}\n"
    passes = f"    num_train_epochs: {5 if plan.quick is None else 1}\n"
    rates = _RATES["scratch" if scratch else "lora" if plan.lora else "whole"]
    values = {
        "pairs": f"{plan.pairs:,}",
        "name": _quoted(plan.name),
        "seeds": json.dumps(list(range(plan.seeds))),
        "first_look": _FIRST_LOOK.format_map(_cuts(plan, plan.quick)) if plan.quick else "",
        "limits": _LIMITS.format(plan.quick.rows) if plan.quick else "",
        "start": _SCRATCH + passes if scratch else f"    model_name_or_path: {_quoted(plan.model)}\n",
        "dataset": _quoted(plan.dataset),
        "parts": "".join(
            f"      {key}: {_quoted(name)}\n"
            for key, name, usual in (
                ("dataset_train_split", plan.train, "train"),
                ("dataset_test_split", plan.test, "test"),
            )
            if name != usual
        ),
        "skip": _SKIP.format(plan.faulty) if plan.faulty else "",
        "template": _TEMPLATE if plan.templated else "",
        "shares": f"      split_fractions: &shares {json.dumps(plan.shares)}\n" if plan.shares else "",
        "prompt": plan.max_prompt_length,
        "response": plan.response_length,
        "enough": "" if quick or plan.cut else ", enough for 99 %",
        "size": size + (f"    max_eval_samples: {quick.prompts}\n" if quick else ""),
        "minibatch": min(device, rollout // 4),
        "rollout": rollout,
        "episodes": episodes,
        "updates": episodes // rollout,
        # The first step of a warm-up has the rate 0: of a first look's few steps none is given away.
        "sft_warmup": "" if quick else "    warmup_steps: 0.05\n",
        "warmup": "" if quick else "    warmup_steps: 0.1\n",
        "ppo_saves": 4 if quick else 10,
        "epochs": "    num_ppo_epochs: 2\n" if quick else "",
        "judged": "    judge: judge                             # scores the responses; has no effect on training\n",
        "again": "    num_train_epochs: 3                      # few pairs: three epochs\n"
        if small and not quick
        else "",
        "centred": _CENTRED.format(16 if quick else 64) if quick or not scratch else "",
        "lora": _LORA if plan.lora else "",
        "shared": _SHARED if plan.lora else "",
        **{f"{stage}_rate": rate for stage, rate in zip(("sft", "reward", "ppo", "dpo"), rates, strict=True)},
        "compared": "".join(
            f"  {line}\n"
            for line, wanted in (
                ("judge: judge", plan.judged),
                (f"split: {_quoted(plan.test)}", plan.test != "test"),
                ("split_fractions: *shares", plan.shares),
                ("skip_bad_rows: true", plan.faulty),
                (f"max_prompts: {quick.prompts if quick else 0}", quick),
                (f"samples: {2 if quick else 4}", True),
            )
            if wanted
        ),
    }
    values["judge_epochs"] = 1 if quick else 3
    values["judge"] = _JUDGE.format_map(values) if plan.judged else ""
    values["judged"] = values["judged"] if plan.judged else ""
    return _FILE.format_map(values)


def _cuts(plan: Starter, quick: Quick) -> dict[str, object]:
    """What a first look leaves out, and how wide the interval of its win rates is, in percentage points."""
    tested = min(quick.prompts, plan.tested)
    return {
        "rows": f"{min(quick.rows, plan.splits[plan.train]):,}",
        "pairs": f"{plan.splits[plan.train]:,}",
        "episodes": quick.episodes,
        "prompts": f"{tested} of {plan.tested:,}",
        "response": plan.response_length,
        "width": round(98 / max(tested, 1) ** 0.5),
    }


_RATES = {
    "scratch": ("1.0e-3", "1.0e-4", "5.0e-5", "1.0e-4"),
    "whole": ("1.0e-5", "1.0e-5", "3.0e-6", "1.0e-6"),
    "lora": ("2.0e-4", "1.0e-4", "3.0e-5", "1.0e-5"),  # adapters start at 0 and take about ten times the rate
}
"""Learning rates of sft, train-rm, ppo and dpo."""

_LORA = """\
      use_peft: true                         # LoRA adapters; the weights of the model are frozen
      lora_r: 16
      lora_alpha: 32
"""
_FIRST_LOOK = """\
# A first look. Compared with the file of `rlhf init` without --quick it has one seed, {rows} of {pairs} training pairs,
# responses of up to {response} tokens, one epoch, {episodes} PPO episodes (6,400 or more) and {prompts} test prompts.
# It shows that your data, model and memory fit, and what a report looks like. It cannot tell which method is better:
# the 95 % interval of a win rate is about ±{width} points, one seed says nothing about the spread between training
# runs, PPO has hardly begun to learn, and a judge of so few pairs may be no better than "the longer response wins".
"""
_LIMITS = """\
      max_train_samples: {:<19} # pairs (PPO: prompts), by hash
      bf16: auto                             # if that is faster on this machine
      logging_steps: 1                       # every step: there are few
"""
_CENTRED = "    reward_centering_samples: {:<14} # few, because a large model samples slowly\n"
_SHARED = "    shared_base: true                        # one copy of the frozen weights for all four models\n"
_SCRATCH = f"""\
    # No model was named: a small one from scratch. `rlhf init --model REF` starts from another.
    model_init: {{model_type: llama, hidden_size: 256, intermediate_size: 688, num_hidden_layers: 4,
      num_attention_heads: 4, num_key_value_heads: 4, tie_word_embeddings: true,
      max_position_embeddings: {POSITIONS}, initializer_range: 0.05}}
    tokenizer_init: {{type: byte_level_bpe, vocab_size: {VOCABULARY}}}
    completion_only_loss: false              # the model also has to learn the language
"""
_SKIP = "      skip_bad_rows: true                    # faulty rows: {}; `rlhf data check` lists them\n"
_TEMPLATE = f"      chat_template: {TEMPLATE:<23} # the data are messages, and the model has no chat template\n"
_JUDGE = """\
  judge:                                     # on pairs that no arm is trained on; one judge for all seeds
    stage: train-rm
    model_name_or_path: sft
    <<: *data
    dataset_train_split: judge
    num_train_epochs: {judge_epochs}
    learning_rate: {reward_rate}
{warmup}{centred}{size}    seed: 1000
"""
_FILE = """\
# SFT, reward model, PPO and DPO on {pairs} preferences, compared. Keys: docs/experiments.md, docs/config.md.
#   rlhf run THIS --dry-run        checks everything and trains nothing
#   rlhf run THIS                  runs it; finished runs are skipped, stopped runs continue
{first_look}name: {name}
seeds: {seeds}                             # each seed trains its own reward model, PPO and DPO
stages:
  sft:                                       # trained on the preferred responses
    stage: sft
{start}    <<: &data
      dataset_name: {dataset}
{parts}{skip}{template}{shares}{limits}{lora}\
      max_prompt_length: {prompt:<19} # tokens{enough}; longer prompts are cut on the left
      response_length: {response:<21} # tokens with EOS; longer responses are left out
    learning_rate: {sft_rate}
    lr_scheduler_type: cosine
{sft_warmup}{size}    save_steps: 100                          # a killed run continues from the last save
  reward:
    stage: train-rm
    model_name_or_path: sft
    <<: *data
    learning_rate: {reward_rate}
{warmup}{centred}{again}{size}    save_steps: 100
{judge}\
  ppo:
    stage: ppo
    model_name_or_path: sft
    reward_model_path: reward
{judged}\
    <<: *data
    kl_coef: 0.1                             # PPO's beta: the same as DPO's, so that both have the same optimum
    learning_rate: {ppo_rate}
    total_episodes: {episodes:<24} # total number of responses: {updates} updates
    rollout_batch_size: {rollout:<20} # responses per update
    num_mini_batches: 4
{epochs}    per_device_train_batch_size: {minibatch}
{shared}    save_steps: {ppo_saves}
  dpo:
    stage: dpo
    model_name_or_path: sft
    <<: *data
    beta: 0.1
    learning_rate: {dpo_rate}
{warmup}{again}{size}    save_steps: 100
# One beta says little about methods that trade reward against KL: try several betas.
# sweep: {{ppo.kl_coef: [.03, .1, .3], dpo.beta: [.03, .1, .3]}}
compare:
  arms: [ppo, dpo]
  baseline: sft
{compared}"""
