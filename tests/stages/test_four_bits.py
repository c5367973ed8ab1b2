"""Stages that train an adapter on frozen weights in 4 bits: what is read, stored and refused."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from rlhf_pipeline.cli.main import app
from rlhf_pipeline.compare.fairness import facts_of
from rlhf_pipeline.errors import BadInput, ConfigError, Interrupted, MismatchError
from rlhf_pipeline.experiment.estimate import estimate_stage
from rlhf_pipeline.experiment.weights import bytes_in_4_bits, training_memory
from rlhf_pipeline.measure.exact import run_exact
from rlhf_pipeline.models.four_bits import entries, in_four_bits
from rlhf_pipeline.stages.common import find_model, load_policy, load_reward_model, tokenizer_of
from rlhf_pipeline.stages.export import export_merged
from tests.conftest import TINY_LLAMA, sigterm_at

pytestmark = [
    pytest.mark.check,
    pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"),
]

CPU = torch.device("cpu")
QLORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8, "load_in_4bit": True}
IDS = torch.tensor([[2, 15, 3, 4, 6, 5]])


def read(lab, reference, **changes):
    """The frozen policy of a reference, as the next stage, generate and compare read it."""
    found = find_model(lab.registry, str(reference), "policy")
    return load_policy(found, lab.config("dpo", **changes), tokenizer_of(found), CPU, frozen=True)


@torch.no_grad()
def logits(policy):
    return policy.model(input_ids=IDS).logits


WIDE = {**TINY_LLAMA, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """A home with sft@v2, whose layers have whole blocks of 64, and tuned@v1, an adapter on it in 4 bits; to read."""
    lab = tiny.copy(tmp_path_factory.mktemp("tuned") / "home")
    fresh = {"model_name_or_path": None, "model_init": WIDE, "tokenizer_init": {"type": "world"}}
    lab.run("sft", output_name="sft", dataset_name="world:verdicts", max_train_samples=200, **fresh)
    lab.run("sft", dataset_name="world:verdicts", max_train_samples=200, learning_rate=0.1, **QLORA)
    shutil.rmtree(lab.home / "runs")
    return lab


@pytest.fixture
def on_adapter(tuned, tmp_path):
    return tuned.copy(tmp_path / "home")


@pytest.mark.parametrize("start", ["sft", "tuned"])
def test_dpo_starts_at_margins_of_exactly_0_from_what_was_measured(on_adapter, start):
    result = on_adapter.run("dpo", model_name_or_path=start, learning_rate=1e-12, **QLORA)
    first = on_adapter.rows(result.run)[0]
    assert first["rewards/margins"] == first["logps/chosen_minus_reference"] == 0.0
    if start == "tuned":  # a second adapter that has not moved is the first one, in training as in reading
        assert torch.equal(logits(read(on_adapter, result.model)), logits(read(on_adapter, "tuned")))


def test_the_registry_holds_an_adapter_on_the_weights_before_and_says_how_they_were_held(tuned):
    found = tuned.registry.resolve("tuned")
    assert not list(found.path.glob("model*.safetensors"))
    assert found.manifest.parents["base"].digest == tuned.registry.resolve("sft").digest
    assert found.manifest.adapter["load_in_4bit"] is True and found.manifest.adapter["bnb_4bit_quant_type"] == "nf4"
    # 4 x 64 x 64 + 3 x 64 x 128 weights, although stored in half as many bytes; rank 4 on two of 64 x 64
    policy = read(tuned, "tuned")
    assert sum(entries(w.weight) for w in policy.model.modules() if in_four_bits(w)) == 40960
    assert found.manifest.adapter["parameters"] == sum(t.numel() for t in tuned.weights("sft").values()) + 1024
    assert "BitsAndBytesConfig" in (found.path / "README.md").read_text()


def plainly():
    """The options with which plain transformers holds weights in NF4, on the CPU."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return {"quantization_config": settings, "device_map": {"": "cpu"}}


