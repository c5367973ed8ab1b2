"""Stages that train an adapter: what is trained, stored and read again, and what the reference is."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from rlhf_pipeline.cli.main import app
from rlhf_pipeline.errors import BadInput, ConfigError, Interrupted, MismatchError, UnknownReference
from rlhf_pipeline.experiment.estimate import estimate_stage
from rlhf_pipeline.experiment.weights import training_memory
from rlhf_pipeline.stages.common import find_model, load_policy, load_reward_model, tokenizer_of
from rlhf_pipeline.stages.export import export_merged
from rlhf_pipeline.training import session
from rlhf_pipeline.training.cost import ModelShape

CPU = torch.device("cpu")
LORA = {"use_peft": True, "lora_r": 4, "lora_alpha": 8}
IDS = torch.tensor([[2, 15, 3, 4, 6, 5]])


def folder_of(lab, reference):
    return lab.registry.resolve(reference).path


def read(lab, reference, **changes):
    """The frozen policy of a reference."""
    found = find_model(lab.registry, str(reference), "policy")
    return load_policy(found, lab.config("dpo", **changes), tokenizer_of(found), CPU, frozen=True)


@torch.no_grad()
def logits(policy):
    return policy.model(input_ids=IDS).logits


def log_of(result):
    return (Path(result.run) / "log.txt").read_text()


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """A home with tuned@v1, an adapter on sft@v1; for reading only."""
    lab = tiny.copy(tmp_path_factory.mktemp("tuned") / "home")
    changes = {"max_train_samples": 200, "learning_rate": 0.1, "lora_dropout": 0.5}
    lab.run("sft", dataset_name="world:verdicts", **changes, **LORA)
    shutil.rmtree(lab.home / "runs")
    return lab


@pytest.fixture
def on_adapter(tuned, tmp_path):
    return tuned.copy(tmp_path / "home")


def test_a_version_is_a_peft_adapter_with_its_base_in_the_manifest(tuned):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder, base = folder_of(tuned, "tuned"), tuned.registry.resolve("sft")
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"} <= files
    assert not [name for name in files if name.startswith("model")]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["parents"]["base"] == {"ref": "sft@v1", "digest": base.digest}
    # one layer of width 16, q_proj and v_proj: 16 x 16 both, at rank 4
    assert manifest["adapter"]["trained_parameters"] == 2 * 4 * 32
    assert "sft@v1" in (folder / "README.md").read_text() and "PeftModel" in (folder / "README.md").read_text()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), str(folder))
    ours = logits(read(tuned, "tuned"))
    with torch.no_grad():
        assert torch.equal(theirs(input_ids=IDS).logits, ours)
    assert (ours - logits(read(tuned, "sft"))).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["sft", "tuned"])
@pytest.mark.parametrize("cached", [True, False])
def test_dpo_starts_at_log_2_and_margins_of_exactly_0(on_adapter, start, cached):
    """Also from an adapter: the reference is that adapter, exactly."""
    changes = {"precompute_ref_log_probs": cached, "lora_dropout": 0.5, **LORA}
    result = on_adapter.run("dpo", model_name_or_path=start, **changes)
    first = on_adapter.rows(result.run)[0]
    assert first["loss/dpo"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == first["logps/chosen_minus_reference"] == 0.0
    manifest = on_adapter.registry.resolve(result.model).manifest
    assert manifest.parents["base"].ref == manifest.parents["reference"].ref == f"{start}@v1"
    assert on_adapter.rows(result.run)[-1]["rewards/margins"] != 0.0


def test_all_weights_can_be_trained_from_an_adapter(on_adapter):
    result = on_adapter.run("dpo", model_name_or_path="tuned", adam_epsilon=1.0, max_steps=1)
    first = on_adapter.rows(result.run)[0]
    assert first["rewards/margins"] == 0.0
    assert (folder_of(on_adapter, result.model) / "model.safetensors").is_file()
    torch.testing.assert_close(
        logits(read(on_adapter, result.model)), logits(read(on_adapter, "tuned")), atol=0.05, rtol=0
    )


def test_an_adapter_on_an_adapter_is_read_with_both(on_adapter):
    """At a learning rate of almost 0 the second adapter is the first; the chain is read, not merged."""
    result = on_adapter.run("dpo", model_name_or_path="tuned", learning_rate=1e-12, **LORA)
    assert torch.equal(logits(read(on_adapter, result.model)), logits(read(on_adapter, "tuned")))
    assert f"{result.model} is an adapter on tuned@v1 on sft@v1" in log_of(
        on_adapter.run("dpo", model_name_or_path=result.model, output_name="third", max_steps=1, **LORA)
    )


def test_a_run_resumes_bit_for_bit_and_keeps_only_the_adapter(lab, tmp_path, monkeypatch):
    changes = {**LORA, "lora_dropout": 0.3, "weight_decay": 0.1, "save_steps": 2, "gradient_checkpointing": True}
    whole = lab.run("dpo", **changes)
    again, fit = lab.copy(tmp_path / "again"), session.fit
    shutil.rmtree(again.home / "models" / "dpo")
    shutil.rmtree(again.home / "runs")

    def stopped(*args, on_update, **options):
        def hook(number, metrics, window):
            if number == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            on_update(number, metrics, window)

        return fit(*args, on_update=hook, **options)

    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", stopped)
        with pytest.raises(Interrupted):
            again.run("dpo", **changes)
    from safetensors.torch import load_file

    kept = load_file(next(again.home.glob("runs/*/checkpoints/step-3/model.safetensors")))
    assert sum(tensor.numel() for tensor in kept.values()) == 2 * 4 * 32
    resumed = again.run("dpo", **changes)
    ours, theirs = lab.weights(whole.model), again.weights(resumed.model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert lab.rows(whole.run) == again.rows(resumed.run)


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo"])
def test_gradient_checkpointing_takes_the_same_steps(lab, stage):
    """Inputs of frozen weights need no gradient, and the first layers' adapters still get theirs."""
    plain = lab.run(stage, output_name="plain", **LORA)
    again = lab.run(stage, output_name="again", gradient_checkpointing=True, **LORA)
    ours, theirs = lab.weights(plain.model), lab.weights(again.model)
    assert any(name.endswith("lora_B.weight") and tensor.any() for name, tensor in ours.items())
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=2e-5, rtol=1e-4)


