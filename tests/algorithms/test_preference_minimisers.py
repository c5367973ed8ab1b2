"""Where the preference losses come to rest over a whole population of pairs, against closed forms and a solver."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_pipeline.algorithms.preference import (
    OBJECTIVES,
    bradley_terry_loss,
    centering_loss,
    smoothed_target,
    unflipped_target,
)

BETA, COUNT = 0.5, 7
DRAW = torch.Generator().manual_seed(0)
LOG_REF = torch.log_softmax(torch.randn(COUNT, generator=DRAW, dtype=torch.float64), -1)
LOG_MU = torch.log_softmax(torch.randn(COUNT, generator=DRAW, dtype=torch.float64), -1)
REWARD = torch.randn(COUNT, generator=DRAW, dtype=torch.float64)
LENGTHS = torch.tensor([1.0, 2.0, 3.0, 4.0, 2.0, 3.0, 5.0], dtype=torch.float64)
PREFERENCE = torch.sigmoid(REWARD[:, None] - REWARD)  # p(y > y')


def population_gradient(
    name: str,
    log_pi: Tensor,
    *,
    soft: bool = False,
    eps: float = 0.0,
    flips: float = 0.0,
    lengths: Tensor | None = None,
) -> Tensor:
    """Gradient in the logits of a policy over COUNT responses, of the loss over pairs drawn i.i.d. from mu.

    With `soft` each pair comes once with its probability as target, else once for each of its two labels. `flips`: the
    share of labels that are flipped. eps: label_smoothing.
    """
    preference = PREFERENCE * (1 - flips) + (1 - PREFERENCE) * flips
    smoothing = OBJECTIVES[name].smoothing
    logits = log_pi.clone().requires_grad_()
    size = torch.ones(COUNT, dtype=torch.float64) if lengths is None else lengths
    logprobs, ref = torch.log_softmax(logits, -1) / size, LOG_REF / size
    total = torch.zeros((), dtype=torch.float64)
    for i in range(COUNT):
        for j in range(COUNT):
            pair = [x[None] for x in (logprobs[i], logprobs[j], ref[i], ref[j])]
            target = preference[i, j] if soft else None
            target = smoothing(target, eps) if smoothing else target
            loss = OBJECTIVES[name].loss(*pair, beta=BETA, target=target).loss
            # Hard labels: i is drawn as chosen and j as rejected, or in the other order, and i wins.
            weight = 1.0 if soft else 2 * preference[i, j]
            total = total + (LOG_MU[i] + LOG_MU[j]).exp() * weight * loss
    return torch.autograd.grad(total, logits)[0]


@pytest.mark.parametrize("soft", [False, True])
def test_dpo_rests_at_the_optimum_of_the_regularised_reward(soft):
    def slope(log_pi):
        return population_gradient("sigmoid", log_pi, soft=soft).abs().max().item()

    assert slope(LOG_REF + REWARD / BETA) < 1e-15
    assert slope(LOG_REF) > 1e-2
    assert slope(LOG_REF + REWARD / (2 * BETA)) > 1e-3


@pytest.mark.parametrize(
    "name", [name for name, each in OBJECTIVES.items() if not each.listwise and each.needs_reference]
)
def test_soft_labels_have_the_gradient_of_drawn_ones_on_average(name):
    log_pi = LOG_REF + 0.3 * REWARD
    hard, soft = (population_gradient(name, log_pi, soft=soft) for soft in (False, True))
    torch.testing.assert_close(hard, soft, rtol=0, atol=1e-14)
    assert hard.abs().max() > 1e-2


@pytest.mark.parametrize("p", [0.5, 0.7, 0.99, 1.0])
@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_over_two_responses_cdpo_rests_at_the_smoothed_preference(p, eps):
    """sigma(h) = eps + (1 - 2 eps) p: finite however certain the label is."""
    smoothed = eps + (1 - 2 * eps) * p
    ratio = math.log(smoothed / (1 - smoothed)) / BETA
    zero = torch.zeros(1, dtype=torch.float64)

    def slope(ratio: float) -> float:
        # The policy's logits are (x, 0) and the reference's (0, 0): the log-ratio difference is x.
        x = torch.tensor(ratio, dtype=torch.float64, requires_grad=True)
        one, two = torch.log_softmax(torch.stack([x, zero[0]]), 0)[:, None]
        half = zero - math.log(2)
        target = smoothed_target(None, eps)
        won = OBJECTIVES["sigmoid"].loss(one, two, half, half, beta=BETA, target=target).loss
        lost = OBJECTIVES["sigmoid"].loss(two, one, half, half, beta=BETA, target=target).loss
        return torch.autograd.grad(p * won + (1 - p) * lost, x)[0].item()

    assert abs(slope(ratio)) < 1e-15
    assert slope(ratio + 0.5) > 1e-3 and slope(ratio - 0.5) < -1e-3


def test_over_more_responses_cdpo_is_the_bradley_terry_projection_of_the_smoothed_preferences():
    """No r has sigma(r_i - r_j) = eps + (1 - 2 eps) p_ij for all pairs: the convex cross-entropy decides."""
    from scipy.optimize import root

    eps, mu = 0.2, LOG_MU.exp().numpy()
    q = eps + (1 - 2 * eps) * PREFERENCE.numpy()

    def slope(r):
        """Of sum_ij mu_i mu_j [-q_ij log sigma(r_i - r_j) - (1 - q_ij) log sigma(r_j - r_i)], convex in r."""
        off = mu[:, None] * mu * (1 / (1 + np.exp(r - r[:, None])) - q)
        return off.sum(1) - off.sum(0)

    # Only differences count: the first response keeps r = 0, and where a convex function is flat it is least.
    found = root(lambda rest: slope(np.append(0.0, rest))[1:], np.zeros(COUNT - 1), tol=1e-14)
    rewards = np.append(0.0, found.x)
    assert np.abs(slope(rewards)).max() < 1e-14
    projection = LOG_REF + torch.from_numpy(rewards) / BETA
    assert population_gradient("sigmoid", projection, eps=eps).abs().max() < 1e-13
    assert population_gradient("sigmoid", projection, eps=eps, soft=True).abs().max() < 1e-13
    assert population_gradient("sigmoid", LOG_REF + REWARD / BETA, eps=eps).abs().max() > 1e-3
    fitted = 1 / (1 + np.exp(rewards - rewards[:, None]))
    assert np.abs(fitted - q).max() > 1e-2  # a projection, not a solution


def mean_preference() -> Tensor:
    """(COUNT,) E p(y > y') over y' from mu."""
    return PREFERENCE @ LOG_MU.exp()


def test_ipo_rests_at_the_mean_preference():
    """pi = ref exp(E_{y' ~ mu} p(y > y') / tau) / Z, tau = beta."""
    best = LOG_REF + mean_preference() / BETA
    assert population_gradient("ipo", best).abs().max() < 1e-10
    assert population_gradient("ipo", LOG_REF).abs().max() > 1e-2
    assert population_gradient("ipo", LOG_REF + REWARD / BETA).abs().max() > 1e-2
    assert population_gradient("ipo", LOG_REF + 2 * mean_preference() / BETA).abs().max() > 1e-2  # 1 / tau in the loss


def test_ipo_over_means_weighs_the_mean_preference_by_length():
    """pi = ref exp(L (E p / tau + c)), c such that the sum is 1."""
    from scipy.optimize import brentq

    def log_pi(c):
        return LOG_REF + LENGTHS * (mean_preference() / BETA + c)

    best = log_pi(brentq(lambda c: torch.logsumexp(log_pi(c), 0).item(), -50, 50, xtol=1e-15))
    assert population_gradient("ipo_mean", best, lengths=LENGTHS).abs().max() < 1e-10
    summed = LOG_REF + mean_preference() / BETA
    assert population_gradient("ipo_mean", summed, lengths=LENGTHS).abs().max() > 1e-2
    assert (torch.softmax(summed, 0) - best.exp()).abs().max() > 1e-2


@pytest.mark.parametrize("length", [1, 4])
def test_ipo_over_means_of_one_length_is_ipo_at_another_scale(length):
    """(h / L - 1 / (2 tau))^2 = (h - 1 / (2 tau / L))^2 / L^2: IPO with tau / L, ref exp(L E p / tau) / Z."""
    same = torch.full((COUNT,), float(length), dtype=torch.float64)
    best = LOG_REF + length * mean_preference() / BETA
    assert population_gradient("ipo_mean", best, lengths=same).abs().max() < 1e-10
    one, two, ref_one, ref_two = (torch.tensor([x], dtype=torch.float64) for x in (-3.0, -5.0, -4.0, -4.5))
    means = OBJECTIVES["ipo_mean"].loss(*(x / length for x in (one, two, ref_one, ref_two)), beta=BETA).loss
    sums = OBJECTIVES["ipo"].loss(one, two, ref_one, ref_two, beta=BETA / length).loss
    assert means.item() == pytest.approx(sums.item() / length**2, abs=1e-12)


def test_dpo_over_means_weighs_the_reward_by_length():
    """pi = ref exp(L (R / beta + c)), c such that the sum is 1."""
    from scipy.optimize import brentq

    def log_pi(c):
        return LOG_REF + LENGTHS * (REWARD / BETA + c)

    best = log_pi(brentq(lambda c: torch.logsumexp(log_pi(c), 0).item(), -50, 50, xtol=1e-15))
    assert population_gradient("sigmoid_norm", best, lengths=LENGTHS).abs().max() < 1e-10
    summed = LOG_REF + REWARD / BETA
    assert population_gradient("sigmoid_norm", summed, lengths=LENGTHS).abs().max() > 1e-3


def test_apo_zero_gives_losers_no_probability():
    """Losers have 0; winners g_y beta sigma'(beta d_y) = lambda pi_y, with g the mass chosen less the mass rejected."""
    from scipy.optimize import brentq

    mu = LOG_MU.exp()
    # Over pairs (i, j) of weight 2 mu_i mu_j p_ij the loss is sum_y -g_y sigma(beta d_y), up to a constant.
    pairs = 2 * mu[:, None] * mu
    gain = (pairs * PREFERENCE).sum(1) - (pairs * PREFERENCE).sum(0)
    winners = gain > 0
    assert 2 <= int(winners.sum()) < COUNT

    def slope(ratio: float, index: int) -> float:
        s = 1 / (1 + math.exp(-BETA * ratio))
        return gain[index].item() * BETA * s * (1 - s)

    def share(index: int, level: float) -> float:
        """pi_y with g_y beta sigma'(beta d_y) = level pi_y; the left side over pi_y falls in pi_y if beta < 1."""
        ref = LOG_REF[index].item()
        return math.exp(brentq(lambda x: slope(x - ref, index) / math.exp(x) - level, -60.0, 5.0, xtol=1e-14))

    indices = winners.nonzero().squeeze(1).tolist()
    level = brentq(lambda x: sum(share(i, x) for i in indices) - 1.0, 1e-4, 1e4, xtol=1e-14)
    best = torch.full((COUNT,), -80.0, dtype=torch.float64)
    for i in indices:
        best[i] = math.log(share(i, level))
    assert population_gradient("apo_zero", best).abs().max() < 1e-10
    assert population_gradient("apo_zero", LOG_REF).abs().max() > 1e-2
    # A loser that is given a little is pushed down, a winner that is given too little is pushed up.
    loser = int((~winners).nonzero()[0])
    raised = best.clone()
    raised[loser] = math.log(0.05)
    assert population_gradient("apo_zero", torch.log_softmax(raised, 0))[loser] > 1e-3
    one, two, ref_one, ref_two = (torch.tensor([x], dtype=torch.float64) for x in (-3.0, -5.0, -4.0, -4.5))
    loss = OBJECTIVES["apo_zero"].loss(one, two, ref_one, ref_two, beta=BETA).loss.item()
    assert loss == pytest.approx(1 - 1 / (1 + math.exp(-0.5)) + 1 / (1 + math.exp(0.25)), abs=1e-15)  # by hand


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_robust_dpo_with_the_rate_of_flips_rests_at_the_optimum_of_the_true_labels(rate, soft):
    best = LOG_REF + REWARD / BETA
    assert population_gradient("robust", best, eps=rate, flips=rate, soft=soft).abs().max() < 1e-14
    assert population_gradient("robust", best, soft=soft).abs().max() < 1e-15  # no flips: DPO
    for name, eps in (("sigmoid", rate), ("sigmoid", 0.0), ("robust", rate / 2)):  # cDPO, DPO, a wrong rate
        assert population_gradient(name, best, eps=eps, flips=rate, soft=soft).abs().max() > 1e-3


def test_robust_dpo_with_a_wrong_rate_is_the_bradley_terry_projection_of_what_it_takes_for_true():
    """With a wrong rate e it takes (p' - e) / (1 - 2 e) for the true preferences; p' are those that are seen."""
    from scipy.optimize import root

    rate, assumed, mu = 0.2, 0.1, LOG_MU.exp().numpy()
    q = ((PREFERENCE * (1 - rate) + (1 - PREFERENCE) * rate - assumed) / (1 - 2 * assumed)).numpy()

    def slope(r):
        off = mu[:, None] * mu * (1 / (1 + np.exp(r - r[:, None])) - q)
        return off.sum(1) - off.sum(0)

    found = root(lambda rest: slope(np.append(0.0, rest))[1:], np.zeros(COUNT - 1), tol=1e-14)
    projection = LOG_REF + torch.from_numpy(np.append(0.0, found.x)) / BETA
    assert population_gradient("robust", projection, eps=assumed, flips=rate).abs().max() < 1e-12
    assert population_gradient("robust", LOG_REF + REWARD / BETA, eps=assumed, flips=rate).abs().max() > 1e-3


def test_robust_dpo_by_hand():
    """[(1 - eps) l(h) - eps l(-h)] / (1 - 2 eps) of a certain label, l(h) = -log sigma(h)."""
    one, two, zero = (torch.tensor([x], dtype=torch.float64) for x in (-3.0, -5.0, 0.0))
    target = unflipped_target(None, 0.1)
    found = OBJECTIVES["robust"].loss(one, two, zero, zero, beta=BETA, target=target).loss.item()
    won, lost = math.log1p(math.exp(-1.0)), math.log1p(math.exp(1.0))  # h = 1
    assert found == pytest.approx((0.9 * won - 0.1 * lost) / 0.8, abs=1e-15)
    p = torch.tensor([0.26, 0.9], dtype=torch.float64)
    assert unflipped_target(p, 0.1).tolist() == pytest.approx([0.2, 1.0], abs=1e-15)
    assert unflipped_target(None, 0.0) is None and torch.equal(unflipped_target(p, 0.0), p)
    torch.testing.assert_close(smoothed_target(unflipped_target(p, 0.1), 0.1), p, rtol=0, atol=1e-15)


def population_loss(name: str, log_pi: Tensor, preference: Tensor, log_ref: Tensor, log_mu: Tensor) -> float:
    """Mean loss over pairs drawn i.i.d. from mu with drawn labels, for any number of responses."""
    first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(len(log_pi))] * 2, indexing="ij"))
    pairs = [x[index] for x in (log_pi, log_ref) for index in (first, second)]
    weight = (log_mu[first] + log_mu[second]).exp() * 2 * preference[first, second]
    return OBJECTIVES[name].loss(*pairs, beta=BETA, weight=weight).loss.item()


