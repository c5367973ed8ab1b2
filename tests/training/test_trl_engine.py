"""What `engine: trl` leaves behind, logs, counts and refuses."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_pipeline.errors import BadInput, Interrupted, RunFailed
from rlhf_pipeline.models.modules import assert_independent
from rlhf_pipeline.stages import dpo as dpo_stage
from rlhf_pipeline.stages import reward as reward_stage
from rlhf_pipeline.stages import sft as sft_stage
from rlhf_pipeline.stages.common import tokenizer_of
from rlhf_pipeline.training.trl_engine import train as engine

pytestmark = pytest.mark.check

STAGES = {"sft": sft_stage, "train-rm": reward_stage, "dpo": dpo_stage}
IDS = torch.tensor([[2, 15, 3, 4, 6, 5]])


@pytest.fixture
def any_precision():
    """Accelerate keeps the precision of a process's first run."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def trained(lab, pairs, monkeypatch):
    """Run a stage on TRL's trainer and return the model in memory, with the frozen reference if there is one."""

    def run(stage, **changes):
        module, kept = STAGES[stage], {}
        publish = module.publish
        load_policy, load_both = (getattr(module, f"load_policy{both}", None) for both in ("", "_and_reference"))

        def keep(run, plan, **options):
            kept["model"] = plan.model
            return publish(run, plan, **options)

        def load(*args, frozen=False, **options):
            policy = load_policy(*args, frozen=frozen, **options)
            kept["frozen" if frozen else "policy"] = policy
            return policy

        def load_two(*args, **options):
            kept["policy"], kept["frozen"] = load_both(*args, **options)
            return kept["policy"], kept["frozen"]

        with monkeypatch.context() as patch:
            patch.setattr(module, "publish", keep)
            if load_both is not None:
                patch.setattr(module, "load_policy_and_reference", load_two)
            else:
                patch.setattr(module, "load_policy", load)
            changes = {"dataset_train_split": "all", "dataset_test_split": "all", "max_steps": 3, **changes}
            result = lab.run(stage, engine="trl", dataset_name=pairs(), **changes)
        return kept, result

    return run


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.clone()


@torch.no_grad()
def shake(model):
    for parameter in model.parameters():
        parameter += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))


def bound_elsewhere(model):
    """Modules with a `forward` of their own instance."""
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_copy_of_the_trained_model_computes_with_its_own_weights(any_precision, trained, stage, precision):
    kept, _ = trained(stage, **precision)
    model = kept["model"]
    clone = copy.deepcopy(model)
    before = logits(model)
    torch.testing.assert_close(logits(clone), before, rtol=0, atol=0)
    shake(clone)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    shaken = logits(clone)
    assert float((shaken - before).abs().max()) > 0.1
    shake(model)
    torch.testing.assert_close(logits(clone), shaken, rtol=0, atol=0)
    assert_independent(model, clone)
    assert not bound_elsewhere(model)


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_without_the_guard_it_would_compute_with_the_originals(trained, monkeypatch, stage):
    """TRL's fused head keeps the original's forward in a closure, which a deep copy shares."""
    monkeypatch.setattr(engine, "untouched", lambda *models: contextlib.nullcontext())
    model = trained(stage)[0]["model"]
    assert bound_elsewhere(model)
    clone = copy.deepcopy(model)
    before = logits(model)
    shake(clone)
    torch.testing.assert_close(logits(clone), before, rtol=0, atol=0)


def test_without_the_guard_autocast_would_stay(any_precision, trained, monkeypatch):
    monkeypatch.setattr(engine, "untouched", lambda *models: contextlib.nullcontext())
    assert bound_elsewhere(trained("train-rm", bf16=True)[0]["model"])


@pytest.mark.parametrize("stage", STAGES)
def test_nothing_but_weights_is_different_afterwards(lab, trained, monkeypatch, stage):
    module, seen = STAGES[stage], {}
    make_trainer, train_with_trl = engine.make_trainer, module.train_with_trl

    def parts(model):
        modules = {
            name: (set(vars(part)), part.training, {k: list(v) for k, v in vars(part).items() if k.endswith("_hooks")})
            for name, part in model.named_modules()
        }
        generation = getattr(model, "generation_config", None)
        checkpointing = [getattr(part, "gradient_checkpointing", False) for part in model.modules()]
        return modules, model.config.to_dict(), generation and generation.to_dict(), checkpointing

    def made(run, total, *, model, **options):
        trainer = make_trainer(run, total, model=model, **options)
        model.register_forward_hook(lambda *_: None)  # what a trainer might forget
        seen["during"] = parts(model)
        return trainer

    def trains(run, plan, *, reference=None, **options):
        options |= {"reference": reference} if reference is not None else {}
        models = [part for part in (plan.model, reference) if part is not None]
        before = [parts(part) for part in models]
        last = train_with_trl(run, plan, **options)
        assert seen["during"] != before[0]
        assert [parts(part) for part in models] == before
        seen["models"] = models
        return last

    monkeypatch.setattr(engine, "make_trainer", made)
    monkeypatch.setattr(module, "train_with_trl", trains)
    _, result = trained(stage)
    assert not any(bound_elsewhere(model) for model in seen["models"])
    native = lab.run(stage, dataset_train_split="all", max_steps=3)
    ours, theirs = (json.loads((Path(r.path) / "config.json").read_text()) for r in (native, result))
    assert {**ours, "reward_shift": 0} == {**theirs, "reward_shift": 0}


