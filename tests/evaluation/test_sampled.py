"""Figures of samples: order, pairing, and their enumerated means."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch

from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.sampled import (
    Samples,
    SamplingPlan,
    add_kl,
    add_score,
    add_world_reward,
    draw,
    paired_difference,
)
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.modules import Policy


def tiny(seed: int, vocab: int = 4, temperature: float = 1.0) -> Policy:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return Policy(AutoModelForCausalLM.from_config(config).eval(), Reader(), temperature)


def plan(prompts: list[list[int]], samples: int, **changes) -> SamplingPlan:
    examples = [Example(ids, [], [], prompt_key=str(ids), where="here") for ids in prompts]
    values = {"response_length": 3, "decoding": Decoding(), "seed": 0, "stop_ids": [1], "responses_at_once": 7}
    return SamplingPlan(examples, samples, **{**values, **changes})


def with_values(name: str, rows: list[list[float]], keys: str = "abcdef") -> Samples:
    examples = [Example([2], [[3]] * len(row), [False] * len(row), key, "here") for row, key in zip(rows, keys)]
    clusters = [e.prompt_key for e in examples for _ in e.completions]
    return Samples(examples, clusters, {name: np.array([x for row in rows for x in row])})


def test_paired_difference_by_hand():
    mine, theirs = with_values("r", [[1.0, 3.0], [5.0, 5.0], [4.0, 4.0]]), with_values("r", [[1.0], [2.0], [2.0]])
    found = paired_difference(mine, theirs, "r")  # 1, 3, 2
    assert found.mean == pytest.approx(2.0)
    assert found.high - found.mean == pytest.approx(4.30265 / math.sqrt(3), abs=1e-4)


def test_draws_follow_the_plan_and_share_their_random_numbers():
    prompts = [[2], [3, 2, 3], [2, 2]]
    one, again = draw(tiny(0), plan(prompts, 4)), draw(tiny(0), plan(prompts, 4, responses_at_once=3))
    assert [e.completions for e in one.examples] == [e.completions for e in again.examples]
    other = draw(tiny(0), plan(prompts, 4, seed=1))
    assert [e.completions for e in one.examples] != [e.completions for e in other.examples]
    assert one.clusters == [str(ids) for ids in prompts for _ in range(4)]
    flat = [ids for e in one.examples for ids in e.completions]
    assert one.values["length"].tolist() == [len(ids) for ids in flat]
    assert one.values["ended"].tolist() == [float(ids[-1] == 1) for ids in flat]
    assert one.estimate("length").clusters == 3
    assert one.table()["ended"].n == 12


def test_true_rewards_come_in_the_order_of_the_responses():
    def ids(text: str) -> list[int]:
        return [*world.encode(text), world.EOS_ID]

    prompts = [world.encode(world.prompt_text(g, "plot")) for g in ("drama", "comedy")]
    examples = [
        Example(prompts[0], [ids("great"), ids("funny")], [True, True], "a", "w"),
        Example(prompts[1], [ids("funny"), ids("and")], [True, True], "b", "w"),
    ]
    samples = Samples(examples, ["a", "a", "b", "b"])
    add_world_reward(samples)
    assert samples.values["true_reward"].tolist() == pytest.approx([1.5, -0.5, 2.0, -2.5])
    assert samples.values["well_formed"].tolist() == [1, 1, 1, 0]


class FirstToken:
    """A score that names the response: its prompt's first token and its own."""

    label = "first"

    def score(self, examples, packed=None):
        return torch.tensor([100.0 * e.prompt_ids[0] + ids[0] for e in examples for ids in e.completions])


