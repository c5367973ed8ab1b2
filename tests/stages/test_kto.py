"""KTO: from labelled rows to the loss, z0 of a step by hand, and what changes neither."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data import parsed
from rlhf_pipeline.errors import DataError, Interrupted
from rlhf_pipeline.stages import kto
from rlhf_pipeline.training.windows import epoch_order
from tests.conftest import sigterm_at
from tests.training.conftest import word_pairs

PLAIN = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 0}
WEIGHTS = {"desirable_weight": 1.5, "undesirable_weight": 0.5}


def responses(count: int = 10) -> list[dict[str, object]]:
    """The two responses of each pair, as rows with labels."""
    return [
        {"prompt": row["prompt"], "completion": row[side], "ended": row[f"{side}_ended"], "label": side == "chosen"}
        for row in word_pairs(count)
        for side in ("chosen", "rejected")
    ]


@pytest.fixture
def run(lab, tmp_path):
    """Train on rows with KTO; a window has 8 responses."""

    def start(rows, name: str = "kto", *, lab=lab, **changes):
        path = tmp_path / f"{len(rows)}-{'label' in rows[0]}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes = {"loss_type": "kto", "dataset_train_split": "all", "dataset_test_split": "all", **changes}
        return lab.run("dpo", output_name=name, dataset_name=str(path), **changes)

    return start


@pytest.fixture
def other(lab):
    """A policy that is not the one that training starts from."""
    return lab.run("sft", output_name="other", max_steps=12).model


def window_of(lab, rows, size: int):
    """The examples of the first window in their order, and log pi - log pi_ref of `policy` and `reference` on some."""
    from rlhf_pipeline.stages.common import tokenizer_of
    from rlhf_pipeline.stages.data import StageData

    path = lab.home / "window.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = lab.config("dpo", loss_type="kto", dataset_name=str(path), dataset_train_split="all")
    examples, _ = StageData(config, lab.home, lambda _: None).training(tokenizer_of(lab.registry.resolve("sft")))
    return [examples[index] for index in epoch_order(len(examples), 0, 0)[:size]]


def log_ratios(lab, prompts, answers, reference):
    """By transformers' own forward pass, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    totals = []
    for name in ("sft", reference):
        model = AutoModelForCausalLM.from_pretrained(lab.registry.resolve(name).path).eval()
        sums = []
        for prompt, answer in zip(prompts, answers, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
            sums.append(float(torch.log_softmax(logits, -1)[range(len(answer)), answer].sum()))
        totals.append(torch.tensor(sums, dtype=torch.float64))
    return totals[0] - totals[1]


@pytest.mark.parametrize("stored", [False, True])
def test_the_first_loss_and_gradient_of_labelled_rows(lab, run, monkeypatch, stored):
    """At d = 0 a response has the loss w / 2; the slope in d is -w beta / 4 if it is desirable, else +w beta / 4."""
    from rlhf_pipeline.data.batch import pack
    from rlhf_pipeline.stages.common import load_policy, tokenizer_of

    window = window_of(lab, responses(), 8)
    if stored:
        monkeypatch.setattr(parsed, "STORED_BYTES", 0)
    result = run(responses(), max_grad_norm=0, **WEIGHTS)
    first = lab.rows(result.run)[0]
    weights = torch.tensor([1.5 if one.desirable else 0.5 for one in window])
    signs = torch.tensor([-1.0 if one.desirable else 1.0 for one in window])
    assert 0 < (signs < 0).sum() < 8
    assert first["loss/dpo"] == pytest.approx(float(weights.mean()) / 2, abs=1e-6)
    assert first["kl"] == pytest.approx(0, abs=1e-6)
    config = lab.config("dpo")
    policy = load_policy(
        lab.registry.resolve("sft"), config, tokenizer_of(lab.registry.resolve("sft")), torch.device("cpu")
    )
    batch = pack(window)
    (signs * weights * config.beta / 4 * batch.per_completion(policy(batch).logprobs)).mean().backward()
    norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in policy.parameters()))
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert lab.registry.resolve(result.model).manifest.moves_optimum == {"loss_type": "kto"}


