"""On a tree that can be listed, the preference losses over the whole population of pairs are at rest at their optima.

The pairs are all pairs of the 31 responses (both drawn from the uniform distribution) with Bradley-Terry labels of the
true reward; they go through the package's tokenisation, packing, forward pass and `dpo_step`.
"""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlhf_pipeline.config.lengths import Lengths
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.tokenize import Example, tokenize
from rlhf_pipeline.data.tokenizers import tokenizer_digest
from rlhf_pipeline.stages.dpo import dpo_step
from rlhf_pipeline.training.cost import CostMeter
from rlhf_pipeline.training.pairs import Criterion
from rlhf_pipeline.training.windows import ExampleBatch, Loss, counts_of
from tests.rollout.tree import (
    BETA,
    ENDED,
    FREE,
    INNER,
    LENGTHS,
    MASK,
    PREFIXES,
    PROMPT,
    RESPONSES,
    REWARD,
    Table,
    World,
    network,
)

PAIRS = list(combinations(range(len(RESPONSES)), 2))
FIRST, SECOND = torch.tensor(PAIRS).unbind(1)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "b": 2}, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.fixture(scope="module")
def pairs(tokenizer):
    """Make all 465 pairs as the package tokenises them; `ended` as recorded, or claimed of every response."""

    def make(ended: list[bool] = ENDED) -> list[Example]:
        records = [
            Record(
                "pair",
                "",
                ("", ""),
                (ended[i], ended[j]),
                prompt_ids=tuple(PROMPT),
                completion_ids=(tuple(RESPONSES[i]), tuple(RESPONSES[j])),
            )
            for i, j in PAIRS
        ]
        digest = tokenizer_digest(tokenizer)
        examples, counts = tokenize(records, tokenizer, Lengths(2, 5, 7), source_tokenizer_digest=digest)
        assert not counts.dropped and not counts.faults
        return examples

    return make


def population_loss(world: World, examples: list[Example], targets: Tensor, **options) -> Loss:
    """What the package's step says of all pairs, with soft labels."""
    batch = ExampleBatch(pack(examples), list(range(len(examples))))
    known = {"reference": world.reference, "targets": targets}
    losses = ((options.pop("loss_type", "sigmoid"), 1.0),)
    criterion = Criterion(BETA, losses, **options)
    return dpo_step(world.policy, batch, criterion=criterion, meter=CostMeter(), shape=FREE, **known)


def preferences(reward: Tensor) -> Tensor:
    """(465,) probability that the first of each pair is preferred."""
    return torch.sigmoid(reward[FIRST] - reward[SECOND])


def gradient(world: World, examples: list[Example], reward: Tensor, **options) -> Tensor:
    """Gradient of the mean loss over the population of pairs, labelled sigma(R_1 - R_2)."""
    value, denominator, weight = population_loss(world, examples, preferences(reward), **options).terms["dpo"]
    assert (denominator, weight) == ("prompts", 1.0)
    return world.gradient(value / len(examples))


def with_leaves(log_pi: Tensor, beyond: int) -> Table:
    """The table whose 31 responses have these log-probabilities; `beyond` seeds what it does behind the horizon."""
    table = Table(beyond)
    p = log_pi.exp()
    for number, prefix in enumerate(PREFIXES[:INNER]):
        children = [(*prefix, token) for token in (0, 1, 2)]
        mass = [sum(p[i] for i, ids in enumerate(RESPONSES) if tuple(ids[: len(child)]) == child) for child in children]
        table.logits.data[number] = torch.stack(mass).log()
    return table


def optimum(log_ref: Tensor, exponent: Tensor) -> Tensor:
    """(31,) log of pi_ref exp(exponent) / Z."""
    return torch.log_softmax(log_ref + exponent, 0)


def world_at_optimum(make) -> tuple[World, World, Tensor]:
    """A policy that is optimal for a reward, the same with the policy at the reference, and that reward.

    A table is set to pi_ref exp(R / beta) / Z of the given reward; of a network, which cannot be set, the reward is
    chosen so that it is optimal: R = beta log(pi / pi_ref) + 3.
    """
    reference = make(2)
    log_ref = World.response_logprobs(reference).detach()
    policy = with_leaves(optimum(log_ref, REWARD / BETA), 1) if make is Table else make(1)
    reward = REWARD if make is Table else BETA * (World.response_logprobs(policy).detach() - log_ref) + 3.0
    return World(policy, reference), World(make(2), reference), reward


