"""Sampling: by inversion, one response at a time, with the probabilities of the training forward."""

from __future__ import annotations

import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig

from rlhf_pipeline.config.decoding import Decoding
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.models.tree_attention import TreeMask
from rlhf_pipeline.rollout import prefill
from rlhf_pipeline.rollout.responses import prompts_run, sample_for_prompts
from rlhf_pipeline.rollout.sampler import draw_uniforms, length_groups, pick, sample, sample_grouped
from tests.rollout.conftest import tiny_llama

PAD, EOS = 0, 1
JUST_BELOW_1 = 1 - 2.0**-53


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


@pytest.mark.parametrize(
    "u, token",
    [(0.0, 0), (0.0999, 0), (0.1001, 1), (0.2999, 1), (0.3001, 2), (0.5999, 2), (0.6001, 3), (JUST_BELOW_1, 3)],
)
def test_pick_inverts_the_cumulative_distribution(u, token):
    probabilities = (0.1, 0.2, 0.3, 0.4)
    tokens, logprobs = pick(logits_of(*probabilities), torch.tensor([u], dtype=torch.float64))
    assert tokens.item() == token
    assert logprobs.item() == pytest.approx(math.log(probabilities[token]), abs=1e-12)


@pytest.mark.parametrize("u, token", [(0.0, 1), (0.4999, 1), (0.5, 3), (JUST_BELOW_1, 3)])
def test_a_token_of_probability_0_is_never_picked(u, token):
    tokens, logprobs = pick(logits_of(0.0, 0.5, 0.0, 0.5, 0.0), torch.tensor([u], dtype=torch.float64))
    assert tokens.item() == token
    assert logprobs.item() == pytest.approx(math.log(0.5), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_both_ends_of_a_large_vocabulary_are_reached_and_not_left(dtype):
    logits = torch.randn(64, 50_000, generator=generator()).to(dtype)
    logits[:, -1] = logits[:, 0] = -math.inf
    ends = torch.tensor([0.0, JUST_BELOW_1], dtype=torch.float64).repeat(32)
    tokens, logprobs = pick(logits, ends)
    assert tokens.tolist() == [1, 49_998] * 32
    assert logprobs.isfinite().all()


def test_logits_far_from_0_change_nothing():
    u = torch.tensor([0.35], dtype=torch.float64)
    for shift in (-1e4, 0.0, 1e4):
        tokens, logprobs = pick(logits_of(0.1, 0.2, 0.3, 0.4) + shift, u)
        assert tokens.item() == 2 and logprobs.item() == pytest.approx(math.log(0.3), abs=1e-9)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.7])
def test_bf16_logits_are_widened_before_they_are_divided(temperature):
    """By hand: e^(l / T) / sum e^(l / T) of the bf16 numbers l, in float64."""
    logits = (8 * torch.randn(64, 50, generator=generator())).bfloat16()
    tokens, logprobs = pick(logits, draw_uniforms(64, 1, generator(1)).squeeze(1), temperature)
    powers = [[math.exp(value / temperature) for value in row] for row in logits.double().tolist()]
    expected = [math.log(row[token] / sum(row)) for row, token in zip(powers, tokens.tolist(), strict=True)]
    assert logprobs.tolist() == pytest.approx(expected, abs=1e-5)