def test_hinge_is_least_at_the_whole_margins_of_its_linear_program():
    """min sum_ij w_ij x_ij, x_ij >= 1 - (s_i - s_j), x_ij >= 0: its vertices have whole differences s_i - s_j."""
    from scipy.optimize import linprog

    mu, p = LOG_MU.exp().numpy(), PREFERENCE.numpy()
    pairs = [(i, j) for i in range(COUNT) for j in range(COUNT) if i != j]
    cost = np.array([0.0] * COUNT + [2 * mu[i] * mu[j] * p[i, j] for i, j in pairs])
    above = np.zeros((len(pairs), COUNT + len(pairs)))
    for row, (i, j) in enumerate(pairs):
        above[row, i], above[row, j], above[row, COUNT + row] = -1.0, 1.0, -1.0
    bounds = [(0.0, 0.0), *[(None, None)] * (COUNT - 1), *[(0.0, None)] * len(pairs)]
    found = linprog(cost, A_ub=above, b_ub=-np.ones(len(pairs)), bounds=bounds, method="highs-ds")
    margins = found.x[:COUNT]
    assert np.abs(margins - margins.round()).max() < 1e-9 and len(set(margins.round())) > 2
    least = found.fun + float((mu**2).sum())  # a response beside itself costs 1
    best = torch.log_softmax(LOG_REF + torch.from_numpy(margins) / BETA, 0)
    assert population_loss("hinge", best, PREFERENCE, LOG_REF, LOG_MU) == pytest.approx(least, abs=1e-12)
    draw = torch.Generator().manual_seed(1)
    for _ in range(200):
        near = torch.log_softmax(best + 0.3 * torch.randn(COUNT, generator=draw, dtype=torch.float64), 0)
        assert population_loss("hinge", near, PREFERENCE, LOG_REF, LOG_MU) >= least - 1e-12
    of_dpo = torch.log_softmax(LOG_REF + REWARD / BETA, 0)
    assert population_loss("hinge", of_dpo, PREFERENCE, LOG_REF, LOG_MU) > least + 1e-3