def test_it_is_what_plain_transformers_and_peft_compute_in_training_mode(tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, base = tuned.registry.resolve("tuned").path, tuned.registry.resolve("sft").path
    plain = AutoModelForCausalLM.from_pretrained(base, **plainly())
    theirs = PeftModel.from_pretrained(plain, str(folder)).train()  # in evaluation it may round to bfloat16
    with torch.no_grad():
        torch.testing.assert_close(logits(read(tuned, "tuned")), theirs(input_ids=IDS).logits, atol=1e-6, rtol=1e-6)


def test_all_weights_start_from_the_same_policy(on_adapter):
    """Of an adapter on 4 bits all weights can be trained: those in 4 bits are written out, then merged."""
    result = on_adapter.run("dpo", model_name_or_path="tuned", max_steps=1, learning_rate=1e-12)
    assert on_adapter.rows(result.run)[0]["rewards/margins"] == 0.0
    path = on_adapter.registry.resolve(result.model).path
    assert "quantization_config" not in (path / "config.json").read_text()
    torch.testing.assert_close(
        logits(read(on_adapter, result.model)), logits(read(on_adapter, "tuned")), atol=1e-4, rtol=1e-4
    )


@pytest.fixture(scope="module")
def scored(tuned, tmp_path_factory):
    """A home with scored@v1, a reward model on tuned@v1: an adapter on an adapter on weights in 4 bits."""
    lab = tuned.copy(tmp_path_factory.mktemp("scored") / "home")
    lab.run("train-rm", model_name_or_path="tuned", **QLORA)
    shutil.rmtree(lab.home / "runs")
    return lab


SETUPS = {
    "reward model in 4 bits": {"reward_model_path": "scored"},
    "whole reward model": {},
    "shared base": {"reward_model_path": "scored", "shared_base": True},
    "from whole weights": {"model_name_or_path": "sft", "value_init": "sft"},
    "all weights, critic from 4 bits": {"use_peft": False, "load_in_4bit": False, "reward_model_path": "scored"},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_ppo_starts_at_a_ratio_of_1_and_a_kl_of_0(scored, tmp_path, setup):
    """Also without gradients, as the sampler and the reference read: bitsandbytes would round to bfloat16 there."""
    lab = scored.copy(tmp_path / "home")
    result = lab.run("ppo", **{"model_name_or_path": "tuned", **QLORA, **SETUPS[setup]})
    first, last = lab.rows(result.run)[0], lab.rows(result.run)[-1]
    assert first["first_minibatch/ratio_error"] == first["objective/kl"] == 0.0
    assert last["objective/kl"] != 0.0
    held = lab.registry.resolve(result.model).manifest.adapter.get("load_in_4bit", False)
    assert held == (setup != "all weights, critic from 4 bits")


def test_a_shared_base_gives_the_same_run(scored, tmp_path):
    lab = scored.copy(tmp_path / "home")
    changes = {**QLORA, "model_name_or_path": "tuned", "reward_model_path": "scored"}
    apart = lab.run("ppo", output_name="apart", **changes)
    shared = lab.run("ppo", output_name="shared", shared_base=True, **changes)
    ours, theirs = lab.weights(apart.model), lab.weights(shared.model)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-6, rtol=1e-5)
    assert shared.cost["flops"] == apart.cost["flops"]
    lab.run("train-rm", model_name_or_path="sft", output_name="plain", max_steps=1, use_peft=True)
    other = {**changes, "model_name_or_path": "sft", "reward_model_path": "plain", "shared_base": True}
    with pytest.raises(MismatchError, match="shared_base: reward model plain@v1 was trained with load_in_4bit: false"):
        lab.run("ppo", **other)


def test_a_reward_model_is_read_by_plain_peft_and_its_head_is_not_in_4_bits(on_adapter):
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    result = on_adapter.run("train-rm", max_steps=2, **QLORA)
    found = find_model(on_adapter.registry, result.model, "reward_model")
    ours = load_reward_model(found, on_adapter.config("dpo"), CPU).model
    assert not [name for name, module in ours.named_modules() if in_four_bits(module) and "score" in name]
    base = on_adapter.registry.resolve("sft").path
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, **plainly())
    theirs = PeftModel.from_pretrained(plain, str(found.path)).train()
    with torch.no_grad():
        torch.testing.assert_close(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits, atol=1e-5, rtol=1e-5)


def test_the_ways_of_holding_weights_are_not_mixed_below_one_adapter(on_adapter):
    for changes in ({"load_in_4bit": False}, {"bnb_4bit_quant_type": "fp4"}, {"use_bnb_nested_quant": True}):
        with pytest.raises(ConfigError, match="tuned@v1 was trained with load_in_4bit: true, bnb_4bit"):
            on_adapter.run("dpo", model_name_or_path="tuned", **{**QLORA, **changes})