@pytest.mark.parametrize(("size", "accumulation"), [(8, 1), (2, 4)])
def test_z0_loss_and_metrics_of_a_step_by_hand(lab, run, other, size, accumulation):
    """z0 is measured once on all 8 responses of a step: each prompt with the last response before it to another one."""
    window = window_of(lab, responses(), 8)
    prompts, answers = [one.prompt_ids for one in window], [one.completions[0] for one in window]
    others = [next(answers[i - n] for n in range(1, 8) if prompts[i - n] != prompts[i]) for i in range(8)]
    mean = float(log_ratios(lab, prompts, others, other).mean())
    swapped = mean < 0  # z0 is 0 then: ask for the other direction
    cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
    start, reference = (other, "sft") if swapped else ("sft", other)
    result = run(responses(), model_name_or_path=start, ref_model=reference, **cut, **WEIGHTS)
    first = lab.rows(result.run)[0]
    assert first["kl"] == pytest.approx(abs(mean), abs=1e-5) and abs(mean) > 1e-2
    d = log_ratios(lab, prompts, answers, other) * (-1 if swapped else 1)
    good = torch.tensor([bool(one.desirable) for one in window])
    ahead = torch.sigmoid(0.5 * (d - abs(mean)))
    loss = torch.where(good, 1.5 * (1 - ahead), 0.5 * ahead).mean()
    assert first["loss/dpo"] == pytest.approx(float(loss), abs=1e-5)
    assert first["rewards/chosen"] == pytest.approx(float(0.5 * d[good].mean()), abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(float(0.5 * d[~good].mean()), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(first["rewards/chosen"] - first["rewards/rejected"], abs=1e-9)
    assert result.metrics["eval_pairs"] == 20 and 0 <= result.metrics["eval_accuracy"] <= 1


def test_a_pair_is_a_desirable_and_an_undesirable_response(lab, run):
    pairs, single = run(word_pairs(10), "pairs"), run(responses(), "single")
    first, second = lab.weights(pairs.model), lab.weights(single.model)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.check
@pytest.mark.parametrize("changes", [{}, {"kto_kl": "sampled"}], ids=["mismatched", "sampled"])
def test_how_a_window_is_cut_changes_nothing(lab, run, changes):
    at_once = run(responses(), "whole", max_steps=3, **PLAIN, **changes)
    smaller = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "precompute_ref_log_probs": False}
    cut = run(responses(), "cut", max_steps=3, **PLAIN, **smaller, **changes)
    ours, theirs = lab.weights(at_once.model), lab.weights(cut.model)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)
    kls = [[row["kl"] for row in lab.rows(result.run) if "kl" in row] for result in (at_once, cut)]
    assert kls[0] == pytest.approx(kls[1], abs=1e-5) and max(kls[0]) > 1e-2


