"""Cached reference log-probabilities: equal to those computed, missed by a stale key, mended when damaged."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_pipeline.stages.common import load_policy, tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.reference_cache import cached_logprobs, completion_logprob_sums, examples_digest

OPTIONS = {"responses_at_once": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def reference(tiny):
    """The frozen SFT model, its pairs and its key."""
    config = tiny.config("dpo")
    parent = tiny.registry.resolve("sft")
    tokenizer = tokenizer_of(parent)
    policy = load_policy(parent, config, tokenizer, torch.device("cpu"), frozen=True)
    examples, _ = StageData(config, tiny.home, lambda _: None).split("pair", "train", tokenizer)
    return policy, examples[:40], {"model": parent.digest, "dtype": "float32"}


def entries(cache):
    return sorted(cache.glob("reference-*.safetensors"))


def test_the_second_time_it_comes_from_the_disk(reference, tmp_path):
    policy, examples, key = reference
    first = cached_logprobs(policy, examples, tmp_path, key, **OPTIONS)
    second = cached_logprobs(policy, examples, tmp_path, key, **OPTIONS)
    assert (first.hit, second.hit) == (False, True)
    assert torch.equal(first.logprobs, second.logprobs)
    assert torch.equal(first.logprobs, completion_logprob_sums(policy, examples, **OPTIONS))
    assert not list(tmp_path.glob(".*"))  # nothing half-written stays behind


def test_dropout_takes_no_part(reference):
    policy, examples, _ = reference
    expected = completion_logprob_sums(policy, examples, **OPTIONS)
    noisy = torch.nn.Dropout(0.5)
    hook = policy.model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: noisy(output))
    policy.model.add_module("noisy", noisy)
    policy.train()
    try:
        assert torch.equal(completion_logprob_sums(policy, examples, **OPTIONS), expected)
        assert policy.training and noisy.training
    finally:
        hook.remove()
        del policy.model.noisy
        policy.eval()


def test_log_probabilities_equal_plain_ones(reference):
    policy, examples, _ = reference
    found = completion_logprob_sums(policy, examples[:6], **OPTIONS)
    for example, row in zip(examples[:6], found, strict=True):
        for completion, value in zip(example.completions, row, strict=True):
            ids = torch.tensor([example.prompt_ids + completion])
            with torch.no_grad():
                logprobs = policy.model(input_ids=ids).logits[0].log_softmax(-1)
            start = len(example.prompt_ids) - 1
            expected = sum(logprobs[start + i, token] for i, token in enumerate(completion))
            assert float(value) == pytest.approx(float(expected), abs=1e-5)


def test_the_order_is_that_of_the_examples_whatever_the_batch_size(reference):
    policy, examples, _ = reference
    one, all_ = (
        completion_logprob_sums(policy, examples, **{**OPTIONS, "responses_at_once": size}) for size in (1, 40)
    )
    torch.testing.assert_close(one, all_, atol=1e-5, rtol=0)


@pytest.mark.parametrize("change", ["token", "order", "count", "boundary", "model", "dtype", "temperature"])
def test_whatever_changes_misses(reference, tmp_path, change):
    policy, examples, key = reference
    cached_logprobs(policy, examples, tmp_path, key, **OPTIONS)
    key = dict(key)
    if change == "token":
        first = examples[0]
        changed = [[*first.completions[0][:-1], 9], first.completions[1]]
        examples = [replace(first, completions=changed), *examples[1:]]
    elif change == "order":
        examples = examples[::-1]
    elif change == "count":
        examples = examples[:-1]
    elif change == "boundary":  # the same ids in the same order, but the prompt ends one token earlier
        first = examples[0]
        moved = [[first.prompt_ids[-1], *first.completions[0]], first.completions[1]]
        examples = [replace(first, prompt_ids=first.prompt_ids[:-1], completions=moved), *examples[1:]]
    elif change in ("model", "dtype"):
        key[change] = "another"
    else:
        policy = type(policy)(policy.model, policy.reader, temperature=2.0)
    found = cached_logprobs(policy, examples, tmp_path, key, **OPTIONS)
    assert not found.hit
    assert torch.equal(found.logprobs, completion_logprob_sums(policy, examples, **OPTIONS))
    assert len(entries(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "shape"])
def test_a_damaged_entry_is_computed_again_and_replaced(reference, tmp_path, damage):
    from safetensors.torch import save_file

    policy, examples, key = reference
    expected = cached_logprobs(policy, examples, tmp_path, key, **OPTIONS).logprobs
    (file,) = entries(tmp_path)
    content = file.read_bytes()
    if damage == "shape":
        save_file({"logprobs": torch.zeros(3, 2)}, file)
    else:
        file.write_bytes({"cut": content[:-9], "empty": b"", "noise": b"\xff" * len(content)}[damage])
    found = cached_logprobs(policy, examples, tmp_path, key, **OPTIONS)
    assert not found.hit
    assert torch.equal(found.logprobs, expected)
    assert cached_logprobs(policy, examples, tmp_path, key, **OPTIONS).hit


def test_a_model_without_a_digest_is_not_cached(reference, tmp_path):
    policy, examples, _ = reference
    found = cached_logprobs(policy, examples, tmp_path, {"model": None}, **OPTIONS)
    assert not found.hit and not entries(tmp_path)


def test_examples_digest_depends_on_ids_alone(reference):
    _, examples, _ = reference
    renamed = [replace(example, where="elsewhere", prompt_text="") for example in examples]
    assert examples_digest(renamed) == examples_digest(examples)


def test_flops_of_one_pass(reference, tmp_path):
    policy, examples, key = reference
    from rlhf_pipeline.data.batch import pack

    shape = ModelShape.of(policy.model)
    found = cached_logprobs(policy, examples, tmp_path, key, **OPTIONS)
    assert found.flops(shape, examples) == shape.batch_flops(pack(examples))
