"""What TRL 1.16 itself does otherwise: its own preparation of texts, its IPO, its label smoothing.

These tests run TRL as it is, without this package's engine, but for IPO's. One that fails after an update of TRL
says that docs/trl.md has to change.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.functional import logsigmoid

from rlhf_pipeline.data.tokenizers import train_byte_level_bpe
from rlhf_pipeline.models.loading import init_causal_lm, init_reward_model, load_causal_lm, save_model
from rlhf_pipeline.stages.common import tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.training.trl_engine.untouched import contained

pytestmark = pytest.mark.check

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
MAX_LENGTH = 8


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A language model with a tokenizer of bytes: one letter is one token."""
    torch.set_num_threads(1)
    tokenizer = train_byte_level_bpe(["abc"], 258)
    folder = tmp_path_factory.mktemp("start")
    save_model(init_causal_lm(LLAMA, tokenizer, seed=0), tokenizer, folder)
    return folder, tokenizer


@pytest.fixture
def trainer(start, tmp_path):
    """Make one of TRL's trainers on texts, in its own way."""
    import trl
    from datasets import Dataset

    folder, tokenizer = start

    def make(name, rows, **options):
        load = functools.partial(init_reward_model, tokenizer=tokenizer, seed=0) if name == "Reward" else load_causal_lm
        silent = {"report_to": "none", "disable_tqdm": True}
        with contained():
            arguments = getattr(trl, f"{name}Config")(
                str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, **silent, **options
            )
            base = type("Silent", (getattr(trl, f"{name}Trainer"),), {"_send_telemetry": lambda self: None})
            data = Dataset.from_list(rows)
            return base(model=load(folder), args=arguments, train_dataset=data, processing_class=tokenizer)

    return make


def sft_row(prompt, completion):
    return {"prompt": "p" * prompt, "completion": "c" * completion}


def pair(prompt, chosen, rejected):
    return {"prompt": "p" * prompt, "chosen": "c" * chosen, "rejected": "r" * rejected}


# Letters of prompt, chosen, rejected; TRL adds one end token to each response.
TOYS = [
    pair(2, 3, 4),  # 6 and 7 tokens: fits
    pair(2, 3, 9),  # the rejected one is too long
    pair(2, 9, 3),  # the chosen one is too long
    pair(3, 5, 2),  # the chosen one is too long by its end token alone
    pair(7, 4, 4),  # the prompt leaves room for one token
    pair(9, 1, 2),  # the prompt leaves no room
]


def test_six_toy_pairs_at_one_max_length(start, trainer):
    """SFT keeps 5 (cut), the reward model 1 (whole), DPO 5 (cut): three stages, three sets of examples."""
    eos = start[1].eos_token_id
    demonstrations = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in TOYS]
    sft = trainer("SFT", demonstrations, max_length=MAX_LENGTH).train_dataset
    assert [len(ids) for ids in sft["input_ids"]] == [6, 6, 8, 8, 8]
    assert [ids[-1] == eos for ids in sft["input_ids"]] == [True, True, False, False, False]

    reward = trainer("Reward", TOYS, max_length=MAX_LENGTH).train_dataset
    assert [(len(c), len(r)) for c, r in zip(reward["chosen_ids"], reward["rejected_ids"], strict=True)] == [(6, 7)]

    dpo = trainer("DPO", TOYS, max_length=MAX_LENGTH)
    assert [len(ids) for ids in dpo.train_dataset["prompt_ids"]] == [2, 2, 2, 3, 7]
    batch = dpo.data_collator(list(dpo.train_dataset))
    lengths = batch["attention_mask"].sum(1).tolist()
    assert lengths == [6, 6, 8, 8, 8, 7, 8, 6, 6, 8]
    last = [ids[length - 1] == eos for ids, length in zip(batch["input_ids"].tolist(), lengths, strict=True)]
    assert last == [True, True, False, False, False, True, False, True, True, False]


def test_a_response_cut_by_max_length_loses_its_end_token(start, trainer):
    """Every stage here leaves such an example out and counts it, or keeps it as cut where the data say so."""
    eos = start[1].eos_token_id
    (row,) = trainer("SFT", [sft_row(2, 20)], max_length=None).train_dataset
    assert len(row["input_ids"]) == 23 and row["input_ids"][-1] == eos
    (row,) = trainer("SFT", [sft_row(2, 20)], max_length=MAX_LENGTH).train_dataset
    assert len(row["input_ids"]) == MAX_LENGTH and eos not in row["input_ids"]
    assert row["labels"] == [-100] * 2 + row["input_ids"][2:]  # and is trained on as if it went on


def test_the_default_max_length_cuts_at_1024():
    import trl

    for name in ("SFTConfig", "RewardConfig", "DPOConfig"):
        assert getattr(trl, name).__dataclass_fields__["max_length"].default == 1024