def test_picked_frequencies_are_the_probabilities():
    probabilities, count = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05]), 20_000
    tokens, _ = pick(probabilities.log().expand(count, 5), draw_uniforms(count, 1, generator()).squeeze(1))
    for token, p in enumerate(probabilities.tolist()):
        assert abs((tokens == token).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_uniforms_depend_on_the_seed_only():
    assert torch.equal(draw_uniforms(3, 4, generator(1)), draw_uniforms(3, 4, generator(1)))
    drawn = draw_uniforms(100, 100, generator())
    assert drawn.dtype == torch.float64 and drawn.min() >= 0 and drawn.max() < 1


class Script:
    """A model that always gives the same distribution, and keeps what it was called with."""

    def __init__(self, *probabilities: float):
        self.logits, self.calls = logits_of(*probabilities), []

    def __call__(self, **call):
        self.calls.append({key: value.clone() for key, value in call.items() if isinstance(value, torch.Tensor)})
        return SimpleNamespace(logits=self.logits.expand(call["input_ids"].shape[0], 1, -1))


HALVES = (0.25, 0.25, 0.25, 0.25)  # u in [0, .25) PAD, [.25, .5) EOS, then 2 and 3


def uniforms(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def scripted(model, prompts, draws, **options):
    return sample(model, prompts, draws, stop_ids=[EOS], **options)


def test_a_response_ends_at_its_stop_token_which_belongs_to_it():
    found = scripted(Script(*HALVES), [[2]] * 3, uniforms([0.6, 0.3, 0.9], [0.3, 0.6, 0.6], [0.6, 0.9, 0.6]))
    assert [r.ids for r in found] == [[2, EOS], [EOS], [2, 3, 2]]
    assert [r.ended for r in found] == [True, True, False]
    for response in found:
        assert response.logprobs == pytest.approx([math.log(0.25)] * len(response.ids), abs=1e-6)


def test_a_stop_token_at_the_last_index_counts_as_ended():
    (response,) = scripted(Script(*HALVES), [[2]], uniforms([0.6, 0.9, 0.3]))
    assert (response.ids, response.ended) == ([2, 3, EOS], True)


@pytest.mark.parametrize("prompt", [[EOS], [2, EOS], [EOS, EOS, 3], [PAD, EOS, PAD]])
def test_stop_and_pad_tokens_in_the_prompt_end_and_hide_nothing(prompt):
    model = Script(*HALVES)
    (response,) = scripted(model, [prompt], uniforms([0.6, 0.9, 0.6]))
    assert (response.ids, response.ended) == ([2, 3, 2], False)
    assert model.calls[0]["attention_mask"].tolist() == [[1] * len(prompt)]
    assert model.calls[0]["position_ids"].tolist() == [list(range(len(prompt)))]


def test_a_sampled_pad_is_an_ordinary_token():
    model = Script(*HALVES)
    (response,) = scripted(model, [[2]], uniforms([0.1, 0.1, 0.6]))
    assert (response.ids, response.ended) == ([PAD, PAD, 2], False)
    assert model.calls[2]["attention_mask"].tolist() == [[1, 1, 1]]


def test_prompts_are_padded_on_the_left_and_positions_start_at_the_first_token():
    model = Script(*HALVES)
    scripted(model, [[2, 3, 2], [3]], uniforms([0.6, 0.6], [0.9, 0.9]))
    first, second = model.calls
    assert first["input_ids"].tolist() == [[2, 3, 2], [PAD, PAD, 3]]
    assert first["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert first["position_ids"][0].tolist() == [0, 1, 2] and first["position_ids"][1, -1].item() == 0
    assert second["input_ids"].tolist() == [[2], [3]]
    assert second["position_ids"].tolist() == [[3], [1]]
    assert second["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_finished_sequences_leave_the_batch():
    model = Script(*HALVES)
    draws = uniforms([0.3, 0.6, 0.6], [0.6, 0.6, 0.6], [0.6, 0.3, 0.6])
    found = scripted(model, [[2], [3], [2]], draws)
    assert [call["input_ids"].shape[0] for call in model.calls] == [3, 2, 1]
    assert [r.ids for r in found] == [[EOS], [2, 2, 2], [2, EOS]]
    model = Script(*HALVES)
    scripted(model, [[2], [3]], uniforms([0.3, 0.6], [0.3, 0.6]))
    assert len(model.calls) == 1  # all have ended: no further step


def test_temperature_divides_the_logits():
    p = [x**2 for x in (0.1, 0.2, 0.3, 0.4)]  # T = 1/2 squares the probabilities: 1/30, 4/30, 9/30, 16/30
    model = Script(0.1, 0.2, 0.3, 0.4)
    found = scripted(model, [[2]] * 2, uniforms([0.46], [0.48]), temperature=0.5)  # 14/30 = .4667
    assert [r.ids for r in found] == [[2], [3]]
    assert found[0].logprobs[0] == pytest.approx(math.log(p[2] / sum(p)), abs=1e-6)


def build(name: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    common = {"vocab_size": 24, "hidden_size": 16, "initializer_range": 0.3, "num_hidden_layers": 2}
    wide = {"intermediate_size": 32, "num_attention_heads": 2, "max_position_embeddings": 64}
    grouped = {**wide, "num_key_value_heads": 1, "head_dim": 8}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
    special = {
        "llama": grouped,
        "qwen3": grouped,
        "mistral": {**grouped, "sliding_window": 3},
        "gemma3_text": {**grouped, **layers, "query_pre_attn_scalar": 8},
        "gemma2": {**grouped, **layers, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0},
        "gpt_neox": wide,
        "gpt2": {"n_head": 2, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "bloom": {"n_head": 2},
    }[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**common, **special})
    config.pad_token_id, config.eos_token_id, config.bos_token_id = PAD, EOS, None
    return AutoModelForCausalLM.from_config(config).eval()


def prompts_of(count: int, seed: int = 0) -> list[Example]:
    """Prompts of 1 to 8 tokens, EOS and PAD among them."""
    draw = random.Random(seed)
    ids = [[draw.randrange(24) for _ in range(draw.randint(1, 8))] for _ in range(count)]
    return [Example(row, [], [], prompt_key=str(k), where=f"row {k}") for k, row in enumerate(ids)]


ARCHITECTURES = ["llama", "qwen3", "mistral", "gemma3_text", "gemma2", "gpt2", "gpt_neox", "bloom"]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_samplers_logprobs_equal_recomputed_ones(name, temperature):
    model = build(name)
    policy = Policy(model, inspect_model(model), temperature)
    sampled, responses = sample_for_prompts(
        policy,
        prompts_of(12),
        samples=3,
        response_length=7,
        stop_ids=[EOS],
        generator=generator(),
        temperature=temperature,
        responses_at_once=16,
    )
    batch = pack(sampled, layout=policy.reader.layout)
    with torch.no_grad():
        recomputed = policy(batch).logprobs
    drawn = torch.tensor([x for group in responses for r in group for x in r.logprobs])
    assert drawn.std() > 0.2
    torch.testing.assert_close(drawn, recomputed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_batching_and_the_order_of_prompts_change_no_sample(name):
    model = build(name)
    policy, prompts = Policy(model, inspect_model(model)), [e.prompt_ids for e in prompts_of(20)]
    draws = draw_uniforms(20, 6, generator(1))
    options = {"cache_config": model.config}
    endless = sample_grouped(policy, prompts, draws, responses_at_once=20, stop_ids=[-1], **options)
    tokens = Counter(token for response in endless for token in response.ids)
    options["stop_ids"] = [tokens.most_common(1)[0][0]]  # so that some responses end early
    one_by_one = sample_grouped(policy, prompts, draws, responses_at_once=1, **options)
    assert {r.ended for r in one_by_one} == {True, False}
    order = list(range(20))
    random.Random(2).shuffle(order)
    for size in (3, 7, 64):
        found = sample_grouped(policy, prompts, draws, responses_at_once=size, **options)
        assert [r.ids for r in found] == [r.ids for r in one_by_one]
        shuffled = sample_grouped(policy, [prompts[i] for i in order], draws[order], responses_at_once=size, **options)
        assert [r.ids for r in shuffled] == [one_by_one[i].ids for i in order]


def test_a_batch_has_at_most_so_many_positions():
    prompts = [[1] * size for size in (3, 1, 9, 2, 3, 1)]
    assert length_groups(prompts, 4) == [[1, 5, 3, 0], [4, 2]]
    # With room for 2: two of 3 positions; 4 and 5; another of 5 would make 15; one of 11 is alone.
    assert length_groups(prompts, 4, 2, 10) == [[1, 5], [3, 0], [4], [2]]
    assert length_groups(prompts, 1, 2, 100) == [[1], [5], [3], [0], [4], [2]]
    assert length_groups([], 4, 2, 10) == []


def test_the_cache_of_a_batch_takes_a_quarter_of_the_memory(monkeypatch):
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=3, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=8
    )
    monkeypatch.setattr(prefill, "machine_memory", lambda: (4 * 10_000, 0))
    # Keys and values, 3 layers, 2 heads of 8 numbers of 4 bytes: 384 bytes a position.
    assert prefill.cache_positions(config, "cpu") == 10_000 // 384
    config.head_dim = 16
    assert prefill.cache_positions(config, "cpu") == 10_000 // 768
    config.num_key_value_heads = None
    assert prefill.cache_positions(config, "cpu") == 10_000 // 1536
    assert prefill.cache_positions(config, "cuda") is None
    config.num_hidden_layers = 0
    assert prefill.cache_positions(config, "cpu") is None
    monkeypatch.setattr(prefill, "machine_memory", lambda: (None, None))
    assert prefill.cache_positions(config, "cpu") is None


def test_a_small_machine_draws_the_same_responses_in_smaller_batches(monkeypatch, make_llama):
    model = make_llama(vocab=24)
    policy, prompts = Policy(model, inspect_model(model)), prompts_of(6)
    options = {"samples": 2, "response_length": 5, "stop_ids": [EOS], "responses_at_once": 64}
    read = []

    def counted(**inputs):
        if isinstance(inputs["attention_mask"], TreeMask):  # the prompts of a batch
            read.append(inputs["input_ids"].numel())
        return policy(**inputs)

    whole, _ = sample_for_prompts(policy, prompts, generator=generator(), **options)
    monkeypatch.setattr(prefill, "cache_positions", lambda *_: 26)  # two rows of 13 positions at most
    found, _ = sample_for_prompts(policy, prompts, generator=generator(), module=counted, **options)
    assert [one.completions for one in found] == [one.completions for one in whole]
    run = prompts_run(policy, found, 64, Memory(), response_length=5, device="cpu")
    assert len(read) >= 6 and sum(run) == sum(read)
    beams = Decoding(do_sample=False, num_beams=2)
    one = sample_for_prompts(policy, prompts, generator=generator(), decoding=beams, **options | {"samples": 1})[0]
    monkeypatch.undo()
    two = sample_for_prompts(policy, prompts, generator=generator(), decoding=beams, **options | {"samples": 1})[0]
    assert [example.completions for example in one] == [example.completions for example in two]


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(make_llama):
    policy = Policy(make_llama(vocab=24), Reader())
    options = {"samples": 4, "response_length": 5, "stop_ids": [EOS], "responses_at_once": 24}

    def draw(seed: int, **changes):
        examples, _ = sample_for_prompts(policy, prompts_of(6), generator=generator(seed), **{**options, **changes})
        return [e.completions for e in examples]

    assert draw(0) == draw(0) == draw(0, responses_at_once=5)
    assert draw(0) != draw(1)


def test_several_generators_draw_their_own_sets_and_compute_each_prompt_once(make_llama):
    model = make_llama(vocab=24)
    policy, prompts, seeds = Policy(model, inspect_model(model)), prompts_of(6), (0, 5, 9)
    options = {"samples": 2, "response_length": 5, "stop_ids": [EOS], "responses_at_once": 64}
    read = []

    def counted(**inputs):
        read.append(inputs["input_ids"].numel())
        return policy(**inputs)

    generators = [generator(seed) for seed in seeds]
    together, _ = sample_for_prompts(policy, prompts, generator=generators, module=counted, **options)
    apart = [sample_for_prompts(policy, prompts, generator=generator(seed), **options)[0] for seed in seeds]
    for place, example in enumerate(together):
        assert example.completions == [one[place].completions[i] for i in range(2) for one in apart]
        assert example.ended == [one[place].ended[i] for i in range(2) for one in apart]
    assert read[0] == sum(len(prompt.prompt_ids) for prompt in prompts)
    assert max(read[1:]) <= 6 * 2 * 3  # afterwards one token of each response


def test_sampled_examples_keep_their_prompt_and_lose_what_belonged_to_old_completions(make_llama):
    policy = Policy(make_llama(), Reader())
    old = Example([2, 3], [[2, 1]], [True], "key", "row 7", 0.8, "text", ("old",))
    examples, responses = sample_for_prompts(
        policy,
        [old],
        samples=5,
        response_length=3,
        stop_ids=[EOS],
        generator=generator(),
        responses_at_once=5,
    )
    (example,) = examples
    assert (example.prompt_ids, example.prompt_key, example.where) == ([2, 3], "key", "row 7")
    assert (example.label_probability, example.completion_texts) == (None, ())
    assert example.completions == [r.ids for r in responses[0]] and len(example.completions) == 5
    assert example.ended == [ids[-1] == EOS for ids in example.completions]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("prompt", [(2, 3, 2), (3,), (2, EOS, PAD)])
def test_the_mass_of_all_responses_is_1(make_tree, prompt, temperature):
    tree = make_tree(prompt=prompt, temperature=temperature)
    # 1 + 3 + 9 that ended, 27 that were cut; a sampled PAD counts like any other token.
    assert len(tree.example.completions) == 40
    with torch.no_grad():
        assert tree.logprobs().exp().sum().item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_responses_come_as_often_as_their_enumerated_probability(make_tree, temperature):
    tree, count = make_tree(temperature=temperature), 20_000
    _, (responses,) = sample_for_prompts(
        tree.policy,
        [tree.example],
        samples=count,
        response_length=3,
        stop_ids=[EOS],
        generator=generator(5),
        temperature=temperature,
        responses_at_once=count,
    )
    found = Counter((tuple(r.ids), r.ended) for r in responses)
    with torch.no_grad():
        probabilities = tree.logprobs().exp().tolist()
    leaves = list(zip(tree.example.completions, tree.example.ended))
    assert set(found) <= {(tuple(ids), end) for ids, end in leaves}
    for (ids, end), p in zip(leaves, probabilities):
        assert abs(found[tuple(ids), end] / count - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_in_bf16_the_sampler_agrees_with_the_training_forward_at_every_temperature():
    """What is left is the rounding of the two passes in bf16, which a temperature of T divides by T."""
    model = tiny_llama(dtype=torch.bfloat16, vocab=50, hidden_size=16)
    prompts = [Example([2 + i % 40, 3, 4], [], [], f"p{i}", "w") for i in range(64)]
    options = {"samples": 1, "response_length": 6, "stop_ids": [EOS], "responses_at_once": 64}
    apart = {}
    for temperature in (1.0, 0.7):
        policy = Policy(model, inspect_model(model), temperature)
        sampled, drawn = sample_for_prompts(policy, prompts, generator=generator(), temperature=temperature, **options)
        batch = pack(sampled, layout=policy.reader.layout)
        with torch.no_grad():
            recomputed = policy(batch).logprobs
        mine = torch.tensor([value for (response,) in drawn for value in response.logprobs])
        apart[temperature] = (mine - recomputed).abs().mean().item() * temperature
    assert apart[0.7] <= 1.25 * apart[1.0] + 1e-6
