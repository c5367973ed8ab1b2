"""Decoders: their distributions by hand, transformers' `generate`, every response, padding and batches, ends."""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import rlhf_pipeline
from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.evaluation.sampled import SamplingPlan, draw
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.rollout.decoding import beam_search, chooser
from rlhf_pipeline.rollout.responses import sample_for_prompts
from rlhf_pipeline.rollout.sampler import Response, sample
from tests.rollout.conftest import EOS, PAD, all_responses, tiny_llama

VOCAB, HORIZON = 5, 3
GREEDY = Decoding(do_sample=False)


def policy_of(seed: int = 0, vocab: int = VOCAB, dtype: torch.dtype = torch.float64, *, flat: bool = False) -> Policy:
    """A tiny Llama; `flat`: each distinct prompt is run once, without padding."""
    torch.set_num_threads(1)
    model = tiny_llama(seed, dtype, vocab)
    if flat:
        assert inspect_model(model).layout == "flat"
    return Policy(model, Reader(layout="flat" if flat else "rows"))


def decoded(
    policy: Policy,
    prompts: list[list[int]],
    decoding: Decoding | None,
    *,
    samples: int = 1,
    response_length: int = HORIZON,
    stop_ids: tuple[int, ...] = (EOS,),
    at_once: int = 4096,
    seed: int = 0,
) -> list[list[Response]]:
    """The responses to each prompt."""
    examples = [Example(prompt, [], [], prompt_key=str(prompt), where="here") for prompt in prompts]
    _, groups = sample_for_prompts(
        policy,
        examples,
        samples=samples,
        response_length=response_length,
        stop_ids=stop_ids,
        generator=torch.Generator().manual_seed(seed),
        decoding=decoding,
        responses_at_once=at_once,
    )
    return groups


# 1. The distributions, written down from the definitions.


@functools.cache
def _logits(policy: Policy, ids: tuple[int, ...]) -> tuple[float, ...]:
    with torch.no_grad():
        return tuple(policy.model(input_ids=torch.tensor([ids])).logits[0, -1].tolist())


def logits_after(policy: Policy, ids: list[int]) -> list[float]:
    return list(_logits(policy, tuple(ids)))


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value - max(logits)) for value in logits]
    return [power / sum(powers) for power in powers]


def among(p: list[float], kept: set[int]) -> list[float]:
    total = sum(p[token] for token in kept)
    return [value / total if token in kept else 0.0 for token, value in enumerate(p)]


def first_with(p: list[float], order: list[int], mass: float) -> set[int]:
    """The fewest tokens, in this order, that together have the mass."""
    kept, total = set[int](), 0.0
    for token in order:
        if total >= mass:
            break
        kept.add(token)
        total += p[token]
    return kept


def next_token(policy: Policy, ids: list[int], decoding: Decoding) -> list[float]:
    """The next token's distribution: penalty, temperature, top-k, nucleus (Holtzman et al. 2020), min-p (Nguyen et al.
    2024), typical (Meister et al. 2023), each on what the one before has left."""
    logits, theta = logits_after(policy, ids), decoding.repetition_penalty
    for token in set(ids):
        logits[token] = logits[token] / theta if logits[token] > 0 else logits[token] * theta
    p = softmax([value / decoding.temperature for value in logits])
    if decoding.top_k:
        p = among(p, set(sorted(range(VOCAB), key=lambda token: -p[token])[: decoding.top_k]))
    if decoding.top_p < 1:
        p = among(p, first_with(p, sorted(range(VOCAB), key=lambda token: -p[token]), decoding.top_p))
    if decoding.min_p:
        p = among(p, {token for token in range(VOCAB) if p[token] >= decoding.min_p * max(p)})
    if decoding.typical_p < 1:
        entropy = -sum(value * math.log(value) for value in p if value)
        surprise = [abs(-math.log(value) - entropy) if value else math.inf for value in p]
        p = among(p, first_with(p, sorted(range(VOCAB), key=lambda token: surprise[token]), decoding.typical_p))
    return p


def probability(policy: Policy, prompt: list[int], response: list[int], decoding: Decoding) -> float:
    return math.prod(
        next_token(policy, prompt + response[:place], decoding)[token] for place, token in enumerate(response)
    )


