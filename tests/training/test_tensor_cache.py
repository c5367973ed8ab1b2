"""Cached tensors: back as they were written, or not at all."""

from dataclasses import replace

import pytest
import torch

from rlhf_pipeline.training.tensor_cache import read_tensor, write_tensor


@pytest.mark.parametrize("tensor", [torch.randn(3, 4).t(), torch.zeros(0, 2), torch.tensor([float("nan"), -0.0])])
def test_round_trip(tmp_path, tensor):
    path = tmp_path / "cache" / "one.safetensors"
    assert read_tensor(path) is None
    write_tensor(path, tensor)
    found = read_tensor(path)
    assert found.dtype == tensor.dtype and found.shape == tensor.shape
    assert torch.equal(found.nan_to_num(7), tensor.nan_to_num(7))
    assert [item.name for item in path.parent.iterdir()] == [path.name]


@pytest.mark.check
def test_every_flipped_bit_and_every_cut_is_a_miss(tmp_path):
    path = tmp_path / "one.safetensors"
    tensor = torch.arange(6.0)
    write_tensor(path, tensor)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        found = read_tensor(path)  # white space of the header apart, whose change changes nothing
        assert found is None or torch.equal(found, tensor)
        if bit // 8 >= len(content) - 24:
            assert found is None
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert read_tensor(path) is None


def test_a_cached_baseline_is_the_computed_one_and_other_pairs_miss_it(lab, monkeypatch):
    from rlhf_pipeline.stages import reward_quality
    from rlhf_pipeline.stages.common import tokenizer_of
    from rlhf_pipeline.stages.data import StageData

    data = StageData(lab.config("train-rm"), lab.home, lambda _: None)
    examples, _ = data.split("pair", "train", tokenizer_of(lab.registry.resolve("sft")))
    train, held_out = examples[:60], examples[60:90]
    first = reward_quality.cached_baseline_differences(train, held_out, lab.home / "cache")
    assert first == reward_quality.baseline_differences(train, held_out)
    calls = []
    fit = reward_quality.tfidf_bradley_terry
    monkeypatch.setattr(reward_quality, "tfidf_bradley_terry", lambda *sets: (calls.append(1), fit(*sets))[1])
    assert reward_quality.cached_baseline_differences(train, held_out, lab.home / "cache") == first
    prompts_cut = [replace(example, prompt_ids=example.prompt_ids[-1:]) for example in train]
    assert reward_quality.cached_baseline_differences(prompts_cut, held_out, lab.home / "cache") == first
    assert not calls  # they do not read prompts
    reward_quality.cached_baseline_differences(train[1:], held_out, lab.home / "cache")
    reward_quality.cached_baseline_differences(train, held_out[1:], lab.home / "cache")
    assert len(calls) == 2
