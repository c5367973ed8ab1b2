"""DPO: the first step in closed form, and its reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

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


def test_the_gradient_of_the_first_step(lab):
    """At h = 0 the gradient is -beta / 2 [grad log pi(y_w) - grad log pi(y_l)], averaged over the pairs."""
    from rlhf_pipeline.data.batch import pack
    from rlhf_pipeline.stages.common import load_policy, tokenizer_of
    from rlhf_pipeline.stages.data import StageData
    from rlhf_pipeline.training.windows import epoch_order

    config = lab.config("dpo", max_grad_norm=0)
    tokenizer = tokenizer_of(lab.registry.resolve("sft"))
    examples, _ = StageData(config, lab.home, lambda _: None).split("pair", "train", tokenizer)
    window = [examples[i] for i in epoch_order(len(examples), 0, 0)[:8]]
    policy = load_policy(lab.registry.resolve("sft"), config, tokenizer, torch.device("cpu"))
    batch = pack(window, tokenizer.pad_token_id)
    logprobs = batch.per_completion(policy(batch).logprobs).view(-1, 2)
    (-0.5 * config.beta * (logprobs[:, 0] - logprobs[:, 1]).mean()).backward()
    norm = math.sqrt(sum(float((p.grad**2).sum()) for p in policy.parameters()))
    assert lab.rows(lab.run("dpo", max_grad_norm=0).run)[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