@pytest.fixture(scope="module", params=[Table, network], ids=["table", "network"])
def case(request):
    return world_at_optimum(request.param)


def test_a_table_can_be_set_to_any_distribution():
    log_pi = torch.log_softmax(torch.linspace(-2, 3, 31, dtype=torch.float64), 0)
    found = World.response_logprobs(with_leaves(log_pi, 0))
    torch.testing.assert_close(found, log_pi, rtol=0, atol=1e-13)


def test_the_population_gradient_of_dpo_is_0_at_the_optimum_and_not_at_the_reference(case, pairs):
    at_optimum, at_reference, reward = case
    slope = gradient(at_reference, pairs(), reward)
    assert slope.norm() > 1e-2
    assert gradient(at_optimum, pairs(), reward).norm() <= 1e-10 * slope.norm()


def test_an_eos_behind_cut_responses_moves_dpo_off_the_optimum(case, pairs):
    at_optimum, at_reference, reward = case
    claimed = pairs([True] * len(RESPONSES))
    assert sum(len(ids) for e in claimed for ids in e.completions) - sum(map(len, RESPONSES)) * 30 == 16 * 30
    assert gradient(at_optimum, claimed, reward).norm() > 1e-2 * gradient(at_reference, claimed, reward).norm()
    assert gradient(at_optimum, claimed, reward).norm() > 1e-2


def test_label_smoothing_moves_dpo_to_the_optimum_of_the_smoothed_labels(pairs):
    """Between two rewards a smoothed label is a Bradley-Terry one: of a reward of 0 and log(q / (1 - q))."""
    eps, examples = 0.1, pairs()
    two = torch.where(torch.arange(31) % 2 == 0, 3.0, 0.0).to(torch.float64)
    q = (1 - eps) * torch.sigmoid(two[0]) + eps * torch.sigmoid(-two[0])
    smoothed = two / two[0] * torch.log(q / (1 - q))
    log_ref = World.response_logprobs(Table(2)).detach()
    worlds = [World(with_leaves(optimum(log_ref, r / BETA), 1), Table(2)) for r in (smoothed, two)]
    slopes = [gradient(world, examples, two, label_smoothing=eps).norm() for world in worlds]
    assert slopes[0] <= 1e-10 and slopes[1] > 1e-2


def test_log_probabilities_are_of_the_responses_alone(pairs):
    """Of a prompt that both responses share nothing would be left in the margin, so the margin cannot show it."""
    world = World(network(1), network(2))
    found = population_loss(world, pairs(), preferences(REWARD)).metrics
    expected = World.response_logprobs(world.policy).detach()
    for name, rows in (("logps/chosen", FIRST), ("logps/rejected", SECOND)):
        total, denominator = found[name]
        assert denominator == "pairs"
        assert total.item() == pytest.approx(expected[rows].sum().item(), abs=1e-9)


def mean_preference(reward: Tensor) -> Tensor:
    """(31,) E p(y > y') over y' from the uniform distribution."""
    return torch.sigmoid(reward[:, None] - reward).mean(1)


def ipo_mean_optimum(log_ref: Tensor, reward: Tensor, lengths: Tensor) -> Tensor:
    """The minimiser of IPO with log-ratios averaged over tokens: pi_ref exp(L (E p / tau + c)), sum 1.

    With v = log(pi / pi_ref) / L the loss is IPO's in v, so v = E p / tau + c. IPO's constant falls out in the
    normaliser; here it is multiplied by L, and the one c that gives a distribution has to be found.
    """
    low, high = -100.0, 100.0
    for _ in range(200):
        c = (low + high) / 2
        log_pi = log_ref + lengths * (mean_preference(reward) / BETA + c)
        low, high = (low, c) if torch.logsumexp(log_pi, 0) > 0 else (c, high)
    return log_pi


@pytest.fixture(scope="module")
def reference() -> nn.Module:
    return Table(2)


