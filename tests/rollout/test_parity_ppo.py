"""Our PPO against its peer, TRL 1.12.0: the peer's stored figures, ours computed anew (docs/parity_ppo.md).

The figures are those of the peer's own `PPOTrainer.train()`, written by scripts/parity_ppo.py; nothing here needs the
peer to be installed.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pipeline.algorithms.kl import k3

DATA = Path(__file__).parent / "data/parity_ppo.json"
DOCUMENT = json.loads(DATA.read_text())
STORED = {(row["case"], row["quantity"]): row for row in DOCUMENT["comparisons"]}
AGREE = [key for key, row in STORED.items() if row["tolerance"] is not None]
DIFFER = [key for key, row in STORED.items() if row["tolerance"] is None]


def name_of(key: tuple[str, str]) -> str:
    return ": ".join(key)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.set_num_threads(1)
    return load_file(DATA.with_suffix(".safetensors"))


@pytest.fixture(scope="module")
def parity():
    """scripts/parity_ppo_compare.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
        yield importlib.import_module("parity_ppo_compare")


@pytest.fixture(scope="module")
def found(parity, weights) -> dict[tuple[str, str], Any]:
    """All comparisons, our side computed by the package as it is now."""
    return {(row.case, row.quantity): row for row in parity.compare(DOCUMENT, weights)}


def test_nothing_that_was_compared_is_left_out(found):
    assert list(found) == list(STORED)
    assert {row.tolerance for row in found.values()} == {None, 0.0, 1e-5}
    quantities = {quantity for _, quantity in AGREE}
    assert quantities >= {
        "token log-probabilities",
        "reference log-probabilities",
        "values",
        "scores",
        "KL (k1) of each token",
        "token rewards, on the peer's slots",
        "advantages",
        "returns",
        "whitened advantages, same variance",
        "policy loss, same variance",
        "value loss, on the peer's slots",
        "gradient of the policy loss, same variance",
    }


@pytest.mark.parametrize("key", AGREE, ids=name_of)
def test_what_agrees(found, key):
    assert found[key].difference <= STORED[key]["tolerance"] == found[key].tolerance


@pytest.mark.parametrize("key", DIFFER, ids=name_of)
def test_what_differs_on_purpose_differs_by_what_it_did(found, key):
    row = found[key]
    assert row.tolerance is None and row.why
    assert row.difference == pytest.approx(STORED[key]["difference"], rel=1e-2)
    assert row.difference > 5e-4


@pytest.mark.parametrize("name", ["own critic", "discounted"])
def test_the_absorbing_step_changes_the_estimates_by_its_closed_form(found, name):
    """With value v at the stop token, score s and n steps to go: ours - peer's = (gamma lambda)^n [s (1 - gamma lambda)
    - gamma (1 - lambda) v]; nothing where the response fills all slots."""
    inputs, tokens = DOCUMENT["inputs"], DOCUMENT["peer"]["cases"]["own critic"]["rollout"]  # of the same critic
    gamma, lam = (inputs["cases"][name]["arguments"][key] for key in ("gamma", "lam"))
    expected = []
    for row, sampled in enumerate(inputs["rollouts"]["fixed"]):
        length, full = len(sampled["response"]), inputs["response_length"]
        last = 0.0
        if length < full:
            value, score = tokens["values"][row][length], tokens["scores"][row]
            last = score * (1 - gamma * lam) - gamma * (1 - lam) * value
        expected += [(gamma * lam) ** (length - 1 - t) * last for t in range(length)]
    for quantity in ("advantages", "returns"):
        row = found[name, quantity]
        torch.testing.assert_close(row.ours - row.peer, torch.tensor(expected), rtol=0, atol=1e-5)


def test_a_critic_that_says_the_score_at_the_stop_token_makes_the_absorbing_step_nothing():
    tokens = DOCUMENT["peer"]["cases"]["defaults"]["rollout"]
    for row, sampled in enumerate(DOCUMENT["inputs"]["rollouts"]["fixed"]):
        if (length := len(sampled["response"])) < DOCUMENT["inputs"]["response_length"]:
            assert tokens["values"][row][length] == pytest.approx(tokens["scores"][row], abs=1e-6)
            assert tokens["advantages_before"][row][length:] == pytest.approx([0.0] * (8 - length), abs=1e-6)


