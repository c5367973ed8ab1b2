"""Adapters in models: what they compute, store and share, on Linear and Conv1D weights, with tied heads and without."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.errors import BadInput, ConfigError
from rlhf_pipeline.models.adapters import (
    adapter_facts,
    add_adapter,
    load_adapter,
    on_same_weights,
    remove_adapters,
    save_adapter,
    stirred,
    switched_off,
    whole_trunk,
)
from rlhf_pipeline.models.forward import completion_logprobs
from rlhf_pipeline.models.merging import merge_into
from rlhf_pipeline.models.modules import assert_independent
from rlhf_pipeline.models.selfcheck import inspect_model

IDS = torch.randint(2, 32, (2, 7), generator=torch.Generator().manual_seed(3))
ARCHITECTURES = ("llama", "llama-tied", "gpt2")


def settings(**changes):
    given = {"model_name_or_path": "org/name", "dataset_name": "org/rows", "learning_rate": 1e-3, "output_name": "out"}
    return load_config("dpo", None, extra={**given, "use_peft": True, "lora_r": 4, **changes}).config


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def trained(model, by=0.1):
    """Move every trained parameter."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=draw)
    return model


def embedding_of(name):
    return "wte" if name == "gpt2" else "embed_tokens"


KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "all-linear": {"lora_target_modules": "all-linear"},
    "head trained whole": {"lora_modules_to_save": ["lm_head"]},
    "embedding trained whole": {"lora_modules_to_save": ["EMBEDDING"]},
    "adapter on the head": {"lora_target_modules": ["lm_head"]},
    "adapter on the embedding": {"lora_target_modules": ["EMBEDDING"]},
}