def test_a_weight_in_4_bits_cannot_be_trained_whole(on_adapter):
    with pytest.raises(ConfigError, match="down_proj is held in 4 bits"):
        on_adapter.run("dpo", lora_modules_to_save=["down_proj"], **QLORA)


def test_rows_that_are_no_whole_blocks_are_refused(on_adapter):
    """bitsandbytes 0.50.2 quantises them rightly, and its CPU code dequantises them wrongly, without a word."""
    narrow = on_adapter.config("dpo", model_name_or_path="sft@v1", **QLORA)
    with pytest.raises(ConfigError, match=r"layers.0.self_attn.q_proj has 16 inputs.* a multiple of 64"):
        estimate_stage(narrow, on_adapter.home)
    with pytest.raises(ConfigError, match="q_proj has 16 inputs"):
        on_adapter.run("dpo", model_name_or_path="sft@v1", **QLORA)


def test_without_bitsandbytes_nothing_is_trained_or_read(on_adapter, monkeypatch):
    plain = on_adapter.config("dpo", model_name_or_path="tuned")
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    with pytest.raises(BadInput, match=r"tuned@v1: its weights are held in 4 bits.*pip install 'bitsandbytes"):
        estimate_stage(plain, on_adapter.home)
    with pytest.raises(BadInput, match="pip install 'bitsandbytes"):
        read(on_adapter, "tuned")


def test_a_run_resumes_bit_for_bit_and_keeps_only_the_adapter(on_adapter, tmp_path):
    lab = on_adapter
    changes = {**QLORA, "use_bnb_nested_quant": True, "lora_dropout": 0.3, "save_steps": 2}
    whole = lab.run("dpo", **changes)
    again = lab.copy(tmp_path / "again")
    shutil.rmtree(again.home / "models" / "dpo")
    shutil.rmtree(again.home / "runs")
    with sigterm_at(3), pytest.raises(Interrupted):
        again.run("dpo", **changes)
    kept = load_file(next(again.home.glob("runs/*/checkpoints/step-3/model.safetensors")))
    assert sum(tensor.numel() for tensor in kept.values()) == 2 * 4 * 128
    resumed = again.run("dpo", **changes)
    ours, theirs = lab.weights(whole.model), again.weights(resumed.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert lab.rows(whole.run) == again.rows(resumed.run)


@pytest.mark.parametrize("changes", [{"gradient_checkpointing": True}, {"engine": "trl"}, {"bf16": True}])
def test_other_ways_of_training_take_the_same_steps(on_adapter, changes):
    """In bf16 up to the rounding of activations: 8 bits, in layers in 4 bits as in others."""
    given = {**QLORA, "model_name_or_path": "tuned", "dataset_train_split": "all"}
    plain = on_adapter.run("dpo", output_name="plain", **given)
    other = on_adapter.run("dpo", output_name="other", **given, **changes)
    ours, theirs = on_adapter.weights(plain.model), on_adapter.weights(other.model)
    assert ours.keys() == theirs.keys() and any("lora_B" in name and value.any() for name, value in ours.items())
    if "bf16" in changes:
        first = on_adapter.rows(other.run)[0]
        assert first["rewards/margins"] == 0.0
        assert first["grad_norm"] == pytest.approx(on_adapter.rows(plain.run)[0]["grad_norm"], rel=0.05)
        return
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=2e-4, rtol=1e-3)