def test_another_base_is_refused_with_both_digests(on_adapter):
    """The base of that name was removed, and another model has taken its place."""
    registry, folder = on_adapter.registry, folder_of(on_adapter, "sft")
    before = registry.resolve("sft").digest
    shutil.rmtree(folder)
    shutil.copytree(folder_of(on_adapter, "tuned"), folder)
    with pytest.raises(MismatchError) as caught:
        read(on_adapter, "tuned")
    assert before[:12] in str(caught.value) and registry.resolve("sft").digest[:12] in str(caught.value)
    assert registry.resolve("tuned").manifest is not None  # it can still be shown, verified and removed


def test_a_missing_base_is_refused_by_name(on_adapter):
    shutil.rmtree(on_adapter.home / "models" / "sft")
    with pytest.raises(UnknownReference, match="sft"):
        read(on_adapter, "tuned")


def external(lab, tmp_path, base):
    """An adapter as peft writes it: two files and nothing else."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(folder_of(lab, "tuned") / name, folder / name)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    return folder


def test_an_external_adapter_folder_is_read_with_its_base(on_adapter, tmp_path):
    """S4: no config and no tokenizer of its own."""
    folder = external(on_adapter, tmp_path, folder_of(on_adapter, "sft"))
    assert torch.equal(logits(read(on_adapter, folder)), logits(read(on_adapter, "tuned")))
    result = on_adapter.run("dpo", model_name_or_path=str(folder), **LORA)
    assert on_adapter.rows(result.run)[0]["rewards/margins"] == 0.0


def test_an_adapter_beside_whole_weights_is_refused(on_adapter, tmp_path):
    """S2: merged weights may contain the adapter, which would then count twice."""
    folder = external(on_adapter, tmp_path, folder_of(on_adapter, "sft"))
    shutil.copyfile(folder_of(on_adapter, "sft") / "model.safetensors", folder / "model.safetensors")
    with pytest.raises(BadInput, match="beside whole weights"):
        on_adapter.run("dpo", model_name_or_path=str(folder))


def test_a_folder_does_not_send_us_to_the_hub(on_adapter, tmp_path):
    with pytest.raises(BadInput, match="org/name on the hub"):
        read(on_adapter, external(on_adapter, tmp_path, "org/name"))


def test_a_circle_of_adapters_is_refused(on_adapter, tmp_path):
    folder = external(on_adapter, tmp_path, tmp_path / "adapter")
    with pytest.raises(BadInput, match="itself"):
        read(on_adapter, folder)


def test_the_bill_leaves_out_gradients_of_frozen_weights(lab):
    """By hand: one layer of width 16 has 4 x 16 x 16 + 3 x 16 x 32 frozen weights, rank 4 on two of them adds 256.

    A frozen weight costs 4 per token (its product, and the gradient of its input), a trained one 6.
    """
    config, found = lab.config("dpo", **LORA), lab.registry.resolve("sft")
    model = load_policy(found, config, tokenizer_of(found), CPU).model
    vocabulary = model.config.vocab_size
    flops = ModelShape.of(model).training_flops(100, 1000, 10)
    assert flops == 4 * 2560 * 100 + 6 * 256 * 100 + 3 * 4 * 16 * 1000 + 4 * vocabulary * 16 * 10
    # At 60 of 100 positions that nobody reads, q, o and the MLP of the (last) layer are left out, with their adapters.
    skipped = 4 * (2 * 256 + 3 * 512) + 6 * 128
    assert flops - ModelShape.of(model).training_flops(100, 1000, 10, 40) == 60 * skipped


@pytest.fixture(scope="module")
def scored(tuned, tmp_path_factory):
    """A home with reward models that are adapters: scored@v1 on sft@v1, scored@v2 on tuned@v1; for reading only."""
    lab = tuned.copy(tmp_path_factory.mktemp("scored") / "home")
    for start in ("sft", "tuned"):
        lab.run("train-rm", model_name_or_path=start, lora_dropout=0.5, **LORA)
    shutil.rmtree(lab.home / "runs")
    return lab


@torch.no_grad()
def test_a_reward_model_survives_a_reload_and_is_read_by_plain_peft(scored):
    """Trunk, adapter, score head and shift: the reloaded score is plain peft's logit minus the shift."""
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    from rlhf_pipeline.data.batch import pack
    from rlhf_pipeline.data.tokenize import Example

    found = find_model(scored.registry, "scored@v1", "reward_model")
    ours = load_reward_model(found, scored.config("dpo"), CPU)
    plain = AutoModelForSequenceClassification.from_pretrained(folder_of(scored, "sft"), num_labels=1)
    theirs = PeftModel.from_pretrained(plain, str(folder_of(scored, "scored@v1")))
    example = Example([2, 15, 3], [[4, 6, 5], [7, 8]], [True, True], prompt_key="a", where="here")
    scores = ours(pack([example], layout=ours.reader.layout))
    expected = [theirs(input_ids=torch.tensor([[2, 15, 3, *rest]])).logits.item() for rest in example.completions]
    shift = json.loads((folder_of(scored, "scored@v1") / "config.json").read_text())["reward_shift"]
    assert shift != 0.0 and found.manifest.metrics["reward_shift"] == pytest.approx(shift)
    torch.testing.assert_close(scores, torch.tensor(expected) - shift, atol=1e-5, rtol=1e-5)
    # the head is stored with the adapter
    assert "base_model.model.score.weight" in scored.weights("scored@v1")
    assert found.manifest.adapter["modules_to_save"] == ["score"]