def test_the_reference_stays_what_it_was(lab, trained):
    for precompute in (True, False):
        kept, _ = trained("dpo", precompute_ref_log_probs=precompute)
        policy, frozen = kept["policy"], kept["frozen"]
        assert not bound_elsewhere(frozen)
        assert_independent(policy, frozen)
        assert not any(parameter.requires_grad for parameter in frozen.parameters())
        stored = lab.weights("sft")
        assert all(torch.equal(value, stored[name]) for name, value in frozen.model.named_parameters())


def test_a_native_run_afterwards_is_bit_equal_to_one_before(lab, pairs, trained, monkeypatch):
    """Also after a run of TRL's that broke off between the micro-batches of a step."""
    options = {"dataset_name": pairs(), "dataset_train_split": "all", "gradient_accumulation_steps": 2}
    before = lab.run("sft", output_name="before", **options)
    environment = dict(os.environ)

    def break_off(self, *args, **options):
        assert not self.accelerator.gradient_state.sync_gradients
        raise KeyError("in the first micro-batch")

    trained("sft", gradient_accumulation_steps=2)
    with monkeypatch.context() as patch:
        patch.setattr("trl.SFTTrainer.compute_loss", break_off)
        with pytest.raises(KeyError):
            trained("sft", gradient_accumulation_steps=2, output_name="broken")
    assert dict(os.environ) == environment
    after = lab.run("sft", output_name="after", **options)
    assert lab.rows(before.run) == lab.rows(after.run)
    ours, again = (lab.weights(result.model) for result in (before, after))
    assert all(torch.equal(ours[name], again[name]) for name in ours)


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_registered(lab, trained, stage):
    import trl

    _, result = trained(stage)
    manifest = lab.registry.resolve(result.model).manifest
    assert manifest.config["engine"] == "trl"
    assert manifest.environment["trl"] == trl.__version__
    assert manifest.tokenizer_digest == lab.registry.resolve("sft").manifest.tokenizer_digest
    assert manifest.cost["optimizer_steps"] == 3
    assert trl.__version__ in (Path(result.run) / "log.txt").read_text()
    names = {path.name for path in Path(result.run).iterdir() if not path.name.startswith(".")}
    sampled = {"centering.json"} if manifest.stage == "reward" else set()
    assert names == {"config.yaml", "log.txt", "metrics.jsonl", "run.json"} | sampled


def test_the_bill_by_hand(lab, pairs):
    """Tokens and FLOPs of one step on two pairs: every response with its prompt, as TRL computes them."""
    rows = [
        {"prompt": "the plot", "chosen": " great", "rejected": " very dull"},  # 2 + 2 and 2 + 3 with the end token
        {"prompt": "this acting was", "chosen": " fine and slow", "rejected": " slow"},  # 3 + 4 and 3 + 2
    ]
    source = pairs(rows=rows)
    lengths, responses = [4, 5, 7, 5], 2 + 3 + 4 + 2
    tokens, context = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
    # One Llama layer of width 16: q, k, v, o and three of 16 x 32 in the feed-forward; the vocabulary has 32 words.
    matmul, attention, head = 4 * 16 * 16 + 3 * 16 * 32, 16, 16 * len(tokenizer_of(lab.registry.resolve("sft")))
    trunk = 2 * matmul * tokens + 4 * attention * context
    options = {"engine": "trl", "dataset_name": source, "dataset_train_split": "all", "max_steps": 1}
    reward = lab.run("train-rm", reward_centering="none", **options).cost
    assert (reward["tokens_trained"], reward["flops"]) == (tokens, 3 * trunk)
    for precompute in (True, False):  # one pass of the reference either way
        cost = lab.run("dpo", precompute_ref_log_probs=precompute, **options).cost
        assert (cost["tokens_trained"], cost["flops"]) == (tokens, 4 * (trunk + 2 * head * responses))
    ours, theirs = (lab.run("sft", **{**options, "engine": name}).cost for name in ("native", "trl"))
    assert all(ours[name] == theirs[name] > 0 for name in ("tokens_trained", "optimizer_steps"))
    # Ours: q, o and the feed-forward of the last layer at the 2 + 4 tokens that predict one, not at all 4 + 7.
    assert theirs["flops"] - ours["flops"] == 3 * 2 * (2 * 16 * 16 + 3 * 16 * 32) * (11 - 6)