def loss_of(trainer, reference):
    """The loss of DPOTrainer on its whole data, against a reference with other weights."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad(), contained():
        for parameter in trainer.ref_model.parameters():
            parameter += reference * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        return float(trainer.compute_loss(trainer.model, batch)), trainer


def log_ratios(trainer):
    """(log pi - log pi_ref) of chosen and rejected responses by the plain forward pass, and their lengths."""
    found = []
    for row in trainer.train_dataset:
        for name in ("chosen_ids", "rejected_ids"):
            ids, start = torch.tensor([row["prompt_ids"] + row[name]]), len(row["prompt_ids"])
            sums = []
            for model in (trainer.model, trainer.ref_model):
                with torch.no_grad():
                    table = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
                sums.append(float(table.gather(1, ids[0, 1:, None])[start - 1 :].sum()))
            found.append((sums[0] - sums[1], len(row[name])))
    return found[0::2], found[1::2]


def test_label_smoothing_is_ignored_by_sigmoid(trainer):
    rows, beta, epsilon = TOYS[:3], 0.5, 0.3
    options = {"beta": beta, "max_length": None, "loss_type": ["sigmoid"]}
    plain, made = loss_of(trainer("DPO", rows, **options), 0.2)
    smoothed, _ = loss_of(trainer("DPO", rows, label_smoothing=epsilon, **options), 0.2)
    margins = torch.tensor([beta * (c - r) for (c, _), (r, _) in zip(*log_ratios(made), strict=True)])
    conservative = -(1 - epsilon) * logsigmoid(margins) - epsilon * logsigmoid(-margins)
    assert plain == pytest.approx(float(-logsigmoid(margins).mean()), abs=1e-5)
    assert smoothed == plain
    assert abs(float(conservative.mean()) - plain) > 1e-2


def test_ipo_averages_over_the_tokens_of_a_response(trainer):
    """Azar et al. 2023, eq. 17 with means (TRL's ipo, our ipo_mean) in place of sums (our ipo)."""
    beta = 0.5
    found, made = loss_of(trainer("DPO", TOYS[:3], beta=beta, max_length=None, loss_type=["ipo"]), 0.2)
    pairs = list(zip(*log_ratios(made), strict=True))
    means = [(c / n - r / m - 1 / (2 * beta)) ** 2 for (c, n), (r, m) in pairs]
    sums = [(c - r - 1 / (2 * beta)) ** 2 for (c, _), (r, _) in pairs]
    assert found == pytest.approx(sum(means) / 3, abs=1e-5)
    assert abs(found - sum(sums) / 3) > 0.1


def test_ipo_mean_against_another_reference_is_trls_ipo(lab, both):
    """At the first step already: the reference is not the policy, and TRL scores it itself."""
    lab.run("sft", output_name="elsewhere", seed=5, max_steps=2, learning_rate=0.1)
    results = both("dpo", loss_type="ipo_mean", beta=0.2, ref_model="elsewhere", max_steps=2)
    native, theirs = (lab.rows(result.run)[0] for result in results)
    assert native["loss/dpo"] == pytest.approx(theirs["loss/dpo"], rel=1e-5)
    assert abs(native["loss/dpo"] - (1 / 0.4) ** 2) > 0.1  # what it would be against the policy itself
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen_minus_reference"):
        assert native[name] == pytest.approx(theirs[name], abs=1e-5)
        assert abs(native[name]) > 1e-2


def test_here_every_stage_keeps_and_drops_the_same_pairs(lab, start, pairs):
    """At the same limits of prompt and response: SFT, reward model and DPO read one set of examples."""
    folder, _ = start
    source = pairs(rows=[{k: v if k == "prompt" else f" {v}" for k, v in row.items()} for row in TOYS])
    tokenizer = tokenizer_of(lab.registry.resolve(str(folder)))
    kept = {}
    for stage, kind in (("sft", "demonstration"), ("train-rm", "pair"), ("dpo", "pair")):
        limits = {"max_prompt_length": 6, "response_length": 8}
        config = lab.config(stage, dataset_name=source, dataset_train_split="all", **limits)
        examples, _ = StageData(config, lab.home, lambda _: None).split(kind, "all", tokenizer)
        kept[stage] = [(len(e.prompt_ids), len(e.completions[0]), e.completions[0][-1]) for e in examples]
    eos = tokenizer.eos_token_id
    # With a blank before it and the end token after it a response of 9 letters is 11 tokens: left out, not cut.
    assert kept["train-rm"] == kept["dpo"] == [(2, 5, eos), (3, 7, eos), (6, 6, eos), (6, 3, eos)]
    assert kept["sft"] == [(2, 5, eos), (2, 5, eos), (3, 7, eos), (6, 6, eos), (6, 3, eos)]
