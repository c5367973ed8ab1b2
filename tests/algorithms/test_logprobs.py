"""Token log-probabilities against an explicit softmax, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf_pipeline.algorithms.language_model import negative_log_likelihood
from rlhf_pipeline.algorithms.logprobs import OutputHead, token_kl, token_logprobs

N, D, V = 7, 5, 11
CHUNKS = [1, V, 3 * V, N * V - 1, N * V, 2**24]  # elements: one position at a time ... all at once


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


HIDDEN, WEIGHT, BIAS = numbers(N, D), numbers(V, D, seed=1), numbers(V, seed=2)
TARGETS = torch.tensor([0, 10, 3, 3, 7, 1, 9])


def table(hidden, weight, bias, temperature) -> torch.Tensor:
    """log-probabilities of all tokens by the definition, without log_softmax."""
    logits = (hidden @ weight.T + (0 if bias is None else bias)) / temperature
    top = logits.max(-1, keepdim=True).values
    return logits - top - (logits - top).exp().sum(-1, keepdim=True).log()


@pytest.mark.parametrize("chunk_elements", CHUNKS)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_logprobs_and_entropy_equal_the_definition(bias, temperature, chunk_elements):
    head = OutputHead(WEIGHT, bias, temperature)
    logprobs, entropy = token_logprobs(head, HIDDEN, TARGETS, chunk_elements=chunk_elements)
    expected = table(HIDDEN, WEIGHT, bias, temperature)
    torch.testing.assert_close(logprobs, expected[torch.arange(N), TARGETS], rtol=0, atol=1e-12)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), rtol=0, atol=1e-12)
    assert logprobs.dtype == torch.float64 and not entropy.requires_grad


def test_a_uniform_distribution_has_entropy_log_v():
    logprobs, entropy = token_logprobs(OutputHead(torch.zeros(V, D)), HIDDEN.float(), TARGETS)
    assert logprobs.tolist() == pytest.approx([-math.log(V)] * N, abs=1e-6)
    assert entropy.tolist() == pytest.approx([math.log(V)] * N, abs=1e-6)


def test_probabilities_over_the_vocabulary_sum_to_1():
    hidden = HIDDEN[:1].expand(V, D)
    logprobs, _ = token_logprobs(OutputHead(WEIGHT, BIAS), hidden, torch.arange(V))
    assert logprobs.exp().sum().item() == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("chunk_elements", [2 * V, 2**24])
def test_gradient_is_that_of_the_definition(chunk_elements):
    def summed(hidden, weight, bias):
        head = OutputHead(weight, bias, 0.7)
        return token_logprobs(head, hidden, TARGETS, chunk_elements=chunk_elements)[0]

    inputs = tuple(x.clone().requires_grad_() for x in (HIDDEN, WEIGHT, BIAS))
    assert torch.autograd.gradcheck(summed, inputs, atol=1e-8, fast_mode=True)
    found = torch.autograd.grad(summed(*inputs).sum(), inputs)
    # d log p(target) / d logits = onehot - p, divided by the temperature.
    slope = (torch.nn.functional.one_hot(TARGETS, V) - table(HIDDEN, WEIGHT, BIAS, 0.7).exp()) / 0.7
    for mine, expected in zip(found, (slope @ WEIGHT, slope.T @ HIDDEN, slope.sum(0))):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_raised_to_fp32(dtype):
    head = OutputHead(WEIGHT.to(dtype), None, 0.5)
    logprobs, entropy = token_logprobs(head, HIDDEN.to(dtype), TARGETS)
    assert logprobs.dtype == entropy.dtype == head.logits(HIDDEN.to(dtype)).dtype == torch.float32
    logits = (HIDDEN.to(dtype) @ WEIGHT.to(dtype).T).double() / 0.5
    exact = table(logits, torch.eye(V, dtype=torch.float64), None, 1.0)[torch.arange(N), TARGETS]
    assert (logprobs.double() - exact).abs().max().item() < 2e-6


def test_without_positions_the_result_is_empty():
    logprobs, entropy = token_logprobs(OutputHead(WEIGHT), HIDDEN[:0], TARGETS[:0])
    assert logprobs.shape == entropy.shape == (0,)
    assert token_kl(OutputHead(WEIGHT), HIDDEN[:0], OutputHead(WEIGHT), HIDDEN[:0]).shape == (0,)


@pytest.mark.parametrize("chunk_elements", CHUNKS)
def test_token_kl_by_the_definition(chunk_elements):
    other, ref_hidden = numbers(V, D, seed=5), numbers(N, D, seed=6)
    found = token_kl(
        OutputHead(WEIGHT, BIAS, 0.7), HIDDEN, OutputHead(other, None, 0.7), ref_hidden, chunk_elements=chunk_elements
    )
    p, q = table(HIDDEN, WEIGHT, BIAS, 0.7), table(ref_hidden, other, None, 0.7)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), rtol=0, atol=1e-12)
    assert (found > 0).all()


def test_token_kl_to_itself_is_0_and_of_two_coins_known():
    head = OutputHead(WEIGHT, BIAS)
    assert token_kl(head, HIDDEN, head, HIDDEN).abs().max().item() == 0.0
    one = torch.ones(1, 1, dtype=torch.float64)

    def coin(p: float) -> OutputHead:
        return OutputHead(torch.tensor([[math.log(p)], [math.log(1 - p)]], dtype=torch.float64))

    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert token_kl(coin(0.5), one, coin(0.25), one).item() == pytest.approx(expected, abs=1e-15)


def test_negative_log_likelihood_is_a_sum_and_pushes_its_targets_up():
    eye = torch.eye(V, dtype=torch.float64)
    logits = numbers(N, V).requires_grad_()
    logprobs, _ = token_logprobs(OutputHead(eye), logits, TARGETS)
    loss = negative_log_likelihood(logprobs)
    assert loss.item() == pytest.approx(-table(logits.detach(), eye, None, 1.0)[torch.arange(N), TARGETS].sum().item())
    (slope,) = torch.autograd.grad(loss, logits)
    expected = table(logits.detach(), eye, None, 1.0).exp() - torch.nn.functional.one_hot(TARGETS, V)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-12)
