"""Token log-probabilities against an explicit softmax, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from rlhf_pipeline.algorithms.language_model import negative_log_likelihood
from rlhf_pipeline.algorithms.logprobs import OutputHead, token_kl, token_logprobs

N, D, V = 7, 5, 11
CHUNKS = [1, V, 3 * V, N * V - 1, N * V, 2**24]  # elements: one position at a time ... all at once


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


HIDDEN, WEIGHT, BIAS = numbers(N, D), numbers(V, D, seed=1), numbers(V, seed=2)
TARGETS = torch.tensor([0, 10, 3, 3, 7, 1, 9])
KEPT = pytest.mark.parametrize("kept_elements", [0, 2**24])  # p is computed again in the backward pass, or kept


def leaves(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(x.detach().clone().requires_grad_() for x in tensors)


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


@KEPT
@pytest.mark.parametrize("chunk_elements", [2 * V, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("bias", [None, BIAS])
def test_gradient_is_that_of_the_definition(bias, temperature, chunk_elements, kept_elements):
    def logprobs(hidden, weight, bias=None):
        bounds = {"chunk_elements": chunk_elements, "kept_elements": kept_elements}
        return token_logprobs(OutputHead(weight, bias, temperature), hidden, TARGETS, **bounds)[0]

    inputs = leaves(*(x for x in (HIDDEN, WEIGHT, bias) if x is not None))
    assert torch.autograd.gradcheck(logprobs, inputs, atol=1e-8)
    # d log p(target) / d logits = onehot - p, divided by the temperature; positions weigh differently, one nothing.
    weights = numbers(N, seed=4)
    weights[2] = 0.0
    found = torch.autograd.grad(logprobs(*inputs) @ weights, inputs)
    slope = torch.nn.functional.one_hot(TARGETS, V) - table(HIDDEN, WEIGHT, bias, temperature).exp()
    slope = weights[:, None] * slope / temperature
    for mine, expected in zip(found, (slope @ WEIGHT, slope.T @ HIDDEN, slope.sum(0))):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
    assert found[0][2].abs().max().item() == 0.0


@KEPT
@pytest.mark.parametrize("chunk_elements", [2 * V, 2**24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_trained_entropy_has_the_gradient_of_the_definition(temperature, chunk_elements, kept_elements):
    inputs = leaves(HIDDEN, WEIGHT, BIAS)
    bounds = {"chunk_elements": chunk_elements, "kept_elements": kept_elements}
    head = OutputHead(inputs[1], inputs[2], temperature)
    logprobs, entropy = token_logprobs(head, inputs[0], TARGETS, train_entropy=True, **bounds)
    weights, others = numbers(N, seed=4), numbers(N, seed=5)
    found = torch.autograd.grad(logprobs @ weights + entropy @ others, inputs)
    plain = torch.log_softmax(torch.nn.functional.linear(*inputs) / temperature, -1)
    chosen = plain.gather(-1, TARGETS[:, None]).squeeze(-1)
    expected = torch.autograd.grad(chosen @ weights - (plain.exp() * plain).sum(-1) @ others, inputs)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@KEPT
def test_only_what_is_trained_gets_a_gradient(kept_elements):
    everything = leaves(HIDDEN, WEIGHT, BIAS)
    expected = torch.autograd.grad(
        token_logprobs(OutputHead(everything[1], everything[2]), everything[0], TARGETS)[0].sum(), everything
    )
    for trained in range(3):
        hidden, weight, bias = (x.detach().requires_grad_(k == trained) for k, x in enumerate(everything))
        bounds = {"chunk_elements": 2 * V, "kept_elements": kept_elements}
        with FlopCounterMode(display=False) as counter:
            token_logprobs(OutputHead(weight, bias), hidden, TARGETS, **bounds)[0].sum().backward()
        # Logits, again where they are not kept, and one product for hidden states or weights.
        assert counter.get_total_flops() == 2 * N * V * D * (1 + (kept_elements == 0) + (trained < 2))
        found = [x.grad for x in (hidden, weight, bias)]
        torch.testing.assert_close(found[trained], expected[trained], rtol=0, atol=1e-12)
        assert [x is None for x in found] == [k != trained for k in range(3)]


@KEPT
def test_a_second_backward_pass_through_the_same_graph_gives_the_same(kept_elements):
    hidden, weight = leaves(HIDDEN, WEIGHT)
    bounds = {"chunk_elements": 2 * V, "kept_elements": kept_elements}
    total = token_logprobs(OutputHead(weight), hidden, TARGETS, **bounds)[0].sum()
    first = torch.autograd.grad(total, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(total, (hidden, weight))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


@KEPT
def test_a_head_tied_to_the_embedding_gets_both_gradients(kept_elements):
    ids = torch.tensor([1, 4, 4, 0, 10, 2, 7])
    (weight,) = leaves(WEIGHT)
    bounds = {"chunk_elements": 2 * V, "kept_elements": kept_elements}
    token_logprobs(OutputHead(weight), weight[ids], TARGETS, **bounds)[0].sum().backward()
    (plain,) = leaves(WEIGHT)
    table(plain[ids], plain, None, 1.0)[torch.arange(N), TARGETS].sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad, rtol=0, atol=1e-12)


@KEPT
def test_fp32_gradients_are_those_of_plain_autograd(kept_elements):
    found, expected = leaves(HIDDEN.float(), WEIGHT.float()), leaves(HIDDEN.float(), WEIGHT.float())
    bounds = {"chunk_elements": 2 * V, "kept_elements": kept_elements}
    token_logprobs(OutputHead(found[1]), found[0], TARGETS, **bounds)[0].sum().backward()
    torch.log_softmax(expected[0] @ expected[1].T, -1).gather(-1, TARGETS[:, None]).sum().backward()
    for mine, plain in zip(found, expected):
        torch.testing.assert_close(mine.grad, plain.grad, rtol=0, atol=2e-6)


@KEPT
@pytest.mark.parametrize("chunk_elements", [2 * V, 2**24])
def test_autocast_computes_as_weights_of_low_precision_do(chunk_elements, kept_elements):
    bounds = {"chunk_elements": chunk_elements, "kept_elements": kept_elements}
    inputs = leaves(HIDDEN.float(), WEIGHT.float(), BIAS.float())
    low = leaves(*(x.bfloat16() for x in inputs))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, entropy = token_logprobs(OutputHead(inputs[1], inputs[2], 0.7), inputs[0], TARGETS, **bounds)
        inside = torch.autograd.grad(logprobs.sum(), inputs, retain_graph=True)
    expected, expected_entropy = token_logprobs(OutputHead(low[1], low[2], 0.7), low[0], TARGETS, **bounds)
    assert torch.equal(logprobs, expected) and torch.equal(entropy, expected_entropy)
    slopes = torch.autograd.grad(expected.sum(), low)
    for found in (inside, torch.autograd.grad(logprobs.sum(), inputs)):
        assert all(torch.equal(mine, other.float()) for mine, other in zip(found, slopes))
    # bf16 has 8 bits: sums of 7 to 11 terms of order 1.
    exact = leaves(*(x.double() for x in low))
    table(*exact, 0.7)[torch.arange(N), TARGETS].sum().backward()
    for mine, other in zip(slopes, exact):
        assert (mine.double() - other.grad).abs().max().item() < 0.05


@KEPT
def test_autocast_around_the_backward_pass_alone_changes_nothing(kept_elements):
    inputs = leaves(HIDDEN.float(), WEIGHT.float())
    total = token_logprobs(OutputHead(inputs[1]), inputs[0], TARGETS, kept_elements=kept_elements)[0].sum()
    expected = torch.autograd.grad(total, inputs, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.autograd.grad(total, inputs)
    assert all(torch.equal(mine, other) for mine, other in zip(found, expected))


@KEPT
def test_autocast_leaves_float64_alone(kept_elements):
    inputs = leaves(HIDDEN, WEIGHT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = token_logprobs(OutputHead(inputs[1]), inputs[0], TARGETS, kept_elements=kept_elements)
    expected = table(HIDDEN, WEIGHT, None, 1.0)[torch.arange(N), TARGETS]
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-12)


def test_the_gradient_is_differentiable_once_only():
    (hidden,) = leaves(HIDDEN)
    total = (token_logprobs(OutputHead(WEIGHT), hidden, TARGETS)[0] ** 2).sum()
    (slope,) = torch.autograd.grad(total, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


class Watch(TorchDispatchMode):
    """Counts exponentials, and rows of the largest tensor V wide; views of the weight do not count."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight, self.exponentials, self.rows = weight.data_ptr(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.exponentials += function.overloadpacket in (torch.ops.aten.exp, torch.ops.aten.exp_)
        if isinstance(found, torch.Tensor) and found.shape[1:] == (V,) and found.data_ptr() != self.weight:
            self.rows = max(self.rows, found.shape[0])
        return found


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("gradients, kept_elements", [(True, N * V - 1), (True, N * V), (False, N * V)])
def test_memory_is_bounded_by_chunks_and_one_exponential_serves_both(gradients, kept_elements, entropy):
    """Three chunks of 2 positions and one of 1."""
    hidden, weight = leaves(HIDDEN, WEIGHT)
    kept = gradients and kept_elements == N * V
    saved: list[int] = []
    watch = Watch(weight)
    with (
        torch.set_grad_enabled(gradients),
        torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x),
        watch,
    ):
        logprobs, entropies = token_logprobs(
            OutputHead(weight, None, 0.7),
            hidden,
            TARGETS,
            entropy=entropy,
            chunk_elements=2 * V + 1,
            kept_elements=kept_elements,
        )
        assert watch.exponentials == (4 if entropy or kept else 0)
        if gradients:
            logprobs.sum().backward()
    assert watch.exponentials == (4 if entropy or kept else 0)
    assert watch.rows == (N if kept else 2)
    assert max(saved, default=0) == {(True, True): N * V, (True, False): V * D, (False, False): 0}[gradients, kept]
    expected = table(HIDDEN, WEIGHT, None, 0.7)
    torch.testing.assert_close(logprobs.detach(), expected[torch.arange(N), TARGETS], rtol=0, atol=1e-12)
    assert (entropies is not None) == entropy


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
