"""The native loop and TRL's trainers take the same steps on the same examples."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.config.lengths import resolve_lengths
from rlhf_pipeline.data.batch import micro_batches
from rlhf_pipeline.models.loading import init_reward_model
from rlhf_pipeline.stages.common import tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.training.trl_engine import trainers
from rlhf_pipeline.training.windows import epoch_order, example_windows
from tests.training.conftest import SETTINGS, word_pairs

pytestmark = pytest.mark.check

LOSS = {"sft": "loss/nll", "train-rm": "loss/bradley_terry", "dpo": "loss/dpo"}
CASES = [
    ("sft", {}),
    ("sft", {"completion_only_loss": False}),
    ("train-rm", {}),
    ("dpo", {"beta": 0.5}),
    ("dpo", {"beta": 0.5, "precompute_ref_log_probs": False}),
    ("dpo", {"beta": 0.5, "loss_type": "robust", "label_smoothing": 0.2}),
    ("dpo", {"beta": 0.5, "loss_type": "hinge"}),
    ("dpo", {"beta": 0.5, "loss_type": ["sigmoid", "apo_zero"], "loss_weights": [0.7, 2.0]}),
    ("dpo", {"beta": 0.5, "f_divergence": "js", "loss_type": "sigmoid_norm"}),
    ("dpo", {"beta": 0.5, "f_divergence": "forward_kl"}),
    ("dpo", {"beta": 0.5, "f_divergence": "alpha", "f_alpha": 0.3}),
    ("dpo", {"beta": 0.5, "ld_alpha": 0.4}),
    ("dpo", {"beta": 0.5, "sync_ref_model": True, "ref_model_sync_steps": 3}),
    ("dpo", {"beta": 0.5, "loss_type": "ipo_mean"}),
    ("dpo", {"beta": 0.5, "loss_type": "sigmoid_norm"}),
    ("dpo", {"beta": 0.5, "loss_type": "apo_zero"}),
]
# Windows of 8, 8 and 6 pairs: the last one of an epoch is smaller, in micro-batches of one size. 2.4 epochs: 8 steps.
CUTS = {1: 8, 4: 2}
AGREE = 1e-5  # of a gradient norm above 1: of its size


def assert_same_steps(lab, stage, results, steps):
    rows = [lab.rows(result.run) for result in results]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == list(range(1, steps + 1))
    for native, theirs in zip(*rows, strict=True):
        assert abs(native[LOSS[stage]] - theirs[LOSS[stage]]) <= AGREE
        assert abs(native["grad_norm"] - theirs["grad_norm"]) <= AGREE * max(1.0, native["grad_norm"])
        assert native["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-12)
        assert native["epoch"] == pytest.approx(theirs["epoch"], rel=1e-12)
    return rows


@pytest.mark.parametrize("accumulation", CUTS)
@pytest.mark.parametrize(("stage", "changes"), CASES)
def test_loss_and_gradient_norm_of_every_step(lab, both, stage, changes, accumulation):
    cut = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": CUTS[accumulation]}
    results = both(stage, num_train_epochs=2.4, max_steps=-1, **cut, **changes)
    rows, _ = assert_same_steps(lab, stage, results, 8)
    assert min(row["grad_norm"] for row in rows) > 1e-3 and max(row["grad_norm"] for row in rows) > 0.5  # clipped
    assert len({row[LOSS[stage]] for row in rows}) >= 7  # DPO's first two are equal: warm-up begins at a rate of 0
    before, after, others = (lab.weights(model) for model in ("sft", *(result.model for result in results)))
    assert max(float((before[name] - after[name]).abs().max()) for name in before if name in after) > 1e-2
    for name, value in after.items():
        torch.testing.assert_close(others[name], value, atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", LOSS)
def test_metrics_of_the_same_name_have_the_same_value(lab, both, stage):
    native, theirs = (lab.rows(result.run) for result in both(stage, max_steps=5))
    for ours, other in zip(native, theirs, strict=True):
        assert set(ours) == {name for name in other if not name.startswith("trl/")}
        for name in set(ours) - {"rewards/accuracies"}:  # of equal rewards one half is right here, none there
            assert ours[name] == pytest.approx(other[name], abs=1e-5), name


@pytest.mark.parametrize("stage", LOSS)
def test_evaluations_and_final_figures(lab, both, stage):
    results = both(stage, max_steps=4, eval_steps=2, logging_steps=3)
    native, theirs = (lab.rows(result.run) for result in results)
    assert [row["step"] for row in theirs] == [row["step"] for row in native] == [1, 2, 3, 4, 4]
    for ours, other in zip(native, theirs, strict=True):
        for name in (name for name in ours if name.startswith("eval_")):
            assert ours[name] == pytest.approx(other[name], abs=1e-4)
    assert any(name.startswith("eval_") for name in theirs[-1])
    ours, other = (result.metrics for result in results)
    assert set(ours) == set(other)
    assert other["train"] == {name: value for name, value in theirs[-2].items() if name != "step"}


@pytest.mark.parametrize(
    "changes", [{"sft_weight": 0.3}, {"loss_type": ["hinge", "sft"], "loss_weights": [1.0, 0.3]}], ids=["key", "list"]
)
def test_the_sft_term_is_in_the_one_loss_that_trl_reports(lab, both, changes):
    """As TRL's "sft" in a list of losses: a mean over the tokens of the chosen responses."""
    results = both("dpo", max_steps=4, beta=0.5, **changes)
    for ours, other in zip(*(lab.rows(result.run) for result in results), strict=True):
        assert other["loss"] == pytest.approx(ours["loss/dpo"] + 0.3 * ours["loss/sft"], abs=AGREE)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], abs=AGREE)


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo"])
def test_losses_without_a_reference_have_the_formulas_of_trls_experimental_trainers(name):
    """The trainers read texts; their losses are called with log-probabilities (of means where they take those)."""
    from types import SimpleNamespace

    from rlhf_pipeline.training.pairs import Criterion, preference_loss

    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 9, (10,), generator=draw)
    logprobs = -lengths * (0.05 + torch.rand(10, generator=draw))
    ours = preference_loss(
        Criterion(0.7, ((name, 1.0),), gamma=0.4 if name == "simpo" else 0.0), logprobs, None, lengths, None
    )
    chosen, rejected = (logprobs if name == "cpo" else logprobs / lengths).view(-1, 2).unbind(1)
    accelerator = SimpleNamespace(device=torch.device("cpu"))
    if name == "orpo":
        from trl.experimental.orpo import ORPOTrainer

        settings = SimpleNamespace(beta=0.7, accelerator=accelerator)
        theirs = -ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)[0]
    else:
        from trl.experimental.cpo import CPOTrainer

        kind = "simpo" if name == "simpo" else "sigmoid"
        options = {"alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.4, "loss_type": kind}
        settings = SimpleNamespace(beta=0.7, accelerator=accelerator, **options)
        theirs, rewards, _ = CPOTrainer.cpo_loss(settings, chosen, rejected)
        torch.testing.assert_close(ours.chosen_rewards, rewards, atol=1e-6, rtol=0)
    assert ours.loss.item() == pytest.approx(theirs.sum().item(), abs=1e-5)


def test_the_centering_term_is_in_the_one_loss_that_trl_reports(lab, both):
    results = both("train-rm", max_steps=4, center_rewards_coefficient=0.3)
    for ours, other in zip(*(lab.rows(result.run) for result in results), strict=True):
        assert other["loss"] == pytest.approx(ours["loss/bradley_terry"] + 0.3 * ours["loss/centering"], abs=AGREE)
        assert ours["grad_norm"] == pytest.approx(other["grad_norm"], abs=AGREE)


def test_the_reward_models_margins_are_those_of_trl(lab, both, pairs):
    rows = [{**row, "margin": n % 5 / 2 - 0.5} for n, row in enumerate(word_pairs(22))]
    cut = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    results = both(
        "train-rm", dataset_name=pairs(rows=rows), num_train_epochs=2.4, max_steps=-1, use_margin=True, **cut
    )
    found, _ = assert_same_steps(lab, "train-rm", results, 8)
    plain = lab.run("train-rm", **{**SETTINGS, "dataset_name": pairs(rows=rows), "max_steps": 3})
    assert abs(lab.rows(plain.run)[0]["loss/bradley_terry"] - found[0]["loss/bradley_terry"]) > 1e-2


@pytest.mark.parametrize("stage", LOSS)
def test_a_model_of_texts_with_its_own_tokenizer(lab, both, pairs, tmp_path, stage):
    """GPT-2 (positions, biases, tied embeddings) on byte-level BPE, from texts of different lengths."""
    nouns = ("river", "garden", "old window", "letter", "engine of war")
    rows = [
        {"prompt": f"Say of the {noun} {i}:", "chosen": f" A kind {noun}.", "rejected": f" No {noun * (i + 1)}."}
        for i, noun in enumerate(nouns)
    ]
    source = pairs(rows=rows)
    wide = {"max_prompt_length": 40, "response_length": 60, "dataset_name": source}
    lab.run(
        "sft",
        output_name="base",
        model_name_or_path=None,
        model_init={"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 128},
        tokenizer_init={"type": "byte_level_bpe", "vocab_size": 280},
        dataset_train_split="all",
        max_steps=3,
        **wide,
    )
    cut = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1}
    results = both(stage, model_name_or_path="base", max_steps=5, **wide, **cut)
    assert_same_steps(lab, stage, results, 5)


def examples_of(lab, stage, source):
    kind = "demonstration" if stage == "sft" else "pair"
    config = lab.config(stage, dataset_name=source, dataset_train_split="all")
    tokenizer = tokenizer_of(lab.registry.resolve("sft"))
    assert config.lengths() == resolve_lengths(6, 4, None)
    return StageData(config, lab.home, lambda _: None).split(kind, "all", tokenizer)[0], tokenizer


def rows_seen(stage, inputs):
    """The unpadded rows of a batch of TRL's: token ids, and where the loss is."""
    lengths = inputs["attention_mask"].sum(1).tolist()
    masks = inputs.get("completion_mask")
    if stage == "sft":
        masks = (inputs["labels"] != -100).long()
    elif masks is None:
        masks = torch.zeros_like(inputs["input_ids"])
    return [
        (ids[:length], mask[:length])
        for ids, mask, length in zip(inputs["input_ids"].tolist(), masks.tolist(), lengths, strict=True)
    ]


@pytest.mark.parametrize("stage", LOSS)
def test_every_step_sees_the_tokens_of_the_native_window(lab, pairs, monkeypatch, stage):
    """Over epochs with a smaller last window; nothing is cut, dropped or closed with an end token."""
    steps = []

    def training_step(self, model, inputs, *args):
        if len(steps) == self.state.global_step:
            steps.append([])
        steps[-1].append(rows_seen(stage, inputs))
        return super(trainers.Driven, self).training_step(model, inputs, *args)

    monkeypatch.setattr(trainers.Driven, "training_step", training_step, raising=False)
    source = pairs(23)
    cut = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    lab.run(stage, engine="trl", dataset_name=source, dataset_train_split="all", max_steps=8, seed=3, **cut)

    examples, tokenizer = examples_of(lab, stage, source)
    assert len(examples) == 23
    windows = example_windows(examples, steps=8, micro_batch_size=2, accumulation=4, seed=3)
    expected = []
    for window in windows:
        batches = []
        for batch in window.micro_batches:
            members = [examples[index] for index in batch.indices]
            batches.append(
                [
                    (e.prompt_ids + ids, [0] * len(e.prompt_ids) + [int(stage != "train-rm")] * len(ids))
                    for responses in zip(*(e.completions for e in members), strict=True)
                    for e, ids in zip(members, responses, strict=True)
                ]
            )
        expected.append(batches)
    assert [len(batches) for batches in expected] == [4, 4, 4, 4, 4, 4, 4, 4]
    assert [sum(map(len, batches)) for batches in steps[:3]] == ([8, 8, 7] if stage == "sft" else [16, 16, 14])
    assert steps == expected
    ended = [end for example in examples for end in example.ended]
    assert True in ended and False in ended
    for example in examples:
        for ids, end in zip(example.completions, example.ended, strict=True):
            assert (ids[-1] == tokenizer.eos_token_id) == end


def test_trl_averages_the_means_of_an_epochs_last_unequal_micro_batches(lab, both, pairs):
    """Three pairs in micro-batches of 2 and 1: (mean of two + the third) / 2 there, the mean of three here."""
    source = pairs(3)
    cut = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    native, theirs = (lab.rows(r.run)[0] for r in both("train-rm", dataset_name=source, max_steps=2, **cut))
    examples, tokenizer = examples_of(lab, "train-rm", source)
    model = init_reward_model(lab.registry.resolve("sft").path, tokenizer, seed=0).eval()
    losses = []
    for example in examples:
        with torch.no_grad():
            chosen, rejected = (
                model(input_ids=torch.tensor([example.prompt_ids + ids])).logits.item() for ids in example.completions
            )
        losses.append(-torch.nn.functional.logsigmoid(torch.tensor(chosen - rejected)).item())
    order = epoch_order(3, 0, 0)
    pair, single = ([losses[order[i]] for i in group] for group in micro_batches([examples[i] for i in order], 2))
    assert native["loss/bradley_terry"] == pytest.approx(sum(losses) / 3, abs=AGREE)
    assert theirs["loss/bradley_terry"] == pytest.approx((sum(pair) / 2 + single[0]) / 2, abs=AGREE)
    assert abs(native["loss/bradley_terry"] - theirs["loss/bradley_terry"]) > 1e-3


def test_sft_divides_by_the_tokens_of_the_whole_window_in_both(lab, both, pairs):
    cut = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    assert_same_steps(lab, "sft", both("sft", dataset_name=pairs(3), max_steps=4, **cut), 4)