def adapted(make_model, name, kind, **options):
    changes = {
        key: [embedding_of(name) if entry == "EMBEDDING" else entry for entry in value]
        if type(value) is list
        else value
        for key, value in KINDS[kind].items()
    }
    model = make_model(name, **options)
    add_adapter(model, settings(**changes), "base")
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_an_adapter_starts_at_its_base_and_is_the_same_in_plain_peft(make_model, tmp_path, name, kind):
    from peft import PeftModel

    base = logits(make_model(name))
    model = adapted(make_model, name, kind)
    assert torch.equal(logits(model), base)
    after = logits(trained(model))
    assert (after - base).abs().max() > 1e-2
    save_adapter(model, tmp_path)
    again = make_model(name)
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), after)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    theirs = PeftModel.from_pretrained(make_model(name), str(tmp_path))
    assert torch.equal(logits(theirs), after)
    remove_adapters(again, merge=True)
    assert not [key for key in again.state_dict() if "lora" in key or "modules_to_save" in key]
    torch.testing.assert_close(logits(again), after, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_score_head_is_trained_and_survives(make_model, tmp_path, name):
    from peft import PeftModel

    model = make_model(name, scorer=True)
    add_adapter(model, settings(), "base")
    expected = logits(trained(model))
    save_adapter(model, tmp_path)
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter_model.safetensors")
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    again = make_model(name, scorer=True)
    with torch.no_grad():
        again.score.weight.zero_()  # the head of a classifier that is loaded on a language model is arbitrary
    load_adapter(again, tmp_path)
    assert torch.equal(logits(again), expected)
    assert torch.equal(logits(PeftModel.from_pretrained(make_model(name, scorer=True), str(tmp_path))), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_logprobs_are_those_of_the_adapted_model(make_model, examples, name, kind):
    """The reader is chosen for a fresh adapter, which changes nothing; it must be right for a trained one."""
    model = adapted(make_model, name, kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    reader = inspect_model(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    trained(model)
    batch = pack(examples, layout=reader.layout)
    with torch.no_grad():
        found, _, _ = completion_logprobs(model, reader, batch)
        plain = []
        for example in examples:
            for completion in example.completions:
                ids = torch.tensor([example.prompt_ids + completion])
                every = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0], -1)
                start = len(example.prompt_ids) - 1
                plain.append(every[start:-1].gather(-1, ids[0, start + 1 :, None]).squeeze(-1))
    torch.testing.assert_close(found, torch.cat(plain), atol=2e-5, rtol=1e-5)


def test_an_adapter_on_the_head_is_not_passed_by(make_model):
    """A head read as W h + b would leave out B A h; at the start B is 0, so only a stirred adapter shows it."""
    assert inspect_model(adapted(make_model, "llama", "adapter on the head")).head == "own"
    assert inspect_model(adapted(make_model, "llama", "lora")).head == "linear"


def test_stirring_is_large_and_leaves_no_trace(make_model):
    model = adapted(make_model, "llama", "lora")
    base = logits(model)
    with stirred(model):
        assert (logits(model) - base).abs().max() > 0.1
    assert torch.equal(logits(model), base)


def test_a_model_without_adapters_needs_no_peft(make_model, monkeypatch):
    """peft takes more than a second to import: PPO, which copies the reward model's trunk, has none for it."""
    for name in ("peft", "peft.tuners.tuners_utils", "peft.utils.other"):
        monkeypatch.setitem(sys.modules, name, None)
    model = make_model("llama")
    trunk = whole_trunk(model.requires_grad_(False))
    assert all(parameter.requires_grad for parameter in trunk.parameters())
    assert torch.equal(trunk(input_ids=IDS).last_hidden_state, model.model(input_ids=IDS).last_hidden_state)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_reference_on_the_same_weights_does_not_move(make_model, name):
    model = make_model(name)
    reference = on_same_weights(model)
    add_adapter(model, settings(lora_target_modules="all-linear", lora_modules_to_save=["lm_head"]), "base")
    before = logits(reference)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (logits(model) - before).abs().max() > 0.1
    assert torch.equal(logits(reference), before)
    assert_independent(model, reference)
    assert reference.get_input_embeddings().weight is not None
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    both = {p.data_ptr(): p.numel() for part in (model, reference) for p in part.parameters()}
    assert sum(both.values()) == own + sum(p.numel() for p in reference.parameters())  # one copy of the base


def test_shared_weights_that_are_trained_are_refused(make_model):
    model = make_model("llama")
    with pytest.raises(RuntimeError, match="shares memory"):
        assert_independent(model, on_same_weights(model).requires_grad_(True))
    frozen = on_same_weights(model)
    model.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"lm_head\.weight"):
        assert_independent(model, frozen)


def test_adapters_on_adapters_add_up(make_model, tmp_path):
    """W + s_1 B_1 A_1 + s_2 B_2 A_2, against the sum by hand."""
    first = adapted(make_model, "llama", "lora")
    trained(first)
    save_adapter(first, tmp_path)
    model = make_model("llama")
    load_adapter(model, tmp_path)
    parent = logits(model)
    add_adapter(model, settings(lora_r=2, lora_alpha=6, lora_target_modules=["q_proj", "up_proj"]), "parent")
    assert torch.equal(logits(model), parent)
    frozen = {name: p.clone() for name, p in model.named_parameters() if "parent1" in name}
    trained(model)
    assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in frozen.items())
    plain = make_model("llama")
    layer, theirs = plain.model.layers[1], model.model.layers[1]
    q = theirs.self_attn.q_proj
    with torch.no_grad():
        expected = layer.self_attn.q_proj.weight.clone()
        expected += 32 / 4 * q.lora_B["parent1"].weight @ q.lora_A["parent1"].weight
        expected += 6 / 2 * q.lora_B["default"].weight @ q.lora_A["default"].weight
        up = layer.mlp.up_proj.weight + 3 * theirs.mlp.up_proj.lora_B["default"].weight @ (
            theirs.mlp.up_proj.lora_A["default"].weight
        )
    remove_adapters(model, merge=True)
    torch.testing.assert_close(model.model.layers[1].self_attn.q_proj.weight, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(model.model.layers[1].mlp.up_proj.weight, up, atol=1e-6, rtol=1e-5)


def test_equal_adapters_have_equal_files(make_model, tmp_path):
    for name in ("one", "two"):
        save_adapter(adapted(make_model, "llama", "all-linear"), tmp_path / name)
    for file in ("adapter_config.json", "adapter_model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    targets = json.loads((tmp_path / "one" / "adapter_config.json").read_text())["target_modules"]
    assert targets == sorted(targets)


def test_facts_count_parameters(make_model):
    """q_proj 16 x 16 and v_proj 16 -> 8 in two layers at rank 4: 2 (4 (16 + 16) + 4 (16 + 8))."""
    facts = adapter_facts(adapted(make_model, "llama", "lora"))
    assert facts["trained_parameters"] == 2 * (4 * 32 + 4 * 24)
    assert (facts["type"], facts["r"], facts["target_modules"]) == ("LoRA", 4, ["q_proj", "v_proj"])
    assert adapter_facts(make_model("llama")) == {}


def test_switched_off_is_the_base(make_model):
    base = logits(make_model("llama"))
    model = trained(adapted(make_model, "llama", "head trained whole"))
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    with switched_off(model):
        assert torch.equal(logits(model), base)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == names


def test_a_merge_says_what_it_loses(make_model):
    """Rounding to bf16 is about 2^-9 of a weight, so it loses a little of a large adapter, and a small one entirely."""
    large, small, exact = (trained(adapted(make_model, "llama", "lora"), by) for by in (0.3, 1e-4, 0.3))
    told = merge_into(large, torch.bfloat16)
    assert 0 < told.share < 0.1 and large.lm_head.weight.dtype == torch.bfloat16
    told.require("name", "fix")
    lost = merge_into(small, torch.bfloat16)
    with pytest.raises(BadInput, match=r"name: merged outputs are .* expected at most 10%: fix"):
        lost.require("name", "fix")
    assert merge_into(exact, torch.float32).share < 1e-3


@pytest.mark.parametrize("from_4_bits", [False, True])
def test_a_merge_beyond_the_range_of_fp16_is_refused(make_model, from_4_bits):
    model = trained(adapted(make_model, "llama", "lora"), 0.3)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e7)  # the largest number of fp16 is 65504
    told = replace(merge_into(model, torch.float16), from_4_bits=from_4_bits)
    assert torch.isinf(model.lm_head.weight).any()
    with pytest.raises(BadInput, match=r"name: outputs of the merged model are not finite: .* fix"):
        told.require("name", "fix")


def test_unknown_modules_are_refused_by_name(make_model):
    with pytest.raises(ConfigError, match=r"lora_target_modules: LlamaForCausalLM: .*nothing"):
        add_adapter(make_model("llama"), settings(lora_target_modules=["nothing"]), "base")


def test_an_adapter_of_another_model_is_refused(make_model, tmp_path):
    save_adapter(adapted(make_model, "gpt2", "lora"), tmp_path)
    with pytest.raises(BadInput, match="cannot load it as an adapter"):
        load_adapter(make_model("llama"), tmp_path)


def test_missing_weights_are_refused(make_model, tmp_path):
    from safetensors.torch import save_file

    save_adapter(adapted(make_model, "llama", "lora"), tmp_path)
    weights = load_file(tmp_path / "adapter_model.safetensors")
    gone = sorted(weights)[0]
    save_file({key: value for key, value in weights.items() if key != gone}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BadInput, match="no weights for"):
        load_adapter(make_model("llama"), tmp_path)


def test_an_adapter_of_peft_that_forgets_its_head_is_refused(make_model, tmp_path):
    """findings/tied_head_adapter_lost.sh: plain peft loads it without the head's weights and says nothing of them."""
    from peft import LoraConfig, get_peft_model

    for name in ("llama-tied", "gpt2"):
        made = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], ensure_weight_tying=True)
        model = get_peft_model(make_model(name), made)
        expected = logits(trained(model))
        model.save_pretrained(tmp_path / name)
        again = make_model(name)
        if name == "gpt2":
            with pytest.raises(BadInput, match=r"weights of another model: lm_head"):
                load_adapter(again, tmp_path / name)
        else:
            load_adapter(again, tmp_path / name)
            assert torch.equal(logits(again), expected)