SETUPS = {
    "whole reward model": {},
    "adapted reward model": {"reward_model_path": "scored@v1"},
    "critic from sft": {"value_init": "sft"},
    "value head on the actor": {"value_init": "shared"},
    "all weights": {"use_peft": False, "reward_model_path": "scored@v2"},
    "from an adapter": {"model_name_or_path": "tuned", "reward_model_path": "scored@v2"},
}


@pytest.mark.parametrize("setup", SETUPS)
def test_ppo_starts_at_a_ratio_of_1_and_a_kl_of_0(scored, tmp_path, setup):
    """Exactly, and with lora_dropout too: PPO compares two passes, which would drop different inputs."""
    lab = scored.copy(tmp_path / "home")
    result = lab.run("ppo", **{"lora_dropout": 0.5, **LORA, **SETUPS[setup]})
    first = lab.rows(result.run)[0]
    assert first["first_minibatch/ratio_error"] == 0.0
    assert first["objective/kl"] == 0.0
    assert lab.rows(result.run)[-1]["objective/kl"] != 0.0
    if setup == "all weights":
        # the critic too has all weights: the adapters of the reward model are merged into them
        assert (folder_of(lab, result.model) / "model.safetensors").is_file()
        return
    facts = lab.registry.resolve(result.model).manifest.adapter
    assert facts["dropout"] == 0.0 and facts["trained_parameters"] == 2 * 4 * 32
    # actor and critic: an adapter each; and the value head with its bias
    adapters = 1 if setup == "value head on the actor" else 2
    assert f"weights: {adapters * 256 + 17:,} are trained" in log_of(result)