def test_a_signal_ends_the_run_and_the_next_one_begins_anew(lab, pairs, monkeypatch):
    options = {"dataset_name": pairs(), "dataset_train_split": "all", "max_steps": 5, "eval_steps": 2, "engine": "trl"}
    whole = lab.run("sft", output_name="whole", **options)
    mean_nll = sft_stage.mean_nll

    def terminate(*args, **changes):
        os.kill(os.getpid(), signal.SIGTERM)
        return mean_nll(*args, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(sft_stage, "mean_nll", terminate)
        with pytest.raises(Interrupted, match="step 2 of 5; engine trl keeps no checkpoint"):
            lab.run("sft", **options)
    (broken,) = {path for path in (lab.home / "runs").iterdir() if path.name.startswith("tuned-")}
    assert [row["step"] for row in lab.rows(broken)] == [1, 2, 2]
    signals = iter([terminate])
    with monkeypatch.context() as patch:  # after the last step the model is registered first
        patch.setattr(sft_stage, "mean_nll", lambda *args, **changes: next(signals, mean_nll)(*args, **changes))
        ended = lab.run("sft", output_name="ended", **{**options, "eval_steps": 5})
    assert ended.stopped_by == signal.SIGTERM and lab.registry.models.numbers("ended") == [1]
    again = lab.run("sft", **options)
    assert Path(again.run) == broken
    assert lab.rows(again.run) == lab.rows(whole.run)
    assert again.cost["optimizer_steps"] == 5
    assert "starts again from the beginning" in (broken / "log.txt").read_text()


def test_a_loss_that_is_not_finite_stops_before_the_step(lab, pairs, monkeypatch):
    from trl import SFTTrainer

    compute_loss, seen = SFTTrainer.compute_loss, []

    def spoilt(self, model, inputs, *args, **options):
        seen.append(model.get_input_embeddings().weight.detach().clone())
        self.spoilt = model
        return compute_loss(self, model, inputs, *args, **options) * (float("nan") if len(seen) == 2 else 1.0)

    monkeypatch.setattr(SFTTrainer, "compute_loss", spoilt)
    with pytest.raises(RunFailed, match="update 2: the loss or the gradient is not finite"):
        lab.run("sft", engine="trl", dataset_name=pairs(), dataset_train_split="all")
    (run,) = (lab.home / "runs").iterdir()
    assert [row["step"] for row in lab.rows(run)] == [1]


def test_nothing_is_sent_or_written_by_the_trainer(trained, monkeypatch):
    from trl.trainer import base_trainer

    def forbidden(*_, **__):
        raise AssertionError("called")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(base_trainer, "send_telemetry", forbidden)
    monkeypatch.setattr(base_trainer._BaseTrainer, "create_model_card", forbidden)
    monkeypatch.setattr("transformers.Trainer.save_model", forbidden)
    trained("sft")


def test_responses_that_end_in_the_padding_token_are_named(lab, pairs):
    """The sequence classifiers of transformers skip a final PAD, which a policy may sample."""
    rows = [
        {"prompt": "the plot", "chosen": " great <pad>", "rejected": " dull", "chosen_ended": False},
        {"prompt": "the music", "chosen": " fine", "rejected": " slow"},
    ]
    options = {"dataset_name": pairs(rows=rows), "dataset_train_split": "all", "max_steps": 1}
    native, theirs = (lab.run("train-rm", engine=name, **options) for name in ("native", "trl"))
    assert "1 of 4 responses end in the padding token" in (Path(theirs.run) / "log.txt").read_text()
    assert "padding" not in (Path(native.run) / "log.txt").read_text()
    ours, other = (lab.rows(result.run)[0] for result in (native, theirs))
    assert abs(ours["chosen_score"] - other["chosen_score"]) > 1e-3
    assert ours["rejected_score"] == pytest.approx(other["rejected_score"], abs=1e-5)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_are_refused(count):
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=count), device=torch.device("cpu"))
    with pytest.raises(BadInput, match=f"engine: found trl in {count} processes, expected one"):
        engine._require_one_device(run)


def test_several_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    run = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1), device=torch.device("cuda"))
    with pytest.raises(BadInput, match="CUDA_VISIBLE_DEVICES"):
        engine._require_one_device(run)