def test_the_population_gradient_of_ipo_is_0_at_its_optimum_and_not_at_the_reference(pairs, reference):
    log_ref = World.response_logprobs(reference).detach()
    best = World(with_leaves(optimum(log_ref, mean_preference(REWARD) / BETA), 1), reference)
    assert gradient(best, pairs(), REWARD, loss_type="ipo").norm() <= 1e-10
    assert gradient(World(Table(2), reference), pairs(), REWARD, loss_type="ipo").norm() > 1e-2
    of_dpo = World(with_leaves(optimum(log_ref, REWARD / BETA), 1), reference)
    assert gradient(of_dpo, pairs(), REWARD, loss_type="ipo").norm() > 1e-2


def test_ipo_over_means_has_an_optimum_of_its_own(pairs, reference):
    log_ref = World.response_logprobs(reference).detach()
    own = World(with_leaves(ipo_mean_optimum(log_ref, REWARD, LENGTHS), 1), reference)
    summed = World(with_leaves(optimum(log_ref, mean_preference(REWARD) / BETA), 1), reference)
    assert gradient(own, pairs(), REWARD, loss_type="ipo_mean").norm() <= 1e-10
    assert gradient(own, pairs(), REWARD, loss_type="ipo").norm() > 1e-2
    assert gradient(summed, pairs(), REWARD, loss_type="ipo_mean").norm() > 1e-2


# Labels as they were drawn: (chosen, rejected, how often), of six responses of 1 to 4 tokens.
DRAWN = [
    (0, 3, 3),
    (3, 0, 1),
    (3, 9, 2),
    (9, 3, 1),
    (9, 20, 3),
    (20, 9, 2),
    (20, 0, 1),
    (0, 20, 2),
    (1, 20, 1),
    (20, 1, 2),
]
DRAWN += [(1, 0, 2), (0, 1, 2), (25, 9, 1), (9, 25, 3), (25, 3, 2), (3, 25, 1)]


def drawn(tokenizer) -> list[Example]:
    """Pairs with hard labels, each as often as `DRAWN` says."""
    records = [
        Record(
            "pair",
            "",
            ("", ""),
            (ENDED[i], ENDED[j]),
            prompt_ids=tuple(PROMPT),
            completion_ids=(tuple(RESPONSES[i]), tuple(RESPONSES[j])),
        )
        for i, j, times in DRAWN
        for _ in range(times)
    ]
    digest = tokenizer_digest(tokenizer)
    examples, counts = tokenize(records, tokenizer, Lengths(2, 5, 7), source_tokenizer_digest=digest)
    assert not counts.dropped and not counts.faults
    return examples


@pytest.mark.parametrize(
    ("loss_type", "weight"), [("sigmoid", 0.1), ("sigmoid", 10.0), ("cpo", 1.0), ("hinge", 0.5), ("orpo", 1.0)]
)
def test_the_sft_loss_of_the_chosen_responses_is_a_mean_over_their_tokens(tokenizer, loss_type, weight):
    """The gradient of the step's whole loss is that of its formula in the probabilities of the responses."""
    examples, world = drawn(tokenizer), World(Table(1), Table(2))
    batch = ExampleBatch(pack(examples), list(range(len(examples))))
    criterion = Criterion(BETA, ((loss_type, 1.0),), sft_weight=weight)
    free = loss_type in ("cpo", "orpo")
    known = {"reference": None if free else world.reference, "meter": CostMeter(), "shape": FREE}
    found = dpo_step(world.policy, batch, criterion=criterion, **known)
    assert found.terms["sft"][1:] == ("chosen_tokens", weight)
    step = world.gradient(found.total(counts_of(examples)))

    log_pi = World.response_logprobs(world.policy)
    log_ref = World.response_logprobs(world.reference).detach()
    first, second, times = (torch.tensor(column) for column in zip(*DRAWN, strict=True))
    if loss_type == "orpo":
        odds = [m - torch.log(1 - torch.exp(m)) for m in (log_pi[side] / LENGTHS[side] for side in (first, second))]
        losses = -BETA * torch.log(torch.sigmoid(odds[0] - odds[1]))
    else:
        d = log_pi if free else log_pi - log_ref
        h = BETA * (d[first] - d[second])
        losses = torch.clamp(1 - h, min=0) if loss_type == "hinge" else -torch.log(torch.sigmoid(h))
    sft = -(times * log_pi[first]).sum() / (times * LENGTHS[first]).sum()
    expected = world.gradient((times * losses).sum() / times.sum() + weight * sft)
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-12)