def two_responses(name: str, p: float, ratio: float) -> float:
    """Mean loss over drawn labels of two responses that the reference likes equally, at a log-ratio difference."""
    preference = torch.tensor([[0.5, p], [1 - p, 0.5]], dtype=torch.float64)
    half = torch.full((2,), -math.log(2), dtype=torch.float64)
    log_pi = torch.log_softmax(torch.tensor([ratio, 0.0], dtype=torch.float64), 0)
    return population_loss(name, log_pi, preference, half, half)


@pytest.mark.parametrize("p", [0.51, 0.7, 0.99])
def test_over_two_responses_the_hinge_is_least_at_a_margin_of_1_whatever_the_preference(p):
    losses = {ratio: two_responses("hinge", p, ratio) for ratio in np.linspace(-4, 4, 81) / BETA}
    assert min(losses, key=losses.__getitem__) == pytest.approx(1 / BETA, abs=1e-9)


@pytest.mark.parametrize("p", [0.6, 0.9, 1.0])
def test_apo_down_has_no_minimum(p):
    """Over two responses the loss falls to both ends of any scan; DPO's is least at log(p / (1 - p)) / beta."""
    scan = np.linspace(-60, 60, 241)
    losses = [two_responses("apo_down", p, ratio) for ratio in scan]
    assert int(np.argmin(losses)) == len(scan) - 1
    tail = np.array(losses[-100:])
    assert (np.diff(tail) < 0).all()