@pytest.mark.parametrize("at_once", [1, 2, 64])
def test_scores_return_to_the_order_of_the_responses_whatever_the_batches(at_once):
    draw_lengths = np.random.default_rng(0).integers(1, 9, 20)
    examples = [
        Example([k] * int(length), [[7], [8, 8, 8], [9]], [False] * 3, str(k), "w")
        for k, length in enumerate(draw_lengths)
    ]
    samples = Samples(examples, [])
    add_score(samples, FirstToken(), "first", plan([], 3, responses_at_once=at_once))
    assert samples.values["first"].tolist() == [100.0 * k + token for k in range(20) for token in (7, 8, 9)]


@pytest.mark.check
def test_kl_figures_agree_with_enumeration():
    policy, reference, prompt = tiny(0), tiny(1), [2, 3]
    words = (0, 2, 3)
    leaves = [[*s, 1] for n in range(3) for s in product(words, repeat=n)] + [list(s) for s in product(words, repeat=3)]
    batch = pack([Example(prompt, leaves, [ids[-1] == 1 for ids in leaves], "p", "w")])
    with torch.no_grad():
        p, q = (batch.per_completion(one(batch).logprobs.double()) for one in (policy, reference))
    weight = p.exp()
    kl, entropy = (weight * (p - q)).sum().item(), -(weight * p).sum().item()
    sampling = plan([prompt], 4000, responses_at_once=4000)
    samples = draw(policy, sampling)
    add_kl(samples, policy, reference, sampling)
    for name, expected in (("kl", kl), ("kl_k1", kl), ("entropy", entropy)):
        values = samples.values[name]
        assert abs(values.mean() - expected) < 4 * values.std() / math.sqrt(len(values))
    assert samples.values["kl"].std() < samples.values["kl_k1"].std()  # the estimate with the least noise
    # Response by response, k1 is the difference of the enumerated log-probabilities.
    place = {tuple(ids): k for k, ids in enumerate(leaves)}
    for ids, found in zip(samples.examples[0].completions[:50], samples.values["kl_k1"]):
        assert found == pytest.approx((p - q)[place[tuple(ids)]].item(), abs=1e-5)


def test_kl_rows_return_to_the_order_of_the_responses():
    policy, reference = tiny(0), tiny(1)
    prompts = [[2] * n for n in (1, 6, 3, 5)]
    tables = []
    for size in (1, 64):
        sampling = plan(prompts, 3, responses_at_once=size)
        samples = draw(policy, sampling)
        add_kl(samples, policy, reference, sampling)
        tables.append(np.stack([samples.values[name] for name in ("kl", "kl_k1", "entropy")]))
    np.testing.assert_allclose(*tables, rtol=0, atol=1e-5)


@pytest.mark.parametrize("at_once", [1, 3, 64])
def test_kl_of_a_policy_that_reads_other_prompts_than_the_reference(at_once):
    policy, reference = tiny(0).double(), tiny(1).double()
    prompts = [[2, 3], [3], [2, 2, 3]]
    contexts = {str(ids): [3, 2, 2, 1, *ids] for ids in prompts}
    sampling = plan(prompts, 4, responses_at_once=at_once)
    samples = draw(policy, sampling)
    add_kl(samples, policy, reference, sampling, contexts)

    def table(one: Policy, read: list[int], ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return one.model(torch.tensor([read + ids])).logits[0, len(read) - 1 : -1].log_softmax(-1)

    found = []
    for example in samples.examples:
        for ids in example.completions:
            mine, theirs = table(policy, contexts[example.prompt_key], ids), table(reference, example.prompt_ids, ids)
            ratio = (mine - theirs)[range(len(ids)), ids]
            k3 = (ratio.neg().exp() - 1 + ratio).sum()
            found.append([(mine.exp() * (mine - theirs)).sum(), ratio.sum(), k3, -(mine.exp() * mine).sum()])
    expected = torch.tensor(found, dtype=torch.float64).T.numpy()
    for name, column in zip(("kl", "kl_k1", "kl_k3", "entropy"), expected, strict=True):
        np.testing.assert_allclose(samples.values[name], column, rtol=0, atol=1e-10)