DECODERS = {
    "the policy": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.4},
    "typical_p": {"typical_p": 0.6},
    "repetition_penalty": {"repetition_penalty": 1.8},
    "several": {"temperature": 1.4, "top_k": 4, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("given", DECODERS.values(), ids=DECODERS)
def test_responses_have_the_probabilities_of_the_definition(given):
    """Every response that is drawn has its enumerated log-probability, and the frequencies are theirs (chi-square)."""
    policy, decoding, prompt, count = policy_of(4), Decoding(**given), [2, 3, 2], 3000
    leaves = [tuple(ids) for ids, _ in all_responses(VOCAB, HORIZON)]
    p = {leaf: probability(policy, prompt, list(leaf), decoding) for leaf in leaves}
    assert sum(p.values()) == pytest.approx(1, abs=1e-9)
    (drawn,) = decoded(policy, [prompt], decoding, samples=count)
    for response in drawn:
        assert p[tuple(response.ids)] > 0
        assert sum(response.logprobs) == pytest.approx(math.log(p[tuple(response.ids)]), abs=1e-5)
    seen = Counter(tuple(response.ids) for response in drawn)
    rare = [leaf for leaf in leaves if count * p[leaf] < 5]
    cells = [([leaf], count * p[leaf]) for leaf in leaves if leaf not in rare]
    cells.append((rare, max(1.0, count * sum(p[leaf] for leaf in rare))))
    statistic = sum((sum(seen[leaf] for leaf in group) - expected) ** 2 / expected for group, expected in cells)
    freedom = len(cells) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom) + 8  # beyond the .9999 quantile
    if given and given.keys() != {"temperature"} and given.keys() != {"repetition_penalty"}:
        assert sum(value == 0 for value in p.values()) > 10  # the decoder cuts something


def test_without_chance_the_log_probability_is_0():
    ((response,),) = decoded(policy_of(), [[2]], GREEDY)
    assert response.logprobs == [0.0] * len(response.ids)


# 2. Padding, batches, and other prompts.

PROMPTS = [[2, 3, 2, 4, 4], [3], [4, 2], [0, 3, 3], [2, 2, 2, 2]]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 3.0},
        {"repetition_penalty": 3.0, "do_sample": False},
        {"repetition_penalty": 3.0, "do_sample": False, "num_beams": 3},
        {"top_p": 0.8, "temperature": 1.5},
    ],
)
def test_neither_padding_nor_the_batch_changes_a_response(given, flat):
    """A penalty falls on the ids of the prompt itself: not on the padding, nor on the ids of its neighbours."""
    policy, decoding = policy_of(3, flat=flat), Decoding(**given)
    whole = decoded(policy, PROMPTS, decoding, response_length=6)
    for size in (1, 2, 5):
        assert [group[0].ids for group in decoded(policy, PROMPTS, decoding, response_length=6, at_once=size)] == [
            group[0].ids for group in whole
        ]
    if not decoding.do_sample:
        for prompt, group in zip(PROMPTS, whole, strict=True):
            ((alone,),) = decoded(policy, [prompt], decoding, response_length=6)
            assert alone == group[0]


# 3. What transformers' `generate` gives, one prompt at a time.

WIDE = 24
LONG_PROMPTS = [[5, 6, 7, 8], [9], [10, 11, 10], [20, 3, 3, 14, 7, 2]]


def generated(policy: Policy, prompt: list[int], stops: tuple[int, ...], **settings) -> tuple[list[int], bool]:
    """The ids of the response and whether it ended."""
    from transformers import GenerationConfig

    config = GenerationConfig(do_sample=False, eos_token_id=list(stops), pad_token_id=0, **settings)
    ids = torch.tensor([prompt])
    (row,) = policy.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).tolist()
    response = row[len(prompt) :]
    end = next((place for place, token in enumerate(response) if token in stops), None)
    return (response, False) if end is None else (response[: end + 1], True)


@pytest.mark.parametrize(
    ("given", "length"),
    [
        ({}, 8),
        ({"repetition_penalty": 1.5}, 8),
        ({"num_beams": 2}, 8),
        ({"num_beams": 4}, 8),
        ({"num_beams": 3, "length_penalty": 0.0}, 12),
        ({"num_beams": 3, "length_penalty": 2.5}, 12),
        ({"num_beams": 3, "length_penalty": -1.0}, 6),
        ({"num_beams": 4, "repetition_penalty": 1.4, "length_penalty": 0.5}, 8),
    ],
)
@pytest.mark.check
def test_the_responses_are_those_of_transformers(given, length):
    stops, ends = (EOS, 4), set()
    for seed in range(6):
        policy = policy_of(seed, WIDE, torch.float32, flat=seed == 1)
        found = decoded(
            policy, LONG_PROMPTS, Decoding(do_sample=False, **given), response_length=length, stop_ids=stops
        )
        for prompt, (response,) in zip(LONG_PROMPTS, found, strict=True):
            expected = generated(policy, prompt, stops, max_new_tokens=length, **given)
            assert (response.ids, response.ended) == expected, (seed, prompt)
            ends.add(response.ended)
    assert ends == {True, False} or given.get("length_penalty", 1) > 2  # some end and some are cut


# 4. Every response.