def reward_gradient(rewards: Tensor, truth: Tensor, coefficient: float) -> Tensor:
    """Gradient of a reward model's loss over all ordered pairs, each label drawn with P = sigma(r_i - r_j)."""
    rewards = rewards.clone().requires_grad_()
    first, second = (index.flatten() for index in torch.meshgrid(*[torch.arange(len(truth))] * 2, indexing="ij"))
    chosen, rejected = first[first != second], second[first != second]
    weight = torch.sigmoid(truth[chosen] - truth[rejected])
    loss = bradley_terry_loss(rewards[chosen], rewards[rejected], weight=weight)
    loss = loss + coefficient * centering_loss(rewards[chosen], rewards[rejected], weight=weight)
    return torch.autograd.grad(loss, rewards)[0]


@pytest.mark.parametrize("coefficient", [0.0, 0.01, 0.1, 1.0])
def test_centring_in_the_loss_shrinks_the_differences_of_rewards(coefficient):
    """Over all pairs of K completions sum (r_i + r_j)^2 = (K - 2) sum r_i^2 + (sum r_i)^2: a ridge.

    Of the truth (1, 0, -1) it leaves (a, 0, -a) with sigma(a) - sigma(1) + sigma(2a) - sigma(2) + 2 lambda a = 0.
    """

    def sigma(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    low, high = 0.0, 1.0
    for _ in range(80):
        a = (low + high) / 2
        below = sigma(a) - sigma(1) + sigma(2 * a) - sigma(2) + 2 * coefficient * a < 0
        low, high = (a, high) if below else (low, a)
    truth = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    assert reward_gradient(a * truth, truth, coefficient).abs().max() < 1e-12
    assert (a == pytest.approx(1.0, abs=1e-12)) == (coefficient == 0)
    if coefficient:
        assert a < 0.99 and reward_gradient(truth, truth, coefficient).abs().max() > 1e-2


def test_centring_in_the_loss_of_two_completions_shrinks_nothing():
    """With one pair the mean alone is free: r_1 = -r_2 has no penalty."""
    truth = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert reward_gradient(truth, truth, 1.0).abs().max() < 1e-15


def test_label_smoothing_smooths_flipped_labels_once_more():
    """A truth of .9 with flips of .2 is seen as .74: cDPO with the right rate trains on .644, farther from .9."""
    seen = 0.9 * 0.8 + 0.1 * 0.2
    smoothed = smoothed_target(torch.tensor(seen, dtype=torch.float64), 0.2).item()
    margins = [math.log(p / (1 - p)) for p in (0.9, seen, smoothed)]
    assert margins == pytest.approx([2.197, 1.046, 0.593], abs=5e-4)