def test_dpo_with_an_sft_loss_rests_where_both_pull_alike(tokenizer):
    """beta sum_j w_ij (sigma(beta (d_i - d_j)) - p_ij) + (alpha / E L) (pi_i - c_i) = 0, c the law of the chosen."""
    from scipy.optimize import root

    alpha, shown = 1.0, sorted({i for i, *_ in DRAWN})
    place = {response: number for number, response in enumerate(shown)}
    reference = Table(2)
    log_ref = World.response_logprobs(reference).detach()[shown].numpy()
    wins = np.zeros((len(shown), len(shown)))
    for i, j, times in DRAWN:
        wins[place[i], place[j]] += times
    wins /= wins.sum()
    c, lengths = wins.sum(1), LENGTHS[shown].numpy()

    def field(logits):
        log_pi = logits - np.log(np.exp(logits).sum())
        d = log_pi - log_ref
        right = 1 / (1 + np.exp(BETA * (d - d[:, None])))  # sigma(beta (d_i - d_j))
        pull = BETA * ((wins + wins.T) * right - wins).sum(1)
        return pull + alpha / (c @ lengths) * (np.exp(log_pi) - c)

    solved = root(lambda rest: field(np.append(0.0, rest))[1:], np.zeros(len(shown) - 1), tol=1e-14)
    logits = np.append(0.0, solved.x)
    assert np.abs(field(logits)).max() < 1e-12
    log_pi = torch.full((len(RESPONSES),), -60.0, dtype=torch.float64)  # SFT leaves nothing for what is never chosen
    log_pi[shown] = torch.from_numpy(logits - np.log(np.exp(logits).sum()))
    examples = drawn(tokenizer)
    batch = ExampleBatch(pack(examples), list(range(len(examples))))

    def norm(policy: nn.Module, weight: float) -> float:
        world = World(policy, reference)
        known = {"reference": reference, "meter": CostMeter(), "shape": FREE}
        found = dpo_step(policy, batch, criterion=Criterion(BETA, sft_weight=weight), **known)
        return world.gradient(found.total(counts_of(examples))).norm().item()

    best = with_leaves(log_pi, 1)
    assert norm(best, alpha) < 1e-9
    assert norm(best, alpha / 2) > 1e-3 and norm(best, 0.0) > 1e-3 and norm(Table(2), alpha) > 1e-2


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_length_desensitised_dpo_weighs_the_tokens_beyond_the_shorter_response(tokenizer, alpha):
    """The step's gradient is that of log pi(y_<=l) + alpha log pi(y_>l), l the length of the shorter response."""
    examples, world = drawn(tokenizer), World(Table(1), Table(2))
    batch = ExampleBatch(pack(examples), list(range(len(examples))))
    known = {"reference": world.reference, "meter": CostMeter(), "shape": FREE}
    found = dpo_step(world.policy, batch, criterion=Criterion(BETA, ld_alpha=alpha), **known)
    plain = dpo_step(world.policy, batch, criterion=Criterion(BETA), **known)

    first, second, times = (torch.tensor(column) for column in zip(*DRAWN, strict=True))
    ratios = torch.where(MASK, World.logprobs(world.policy) - World.logprobs(world.reference).detach(), 0.0)
    shared = torch.minimum(LENGTHS[first], LENGTHS[second])[:, None]
    assert (shared < LENGTHS[first][:, None]).any() and (shared < LENGTHS[second][:, None]).any()
    weight = torch.where(torch.arange(ratios.shape[1]) < shared, 1.0, torch.tensor(alpha, dtype=torch.float64))
    h = BETA * ((weight * ratios[first]).sum(1) - (weight * ratios[second]).sum(1))
    expected = world.gradient(-(times * torch.log(torch.sigmoid(h))).sum())
    step = world.gradient(found.terms["dpo"][0])
    torch.testing.assert_close(step, expected, rtol=0, atol=1e-12)
    difference = (step - world.gradient(plain.terms["dpo"][0])).norm()
    assert difference < 1e-12 if alpha == 1.0 else difference > 1e-2