def best_of_all(policy: Policy, prompt: list[int], power: float) -> tuple[list[int], bool]:
    """The response with the largest log p / length^power, among all."""
    plain = Decoding()

    def score(response: tuple[list[int], bool]) -> float:
        return math.log(probability(policy, prompt, response[0], plain)) / len(response[0]) ** power

    return max(all_responses(VOCAB, HORIZON), key=score)


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
def test_beams_for_all_prefixes_find_the_best_response(power):
    for seed in range(2):
        policy = policy_of(seed)
        decoding = Decoding(do_sample=False, num_beams=100, length_penalty=power)
        for prompt in ([2, 3], [4]):
            ((response,),) = decoded(policy, [prompt], decoding)
            assert (response.ids, response.ended) == best_of_all(policy, prompt, power)


def test_one_beam_is_greedy_and_more_beams_may_find_a_likelier_response():
    better = 0
    for seed in range(6):
        policy = policy_of(seed)
        ((one,),) = decoded(policy, [[2, 3]], GREEDY)
        ((two,),) = decoded(policy, [[2, 3]], Decoding(do_sample=False, num_beams=2, length_penalty=0.0))
        likeliest, _ = best_of_all(policy, [2, 3], 0.0)
        greedy = []
        while len(greedy) < HORIZON and EOS not in greedy:
            logits = logits_after(policy, [2, 3, *greedy])
            greedy.append(logits.index(max(logits)))
        assert one.ids == greedy
        p = [probability(policy, [2, 3], ids, Decoding()) for ids in (one.ids, two.ids, likeliest)]
        assert p == sorted(p)
        better += p[1] > p[0]
    assert better


# 5. Where responses end.


class Chain:
    """A model that is sure of the next token: 2, 3, 4, EOS, and PAD after anything else."""

    def __call__(self, **call):
        following = {2: 3, 3: 4, 4: EOS}
        logits = torch.full((len(call["input_ids"]), 1, VOCAB), -30.0)
        for row, token in enumerate(call["input_ids"][:, -1].tolist()):
            logits[row, 0, following.get(token, PAD)] = 0.0
        return SimpleNamespace(logits=logits)


@pytest.mark.parametrize("beams", [1, 2])
def test_a_response_ends_at_any_stop_token_or_is_cut(beams):
    decoding = Decoding(do_sample=False, num_beams=beams)

    def response(prompt, length, *stops):
        if beams == 1:
            draws = torch.zeros(1, length, dtype=torch.float64)
            (found,) = sample(Chain(), [prompt], draws, stop_ids=stops, choose=chooser(decoding))
        else:
            (found,) = beam_search(Chain(), [prompt], length, decoding, stop_ids=stops)
        return found.ids, found.ended

    assert response([2], 5, EOS) == ([3, 4, EOS], True)
    assert response([2], 3, EOS) == ([3, 4, EOS], True)  # at the last place
    assert response([2], 2, EOS) == ([3, 4], False)
    assert response([2], 5, PAD, 4) == ([3, 4], True)
    assert response([4], 1, EOS, PAD) == ([EOS], True)
    assert response([EOS, 2], 2, EOS) == ([3, 4], False)  # a stop token of the prompt ends nothing


# 6. Training samples the policy, whatever the model's files say.


def test_the_generation_config_of_a_model_changes_nothing():
    policy, prompts = policy_of(), [[2, 3], [4]]
    kinds = (None, Decoding(), Decoding(top_p=0.9), GREEDY, Decoding(do_sample=False, num_beams=2))
    expected = [decoded(policy, prompts, kind, samples=1 if kind and not kind.do_sample else 8) for kind in kinds]
    policy.model.generation_config.update(
        do_sample=True, temperature=0.2, top_k=1, top_p=0.1, repetition_penalty=9.0, num_beams=3, max_new_tokens=1
    )
    again = [decoded(policy, prompts, kind, samples=1 if kind and not kind.do_sample else 8) for kind in kinds]
    assert again == expected


def test_training_knows_no_decoder():
    root = Path(rlhf_pipeline.__file__).parent
    for room in ("training", "stages", "health"):
        for file in (root / room).rglob("*.py"):
            assert "decoding=" not in file.read_text(), file


def test_a_plan_decodes():
    examples = [Example(prompt, [], [], prompt_key=str(prompt), where="here") for prompt in PROMPTS]
    plan = SamplingPlan(examples, 1, HORIZON, GREEDY, 0, [EOS], 64)
    found = draw(policy_of(), plan)
    alone = decoded(policy_of(), PROMPTS, GREEDY)
    assert [example.completions for example in found.examples] == [[group[0].ids] for group in alone]
    assert not found.coupled
    assert draw(policy_of(), SamplingPlan(examples, 1, HORIZON, Decoding(top_k=2), 0, [EOS], 64)).coupled