def test_every_command_reads_it(scored, tmp_path, undrawn):
    """compare, evaluate, generate, exact, collect; as arm, reference, judge and reward model; DoRA on 4 bits too."""
    lab = scored.copy(tmp_path / "home")
    lab.run("dpo", model_name_or_path="tuned", snapshot_steps=2, use_dora=True, **QLORA)
    run = CliRunner()

    def call(*words):
        result = run.invoke(app, ["--home", str(lab.home), "--json", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    cpu = ("use_cpu=true", "num_threads=1")
    compared = call("compare", "tuned", "dpo@v1#2", "dpo", "--judge", "scored", "--allow-mismatch", "exact=false", *cpu)
    assert compared["reference"] == "tuned@v1"
    rows = {row["model"]: row for row in compared["rows"]}
    assert rows["tuned@v1"]["metrics"]["kl"]["mean"] == 0.0
    assert call("evaluate", "dpo", "--reward-model", "scored", *cpu)["model"] == "dpo@v1"
    assert call("generate", "dpo", "--max-prompts", "2", *cpu)
    assert call("exact", "dpo", "--reward", "scored", "max_new_tokens=2", *cpu)
    lab.run("collect", policy="tuned", judge="scored", num=8)
    assert call("models", "show", "dpo")["adapter"]["load_in_4bit"] is True
    assert call("models", "export", "dpo", str(tmp_path / "adapter"))
    assert call("evaluate", str(tmp_path / "adapter"), *cpu)


def test_dpo_is_measured_against_the_reference_of_its_training(on_adapter):
    """From whole weights that training held in 4 bits: a policy that has not moved loses log 2 on every pair."""
    lab = on_adapter
    lab.run("dpo", learning_rate=1e-12, max_steps=1, **QLORA)
    made = run_exact(["dpo"], lab.config("exact", max_new_tokens=1, prompts="world:verdicts"), lab.home)
    (row,) = [row for row in made.rows if row.name == "dpo@v1"]
    assert row.training_loss.training_loss == pytest.approx(math.log(2), abs=1e-6)
    lab.run("dpo", output_name="whole", max_steps=1, use_peft=True)
    two = facts_of(lab.registry, lab.registry.resolve("dpo")), facts_of(lab.registry, lab.registry.resolve("whole"))
    assert {name for name in two[0] if two[0][name] != two[1][name]} == {"frozen weights"}


@torch.no_grad()
def test_a_merged_export_stands_on_the_weights_before_and_tells_its_distance(tuned, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    target, folder = tmp_path / "out", str(tuned.registry.resolve("tuned").path)
    told = export_merged(tuned.registry, "tuned", target, None)
    plain = AutoModelForCausalLM.from_pretrained(target)
    base = AutoModelForCausalLM.from_pretrained(tuned.registry.resolve("sft").path)
    expected = PeftModel.from_pretrained(base, folder)(input_ids=IDS).logits
    torch.testing.assert_close(plain(input_ids=IDS).logits, expected, atol=1e-4, rtol=1e-4)
    # The distance is that of log-probabilities, on the sequences that `merge_into` draws.
    ids = torch.randint(plain.config.vocab_size, (8, 16), generator=torch.Generator().manual_seed(0))
    apart = [torch.log_softmax(model(input_ids=ids).logits, -1) for model in (plain, read(tuned, "tuned").model)]
    assert told["distance"] == pytest.approx(float((apart[0] - apart[1]).square().mean().sqrt()), rel=1e-3)
    assert "evaluate it again" in told["summary"] and "quantization_config" not in (target / "config.json").read_text()


@pytest.mark.parametrize("nested", [False, True])
def test_a_dry_run_counts_the_bytes_of_4_bits(tuned, nested):
    """By hand: 4 matrices of 64 x 64 and 3 of 64 x 128, in blocks of 64; all else in fp32, with AdamW x 4."""
    config, base = tuned.config("dpo", **QLORA, use_bnb_nested_quant=nested), tuned.registry.resolve("sft")
    sizes = [4096] * 4 + [8192] * 3
    scales = sum(size // 64 + 4 + 1028 if nested else 4 * size // 64 for size in sizes)
    rest = sum(tensor.numel() for tensor in tuned.weights("sft").values()) - sum(sizes)
    expected = sum(sizes) // 2 + 7 * 64 + scales + 4 * rest
    model = load_policy(base, config, tokenizer_of(base), CPU).model
    states = [layer.weight.quant_state for layer in filter(in_four_bits, model.modules())]
    parts = [part for s in states for part in (s.absmax, s.code, *((s.state2.absmax, s.state2.code) if nested else ()))]
    tensors = [*parts, *(weight for weight in model.parameters() if not weight.requires_grad)]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) + 4 * 7 * nested == expected
    in_4_bits = bytes_in_4_bits(config, {"base": base})
    assert training_memory(40960 + rest, 1024, config, in_4_bits) == expected + 16 * 1024
    assert estimate_stage(config, tuned.home)["trained_parameters"] == 1024