@pytest.mark.parametrize(("start", "reward"), [("sft", "scored@v1"), ("tuned", "scored@v2"), ("tuned", "scored@v1")])
def test_a_shared_base_gives_the_same_run_with_one_copy_of_the_weights(scored, tmp_path, start, reward):
    lab = scored.copy(tmp_path / "home")
    changes = {**LORA, "model_name_or_path": start, "reward_model_path": reward}
    apart = lab.run("ppo", output_name="apart", **changes)
    shared = lab.run("ppo", output_name="shared", shared_base=True, **changes)
    ours, theirs = lab.weights(apart.model), lab.weights(shared.model)
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], atol=1e-6, rtol=1e-5)
    for one, other in zip(lab.rows(apart.run), lab.rows(shared.run), strict=True):
        assert other == pytest.approx(one, rel=1e-4, abs=1e-5)

    def held(result):
        line = next(line for line in log_of(result).splitlines() if "weights: " in line)
        return int(line.split(" of ")[1].split()[0].replace(",", ""))

    whole = sum(tensor.numel() for tensor in lab.weights("sft").values())
    assert held(shared) < 1.5 * whole < 2 * whole < held(apart)
    assert shared.cost["flops"] == apart.cost["flops"]


def test_a_reward_model_on_other_weights_cannot_share_them(scored, tmp_path):
    lab = scored.copy(tmp_path / "home")
    with pytest.raises(MismatchError, match=r"reward@v1: found whole weights .* expected adapters on sft@v1"):
        lab.run("ppo", shared_base=True, **LORA)
    other = lab.run("sft", output_name="other", max_steps=1)
    with pytest.raises(MismatchError, match=r"scored@v1: found adapters on sft@v1 .* expected adapters on other@v1"):
        lab.run("ppo", shared_base=True, model_name_or_path=other.model, reward_model_path="scored@v1", **LORA)


def test_modules_trained_whole_by_a_parent_cannot_be_trained_again(lab):
    changes = {**LORA, "lora_modules_to_save": ["lm_head"]}
    lab.run("sft", dataset_name="world:verdicts", max_train_samples=200, **changes)
    first = lab.rows(lab.run("dpo", model_name_or_path="tuned", **LORA).run)[0]
    assert first["rewards/margins"] == 0.0  # the parent's head is read
    with pytest.raises(ConfigError, match="lora_modules_to_save"):
        lab.run("dpo", model_name_or_path="tuned", output_name="twice", **changes)


