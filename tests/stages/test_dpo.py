"""DPO: the first step in closed form, and its reference."""

from __future__ import annotations

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_pipeline.errors import DataError
from rlhf_pipeline.stages.dpo import say_flips

SMOOTH = {"adam_epsilon": 1e-1, "learning_rate": 1e-1, "max_grad_norm": 0}


def test_the_first_loss_is_log_2_and_the_first_margins_are_0(lab):
    first = lab.rows(lab.run("dpo").run)[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen_minus_reference"):
        assert first[name] == pytest.approx(0, abs=1e-5)


def test_without_the_cache_the_weights_are_the_same(lab):
    cached = lab.run("dpo", output_name="cached", **SMOOTH)
    online = lab.run("dpo", output_name="online", precompute_ref_log_probs=False, **SMOOTH)
    first = lab.rows(online.run)[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    ours, theirs = lab.weights(cached.model), lab.weights(online.model)
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=1e-5)


def test_the_bill_does_not_depend_on_whether_the_cache_was_warm(lab):
    cold, warm = lab.run("dpo", output_name="cold"), lab.run("dpo", output_name="warm")
    assert "computed and cached" in (Path(cold.run) / "log.txt").read_text()
    assert "from the cache" in (Path(warm.run) / "log.txt").read_text()
    assert cold.cost["flops"] == warm.cost["flops"]
    assert cold.cost["seconds"].keys() == warm.cost["seconds"].keys()


@pytest.mark.check
def test_online_the_reference_is_paid_at_every_step(lab):
    """One epoch: the cached reference and the online one see each pair once, so the bills agree."""
    epoch = {"max_steps": None, "num_train_epochs": 1}
    cached = lab.run("dpo", output_name="cached", **epoch)
    online = lab.run("dpo", output_name="online", precompute_ref_log_probs=False, **epoch)
    assert cached.cost["flops"] == pytest.approx(online.cost["flops"])


def test_the_reference_is_the_model_that_is_asked_for(lab):
    other = lab.run("sft", max_steps=8)
    result = lab.run("dpo", ref_model=other.model)
    first = lab.rows(result.run)[0]
    assert abs(first["rewards/margins"]) > 1e-3
    assert lab.registry.resolve(result.model).manifest.parents["reference"].ref == other.model


def test_the_margin_grows_and_evaluation_uses_the_implicit_reward(lab):
    result = lab.run("dpo", max_steps=30, per_device_train_batch_size=512, dataset_test_split="train", beta=0.1)
    rows = lab.rows(result.run)
    assert rows[-1]["rewards/margins"] > 0.02
    assert result.metrics["eval_accuracy"] > 0.55
    # The DPO loss on all training pairs is below that of a policy that has not moved.
    assert result.metrics["eval_nll"] < math.log(2)


def first_window(lab, config):
    """The eight examples of the first step, a policy at the start, and its summed log-probabilities (8, 2)."""
    from rlhf_pipeline.data.batch import pack
    from rlhf_pipeline.stages.common import load_policy, tokenizer_of
    from rlhf_pipeline.stages.data import StageData
    from rlhf_pipeline.training.windows import epoch_order

    tokenizer = tokenizer_of(lab.registry.resolve("sft"))
    examples, _ = StageData(config, lab.home, lambda _: None).split("pair", "train", tokenizer)
    window = [examples[i] for i in epoch_order(len(examples), 0, 0)[:8]]
    policy = load_policy(lab.registry.resolve("sft"), config, tokenizer, torch.device("cpu"))
    batch = pack(window)
    return window, policy, batch.per_completion(policy(batch).logprobs).view(-1, 2)


@pytest.mark.parametrize(
    "changes, loss",
    [
        ({}, math.log(2)),
        ({"label_smoothing": 0.1}, math.log(2)),
        ({"soft_labels": True}, math.log(2)),
        ({"soft_labels": True, "label_smoothing": 0.1}, math.log(2)),
        ({"loss_type": "robust", "label_smoothing": 0.1}, math.log(2)),
        ({"loss_type": "hinge", "soft_labels": True}, 1.0),
        ({"loss_type": "ipo"}, 1.0),  # (1 / (2 tau))^2 at tau = .5
        ({"loss_type": "ipo", "soft_labels": True}, 1.0),
        ({"loss_type": "ipo_mean"}, 1.0),
        ({"loss_type": "sigmoid_norm"}, math.log(2)),
        ({"loss_type": "apo_zero"}, 1.0),
    ],
    ids=[
        "sigmoid",
        "cdpo",
        "soft",
        "soft-cdpo",
        "robust",
        "soft-hinge",
        "ipo",
        "soft-ipo",
        "ipo-mean",
        "sigmoid-norm",
        "apo-zero",
    ],
)
def test_loss_and_gradient_of_the_first_step(lab, changes, loss):
    """At h = 0 the slope in the log-ratio difference is beta (1/2 - p), of IPO (1 - 2 p) / tau; p = 1 if hard.

    Robust DPO has (p - eps) / (1 - 2 eps) for p, hinge the slope beta (1 - 2 p).
    """
    changes = {"max_grad_norm": 0, **changes}
    config = lab.config("dpo", **changes)
    window, policy, logprobs = first_window(lab, config)
    p = torch.tensor([example.label_probability if config.soft_labels else 1.0 for example in window])
    eps = config.label_smoothing
    p = (p - eps) / (1 - 2 * eps) if config.loss_type == "robust" else p * (1 - eps) + (1 - p) * eps
    lengths = torch.tensor([[float(len(ids)) for ids in example.completions] for example in window])
    if config.soft_labels:
        assert p.unique().numel() > 4
    if config.loss_type in ("ipo_mean", "sigmoid_norm"):
        assert lengths.unique().numel() > 1
        logprobs = logprobs / lengths
    sigmoid, ipo = config.beta * (0.5 - p), (1 - 2 * p) / config.beta
    slopes = dict.fromkeys(("sigmoid", "robust", "sigmoid_norm"), sigmoid)
    slopes |= {"apo_zero": -config.beta / 4, "hinge": config.beta * (1 - 2 * p)}
    slope = slopes.get(config.loss_type, ipo)
    (slope * (logprobs[:, 0] - logprobs[:, 1])).mean().backward()
    norm = math.sqrt(sum(float((parameter.grad**2).sum()) for parameter in policy.parameters()))
    first = lab.rows(lab.run("dpo", **changes).run)[0]
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert first["loss/dpo"] == pytest.approx(loss, abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


@pytest.mark.check
def test_soft_labels_train_towards_the_probabilities(lab):
    """The fitted margins come closer to log p / (1 - p) than those fitted to the labels that were drawn."""
    from rlhf_pipeline.data.batch import pack
    from rlhf_pipeline.stages.common import load_policy, tokenizer_of
    from rlhf_pipeline.stages.data import StageData

    settings = {"dataset_train_split": "all", "per_device_train_batch_size": 512, "max_steps": 80}
    config = lab.config("dpo", **settings)
    tokenizer = tokenizer_of(lab.registry.resolve("sft"))
    examples, _ = StageData(config, lab.home, lambda _: None).split("pair", "all", tokenizer)
    batch = pack(examples)
    p = torch.tensor([example.label_probability for example in examples])

    def log_odds(name: str) -> torch.Tensor:
        policy = load_policy(lab.registry.resolve(name), config, tokenizer, torch.device("cpu"))
        with torch.no_grad():
            logprobs = batch.per_completion(policy(batch).logprobs).view(-1, 2)
        return config.beta * (logprobs[:, 0] - logprobs[:, 1])

    def distance(soft: bool) -> float:
        """Mean KL of the fitted label distribution from the recorded one."""
        model = lab.run("dpo", **settings, soft_labels=soft).model
        q = torch.sigmoid(log_odds(model) - log_odds("sft"))
        return (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean().item()

    assert distance(soft=True) < 0.02
    assert distance(soft=False) > 0.2  # 300 drawn labels, learnt by heart


def test_soft_labels_need_recorded_probabilities(lab):
    lab.run("collect", output_name="ranked", labels="rank")
    with pytest.raises(DataError) as caught:
        lab.run("dpo", dataset_name="collected:ranked", soft_labels=True)
    (fault,) = caught.value.faults
    assert re.fullmatch(r"collected:ranked@v1:\d+", fault.where)
    assert re.fullmatch(r"no label_probability in (\d+) of \1 rows, which soft_labels needs", fault.found)
    assert "rlhf data collect" in fault.expected
    assert "soft_labels: false" in fault.fix


@pytest.mark.parametrize("changes", [{"loss_type": "ipo"}, {"loss_type": "ipo_mean"}, {"label_smoothing": 0.2}])
def test_a_loss_with_another_optimum_says_so(lab, changes):
    result = lab.run("dpo", max_steps=1, **changes)
    (name, value) = next(iter(changes.items()))
    assert f"{name}={value}" in (Path(result.run) / "log.txt").read_text()
    assert lab.registry.resolve(result.model).manifest.moves_optimum == changes


@pytest.mark.check
def test_another_reference_is_another_optimum_and_the_start_under_another_name_is_not(lab):
    lab.run("sft", output_name="other-sft", max_steps=1, dataset_name="world:verdicts", max_train_samples=64)
    lab.registry.alias("sft", "start")
    moves = {
        name: lab.registry.resolve(lab.run("dpo", ref_model=name, max_steps=1).model).manifest.moves_optimum
        for name in ("sft@start", "other-sft")
    }
    assert moves == {"sft@start": {}, "other-sft": {"ref_model": "other-sft"}}


def test_soft_labels_have_the_same_optimum(lab):
    soft = lab.run("dpo", max_steps=1, soft_labels=True)
    assert lab.registry.resolve(soft.model).manifest.moves_optimum == {}


def test_rewards_are_beta_times_the_summed_log_ratio_whatever_the_loss(lab):
    """One step apart from the reference: reward margins of all losses are measured alike."""
    other = lab.run("sft", max_steps=8)
    rows = [
        lab.rows(lab.run("dpo", ref_model=other.model, max_steps=1, output_name=name, loss_type=loss).run)[0]
        for name, loss in (("a", "sigmoid"), ("b", "ipo"), ("c", "ipo_mean"))
    ]
    assert abs(rows[0]["rewards/margins"]) > 1e-3
    for row in rows[1:]:
        for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen"):
            assert row[key] == pytest.approx(rows[0][key], abs=1e-6)


@pytest.mark.check
def test_length_desensitised_dpo_reads_the_reference_at_every_step(lab):
    result = lab.run("dpo", ld_alpha=0.5, max_grad_norm=0)
    log = (Path(result.run) / "log.txt").read_text()
    assert "reference log-probabilities" not in log and "ld_alpha=0.5" in log
    first = lab.rows(result.run)[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-6)
    whole = lab.rows(lab.run("dpo", ld_alpha=1.0, output_name="whole", max_grad_norm=0).run)
    plain = lab.rows(lab.run("dpo", output_name="plain", max_grad_norm=0).run)
    for ours, other in zip(whole, plain, strict=True):
        assert ours["loss/dpo"] == pytest.approx(other["loss/dpo"], abs=1e-6)
    assert abs(first["grad_norm"] - plain[0]["grad_norm"]) > 1e-3


@pytest.mark.parametrize(
    ("loss", "rate", "told"),
    [("robust", 0.1, ["pairs", "noisy"]), ("robust", 0.2, ["pairs"]), ("robust", 0.0, ["noisy"]), ("sigmoid", 0.1, [])],
)
def test_robust_with_another_rate_than_that_of_the_data_is_said(loss, rate, told):
    """`pairs` records no flips, `noisy` a rate of .2."""
    recorded = {"pairs@v1": {}, "noisy@v1": {"flip_rate": 0.2}}
    lines: list[str] = []
    run = SimpleNamespace(
        config=SimpleNamespace(loss_names=(loss,), label_smoothing=rate),
        registry=SimpleNamespace(resolve_data=lambda name: SimpleNamespace(config=recorded[name])),
        log=SimpleNamespace(say=lines.append),
    )
    say_flips(run, ["collected:pairs@v1", "org/other", "collected:noisy@v1", "collected:noisy@v1"])
    assert [line.partition("collected:")[2].partition("@")[0] for line in lines] == told
    if told:
        flips = {"pairs": "flip_rate 0:", "noisy": "flip_rate 0.2:"}[told[-1]]
        assert f"corrects a share label_smoothing {rate:g} of flipped labels" in lines[-1] and flips in lines[-1]