@pytest.mark.check
@pytest.mark.parametrize("kind", ["mismatched", "sampled"])
def test_a_resumed_run_is_bit_equal(lab, run, tmp_path, kind):
    settings = {"kto_kl": kind, "max_steps": 5, "save_steps": 2}
    elsewhere = lab.copy(tmp_path / "elsewhere")
    undisturbed = run(responses(), **settings)
    with sigterm_at(3), pytest.raises(Interrupted):
        run(responses(), lab=elsewhere, **settings)
    resumed = run(responses(), lab=elsewhere, **settings)
    ours, theirs = lab.weights(undisturbed.model), elsewhere.weights(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_sampled_z0_is_the_mean_over_responses_of_the_policy(lab, run, other, monkeypatch):
    """With responses of the policy given, z0 is the mean of their log-ratios, which is at least 0."""
    window = window_of(lab, responses(), 8)
    drawn = [{"completions": [one.completions[0][::-1]]} for one in window]
    asked = []

    def sampled(policy, prompts, **options):
        from dataclasses import replace

        asked.append((options["samples"], options["response_length"]))
        return [replace(one, **given) for one, given in zip(prompts, drawn, strict=True)], []

    monkeypatch.setattr(kto, "sample_for_prompts", sampled)
    monkeypatch.setattr(kto, "prompts_run", lambda *_, **__: None)
    first = lab.rows(run(responses(), kto_kl="sampled", ref_model=other, max_steps=1).run)[0]
    answers = [given["completions"][0] for given in drawn]
    mean = float(log_ratios(lab, [one.prompt_ids for one in window], answers, other).mean())
    assert first["kl"] == pytest.approx(max(0.0, mean), abs=1e-5)
    assert asked == [(1, 4)]


def test_without_z0_it_is_apo_zero(lab, run, other):
    """The loss over the two responses of each pair is half of APO-zero's, at a policy that is not the reference."""
    settings = {"ref_model": other, "max_steps": 1, "per_device_train_batch_size": 20}
    single = lab.rows(run(word_pairs(10), "single", loss_type="apo_zero_unpaired", **settings).run)[0]
    pairs = lab.rows(run(word_pairs(10), "pairs", loss_type="apo_zero", **settings).run)[0]
    assert 2 * single["loss/dpo"] == pytest.approx(pairs["loss/dpo"], abs=1e-5) and abs(pairs["loss/dpo"] - 1) > 1e-3
    for name in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"):
        assert single[name] == pytest.approx(pairs[name], abs=1e-4)


@pytest.mark.parametrize("label", [True, False])
def test_one_label_only_is_refused_with_the_counts(run, label):
    with pytest.raises(DataError) as caught:
        run([{**row, "label": label} for row in responses()])
    fault = caught.value.faults[0]
    assert fault.found == f"{20 * label} desirable and {20 * (not label)} undesirable responses to train on"
    assert "expected both" in str(fault) and fault.where.endswith(".jsonl")


def test_rows_without_labels_are_refused_with_what_would_do(run):
    rows = [{key: value for key, value in row.items() if key != "label"} for row in responses()]
    with pytest.raises(DataError, match=r"records of kind demonstration.*labelled, pair"):
        run(rows)


@pytest.mark.parametrize(
    ("good", "bad", "weights", "said"),
    [
        (2, 2, {}, "2 desirable, 2 undesirable"),
        (1, 3, {"desirable_weight": 3.0}, "1 desirable, 3 undesirable"),
        (3, 1, {}, "in the ratio 3, the KTO paper advises 1 to 4/3: desirable_weight 0.333 gives 1"),
    ],
)
def test_the_weights_are_set_against_the_counts_of_the_labels(good, bad, weights, said):
    values = {"model_name_or_path": "sft", "dataset_name": "x", "output_name": "k", "loss_type": "kto", **weights}
    config = load_config("dpo", None, extra=values).config
    assert kto.balance(torch.tensor([1.0] * good + [0.0] * bad), config, "x").endswith(said)


def test_prompts_are_cut_to_the_room_that_the_other_response_leaves():
    from rlhf_pipeline.data.examples import Example

    examples = [Example(list(range(n, n + 4)), [[9] * n], [True], str(n), "") for n in (1, 2, 3)]
    found = kto.mismatched(examples, (0, 1, 2), 5, None)
    assert [one.completions for one in found] == [[[9] * 3], [[9]], [[9] * 2]]
    assert [one.prompt_ids for one in found] == [[3, 4], [2, 3, 4, 5], [4, 5, 6]]


@pytest.mark.parametrize(
    ("prompts", "members", "expected"),
    [
        ("abc", (0, 1, 2), [2, 0, 1]),
        ("aab", (0, 1, 2), [2, 2, 1]),  # 1 has the prompt of 0, so it goes one further round
        ("abba", (3, 1, 2, 0), [2, 3, 3, 2]),
        ("abc", (1,), [0]),  # alone in its window
        ("baab", (1, 2), [0, 0]),  # a window of one prompt
        ("abb", (0,), [2]),  # behind the first of the data is the last
    ],
)
def test_the_other_response_belongs_to_another_prompt(prompts, members, expected):
    from rlhf_pipeline.data.examples import Example

    examples = [Example([ord(prompt)], [[10 + n]], [True], prompt, "") for n, prompt in enumerate(prompts)]
    found = kto.mismatched(examples, members, 9, None)
    assert [one.completions[0][0] - 10 for one in found] == expected
    assert [one.prompt_ids for one in found] == [examples[n].prompt_ids for n in members]


def test_one_prompt_alone_has_no_other_response(run):
    rows = [{**row, "prompt": responses()[0]["prompt"]} for row in responses()]
    with pytest.raises(DataError, match=r"one prompt in all 20 rows to train on.*kto_kl 'sampled'"):
        run(rows)


def test_the_last_window_of_one_response_measures_z0(lab, run, other):
    """Of 9 rows in windows of 8 the second has one: its z0 is measured on the last response before it in the data."""
    rows, order = responses()[:9], epoch_order(9, 0, 0)
    by_row = dict(zip(order, window_of(lab, rows, 9), strict=True))
    alone = by_row[order[8]]
    before = next(
        by_row[(order[8] - n) % 9] for n in range(1, 9) if by_row[(order[8] - n) % 9].prompt_ids != alone.prompt_ids
    )
    (ratio,) = log_ratios(lab, [alone.prompt_ids], [before.completions[0]], other).tolist()
    start, reference = ("sft", other) if ratio > 0 else (other, "sft")
    result = run(rows, model_name_or_path=start, ref_model=reference, max_steps=2, learning_rate=1e-9)
    kls = [row["kl"] for row in lab.rows(result.run) if "kl" in row]
    assert len(kls) == 2 and kls[1] == pytest.approx(abs(ratio), abs=1e-5) and abs(ratio) > 1e-3


def test_the_log_names_the_labels(lab, run):
    log = (Path(run(responses()).run) / "log.txt").read_text()
    assert "responses: 10 desirable, 10 undesirable" in log