@pytest.mark.parametrize(("reference", "role"), [("tuned", "policy"), ("scored@v2", "reward_model")])
@torch.no_grad()
def test_a_merged_export_is_whole_weights_for_plain_transformers(scored, tmp_path, reference, role):
    """scored@v2 is an adapter on an adapter: both are merged."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    target = tmp_path / "out"
    told = export_merged(scored.registry, reference, target, None)
    assert told["dtype"] == "float32" and told["share"] < 1e-2 < told["effect"]
    assert not [path.name for path in target.iterdir() if path.name.startswith("adapter")]
    manifest = json.loads((target / "manifest.json").read_text())
    assert manifest["adapter"] == {} and manifest["metrics"]["merge"]["share"] == told["share"]
    again = find_model(scored.registry, str(target), role)  # its files match its manifest
    if role == "policy":
        plain = AutoModelForCausalLM.from_pretrained(target)(input_ids=IDS).logits
        torch.testing.assert_close(plain, logits(read(scored, reference)), atol=1e-4, rtol=1e-4)
        return
    ours = load_reward_model(find_model(scored.registry, reference, role), scored.config("dpo"), CPU)
    theirs = load_reward_model(again, scored.config("dpo"), CPU)
    plain = AutoModelForSequenceClassification.from_pretrained(target)(input_ids=IDS).logits
    torch.testing.assert_close(plain, ours.model(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    assert theirs.reward_shift == ours.reward_shift != 0.0


def test_a_merge_that_bf16_swallows_is_refused(lab, tmp_path):
    lab.run("sft", dataset_name="world:verdicts", max_train_samples=64, max_steps=1, learning_rate=1e-5, **LORA)
    with pytest.raises(BadInput, match=r"tuned@v1 in bfloat16: .* expected at most 10%: use --dtype float32"):
        export_merged(lab.registry, "tuned", tmp_path / "out", "bfloat16")
    assert not (tmp_path / "out").exists()
    export_merged(lab.registry, "tuned", tmp_path / "out", "float32")


def test_whole_weights_have_nothing_to_merge(tiny, tmp_path):
    with pytest.raises(BadInput, match="whole weights"):
        export_merged(tiny.registry, "sft", tmp_path / "out", None)


@pytest.mark.check
def test_every_command_reads_an_adapter(scored, tmp_path, undrawn):
    """compare, evaluate, generate, exact, collect; as arm, reference, judge and reward model."""
    lab = scored.copy(tmp_path / "home")
    lab.run("dpo", model_name_or_path="tuned", snapshot_steps=2, **LORA)
    run = CliRunner()

    def call(*words):
        result = run.invoke(app, ["--home", str(lab.home), "--json", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    cpu = ("use_cpu=true", "num_threads=1")
    compared = call(
        "compare", "sft", "dpo@v1#2", "dpo", "--judge", "scored@v2", "--allow-mismatch", "exact=false", *cpu
    )
    assert compared["reference"] == "tuned@v1"
    assert call("evaluate", "dpo", "--reward-model", "scored@v1", *cpu)["model"] == "dpo@v1"
    assert call("evaluate", "scored@v1", *cpu)
    assert call("generate", "dpo", "--max-prompts", "2", *cpu)
    assert call("exact", "dpo", "--reward", "scored@v2", "max_new_tokens=2", *cpu)
    lab.run("collect", policy="tuned", judge="scored@v2", num=8)
    assert call("models", "show", "dpo")["adapter"]["r"] == 4
    assert call("models", "lineage", "dpo") and call("models", "verify")["ok"]
    assert call("models", "export", "dpo", str(tmp_path / "merged"), "--merge")["share"] < 0.01
    assert call("models", "export", "dpo", str(tmp_path / "adapter"))
    assert call("evaluate", str(tmp_path / "adapter"), *cpu)


def test_a_dry_run_counts_the_adapter_and_the_shared_base(scored):
    """By hand: LoRA of 256 on q and v, the score head 16; AdamW needs 4 words of 4 bytes for a trained weight."""

    def estimated(stage, **changes):
        config = scored.config(stage, **LORA, **changes)
        trained = estimate_stage(config, scored.home)["trained_parameters"]
        return trained, training_memory(1000, trained, config) // 4

    assert estimated("sft") == estimated("dpo") == (256, 1000 + 4 * 256)
    assert estimated("train-rm") == (272, 1000 + 4 * 272)
    # actor with reference, and critic with reward model; or all on one
    assert estimated("ppo", reward_model_path="scored@v1") == (256, 2 * 1000 + 2 * 4 * 256)
    assert estimated("ppo", reward_model_path="scored@v1", shared_base=True) == (256, 1000 + 2 * 4 * 256)
    two = {"reward_functions": ["scored@v1", {"source": "scored@v1", "weight": 0.5}], "reward_model_path": None}
    assert estimated("ppo", **two) == (256, 3 * 1000 + 2 * 4 * 256)
    # in bf16 the weights have 2 bytes; the adapter, its gradient and AdamW's averages keep their 4
    assert estimated("dpo", dtype="bfloat16") == (256, 1000 // 2 + 4 * 256)
    with pytest.raises(MismatchError, match="whole weights"):
        estimated("ppo", shared_base=True)
    with pytest.raises(ConfigError, match="lora_target_modules"):
        estimated("dpo", lora_target_modules=["nothing"])


@pytest.mark.parametrize("start", ["sft", "tuned"])
def test_in_bf16_the_adapter_is_fp32_and_starts_at_the_parent(on_adapter, start):
    """A merged parent would be rounded to 8 bits; a stacked one is not."""
    result = on_adapter.run("dpo", model_name_or_path=start, dtype="bfloat16", **LORA)
    assert on_adapter.rows(result.run)[0]["rewards/margins"] == 0.0
    assert {tensor.dtype for tensor in on_adapter.weights(result.model).values()} == {torch.float32}
    first = on_adapter.rows(on_adapter.run("ppo", model_name_or_path=start, dtype="bfloat16", **LORA).run)[0]
    assert first["first_minibatch/ratio_error"] == first["objective/kl"] == 0.0