def test_the_peer_penalises_responses_that_ended_with_another_stop_token(found):
    """Only the third response, which was cut, holds the end-of-text token; the fourth was cut as well."""
    row = found["other stop token", "scores with missing_eos_penalty"]
    expected = torch.tensor([1.0, 1.0, -1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    torch.testing.assert_close(row.ours - row.peer, expected, rtol=0, atol=1e-5)


def test_the_peers_minibatches_take_no_more_optimizer_steps(found):
    """2 epochs of 8 responses: micro-batches of 2 in 1, 2, 4 minibatches; of 8 in 1 and 4; the last batch."""
    rows = [row for row in found.values() if row.case == "steps"]
    assert [float(row.peer) for row in rows] == [2, 2, 2, 2, 8, 8]
    assert [float(row.ours) for row in rows] == [2, 4, 8, 2, 8, 2]


def test_both_clips_are_at_work_in_the_second_step(found):
    for quantity in ("policy/clipfrac_avg", "val/clipfrac_avg, on the peer's slots"):
        assert 0.1 < float(found["defaults", quantity].peer) < 0.5


def test_the_peer_does_not_clip_its_gradient(weights):
    """Its config says max_grad_norm 1; what its optimizer was handed is longer, and equals our gradient (above)."""
    squares = [float((value**2).sum()) for key, value in weights.items() if key.startswith("defaults/1/grad/")]
    assert sum(squares) ** 0.5 > 1.2


def test_the_rollouts_are_of_all_kinds():
    inputs = DOCUMENT["inputs"]
    rows, stop = inputs["rollouts"]["fixed"], inputs["stop_id"]
    assert len({len(row["prompt"]) for row in rows}) > 4 and len({len(row["response"]) for row in rows}) > 4
    kinds = {(len(row["response"]) == inputs["response_length"], row["ended"]) for row in rows}
    assert kinds == {(False, True), (True, True), (True, False)}
    assert all((row["response"][-1] == stop) == row["ended"] for row in rows)


def test_the_figures_say_where_they_come_from():
    provenance = DOCUMENT["provenance"]
    assert provenance["peer"]["trl"] == "1.12.0" and "trl==1.12.0" in provenance["peer"]["pins"]
    assert {"command", "date"} <= set(provenance) and {"torch", "transformers", "python"} <= set(provenance["ours"])


def _shifted_scores(original: Callable) -> Callable:
    def fault(scores, logprobs, ref_logprobs, mask, *, kl_coef):
        rewards = original(torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef=kl_coef)
        first = torch.zeros_like(rewards)
        first[:, 0] = scores
        return rewards + first

    return fault


def _forgets_the_next_value(original: Callable) -> Callable:
    def fault(rewards, values, mask, *, gamma, lam):
        return original(rewards, values, mask, gamma=0.0, lam=lam)

    return fault


def _swaps_old_and_new(original: Callable) -> Callable:
    return lambda new, old, *rest, **options: original(2 * old.detach() - new, old, *rest, **options)


def _does_not_clip(original: Callable) -> Callable:
    return lambda *tensors, **options: original(
        *tensors, **{name: 1e6 if name.startswith("cliprange") else value for name, value in options.items()}
    )


FAULTS: dict[str, tuple[str, str, Callable[[Callable], Callable], str]] = {
    "k3 in the reward": (
        "rlhf_pipeline.algorithms.advantages",
        "k1",
        lambda _: k3,
        "token rewards, summed over a response",
    ),
    "score at the first token": (
        "rlhf_pipeline.stages.ppo",
        "token_rewards",
        _shifted_scores,
        "whitened advantages, same variance",
    ),
    "no next value": (
        "rlhf_pipeline.stages.ppo",
        "gae",
        _forgets_the_next_value,
        "whitened advantages, same variance",
    ),
    "whitening over padding": (
        "rlhf_pipeline.stages.ppo",
        "whiten",
        lambda original: lambda values, mask, **rest: original(values, torch.ones_like(mask), **rest),
        "whitened advantages, same variance",
    ),
    "ratio upside down": (
        "rlhf_pipeline.stages.ppo",
        "clipped_policy_loss",
        _swaps_old_and_new,
        "policy loss, same variance",
    ),
    "no policy clip": ("rlhf_pipeline.stages.ppo", "clipped_policy_loss", _does_not_clip, "policy loss, same variance"),
    "no value clip": ("parity_ppo_ours", "clipped_value_loss", _does_not_clip, "value loss, on the peer's slots"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_seen(parity, weights, monkeypatch, fault):
    path, name, wrap, quantity = FAULTS[fault]
    module = importlib.import_module(path)
    monkeypatch.setattr(module, name, wrap(getattr(module, name)))
    monkeypatch.setattr(parity, "PARTS", {"defaults": (parity._estimates, parity._losses)})
    rows = parity.compare({**DOCUMENT, "peer": {**DOCUMENT["peer"], "step_counts": []}}, weights)
    assert any(row.quantity == quantity and not row.agrees for row in rows)
    assert any(row.agrees and row.tolerance is not None for row in rows)
