"""`rollout_engine: vllm` against a stand-in: weights that arrive, seeds, stop tokens, resuming, what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_pipeline.errors import ConfigError, RunFailed
from rlhf_pipeline.models.loading import load_causal_lm
from rlhf_pipeline.rollout.vllm_engine import VllmEngine, response_of
from tests import fake_vllm
from tests.conftest import DEFAULTS, stopped_before
from tests.models.test_handover import tiny_model

VLLM = {"rollout_engine": "vllm", "max_steps": 2}


@pytest.fixture
def fake(monkeypatch):
    """The stand-in as the module vllm; returns its LLM."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    return fake_vllm.LLM


@pytest.fixture
def stuck(monkeypatch):
    """Let only the weights of the first update arrive."""
    load, done = VllmEngine.load_weights, []

    def first_only(self, policy):
        if not done:
            load(self, policy)
        done.append(1)

    monkeypatch.setattr(VllmEngine, "load_weights", first_only)


def differences(lab, result):
    return [row["sampler/logprob_difference"] for row in lab.rows(result.run)]


@pytest.mark.check
def test_the_engine_samples_with_the_weights_of_each_update(lab, fake):
    """What the stand-in says of its tokens agrees with the training forward only if the weights have reached it."""
    result = lab.run("ppo", **VLLM, num_ppo_epochs=4)
    (engine,) = fake.made
    assert engine.synced == 2
    assert max(differences(lab, result)) <= 1e-5
    start, end = lab.weights("sft"), lab.weights(result.model)
    assert max((end[name] - start[name]).abs().max().item() for name in start) > 1e-2
    assert all(row["sampler/truncated"] == 0 for row in lab.rows(result.run))


@pytest.mark.check
def test_the_engine_samples_several_responses_to_each_prompt(lab, fake):
    """What the stand-in says of its tokens is put beside the right response."""
    result = lab.run("ppo", **VLLM, num_generations=4, num_ppo_epochs=4)
    assert max(differences(lab, result)) <= 1e-5
    assert [row["episodes"] for row in lab.rows(result.run)] == [16, 32]


@pytest.mark.check
def test_weights_that_do_not_arrive_are_seen(lab, fake, stuck):
    result = lab.run("ppo", **VLLM, num_ppo_epochs=4)
    first, second = differences(lab, result)
    assert first <= 1e-5 and second > 1e-2


@pytest.mark.check
def test_stale_weights_are_named_by_the_health_watch(lab, fake, stuck):
    result = lab.run("ppo", **{**VLLM, "max_steps": 4})
    assert "sampler_off" in [found["cause"] for found in result.metrics["health"]]


def test_what_the_engine_is_asked_for(lab, fake):
    lab.run("ppo", **VLLM, temperature=0.7, vllm_gpu_memory_utilization=0.4)
    (engine,) = fake.made
    assert engine.options == {"dtype": "float32", "memory": 0.4, "max_model_len": 10}
    assert len(engine.asked) == 32
    assert {parameters.temperature for _, parameters in engine.asked} == {0.7}
    assert {parameters.max_tokens for _, parameters in engine.asked} == {4}
    assert len({parameters.seed for _, parameters in engine.asked}) == 32
    assert all(0 <= parameters.seed < 2**62 for _, parameters in engine.asked)


def test_at_another_temperature_the_engine_and_the_model_agree(lab, fake):
    assert max(differences(lab, lab.run("ppo", **VLLM, temperature=0.7))) <= 1e-5


@pytest.mark.check
def test_seeds_depend_on_the_runs_seed_and_on_nothing_else(lab, fake):
    for name, changes in (("a", {}), ("b", {"learning_rate": 1e-3}), ("c", {"seed": 1})):
        lab.run("ppo", **VLLM, output_name=name, **changes)
    a, b, c = ([parameters.seed for _, parameters in engine.asked] for engine in fake.made)
    assert a == b
    assert not set(a) & set(c)


def test_another_stop_token_ends_responses_too(lab, fake):
    from rlhf_pipeline.data.world import EOS_ID, encode

    result = lab.run("ppo", **VLLM, stop_token="and")
    (engine,) = fake.made
    assert {tuple(parameters.stop_token_ids) for _, parameters in engine.asked} == {(*encode("and"), EOS_ID)}
    assert all(parameters.ignore_eos for _, parameters in engine.asked)
    assert max(differences(lab, result)) <= 1e-5


@pytest.mark.check
def test_rollouts_are_of_the_same_kind_as_native_ones(lab, fake):
    """64 responses each of the first update, where both sample the SFT model."""
    settings = {"max_steps": 1, "rollout_batch_size": 64, "per_device_train_batch_size": 32}
    rows = [
        lab.rows(lab.run("ppo", output_name=name, **settings, **changes).run)[0]
        for name, changes in (("a", {"rollout_engine": "vllm"}), ("b", {}))
    ]
    ours, native = rows
    assert ours["objective/kl"] == native["objective/kl"] == 0
    assert set(ours) - set(native) == {"sampler/logprob_difference", "sampler/truncated"}
    assert set(native) <= set(ours)
    # Four standard errors of a difference: .5 sqrt(2 / 64) of a share, and of scores by their spread.
    assert abs(ours["val/ended"] - native["val/ended"]) < 4 * 0.5 * (2 / 64) ** 0.5
    spread = max(ours["objective/scores_std"], native["objective/scores_std"])
    assert abs(ours["objective/scores"] - native["objective/scores"]) < 4 * spread * (2 / 64) ** 0.5


@pytest.mark.check
def test_a_resumed_run_is_bit_equal_to_a_whole_one(lab, fake, tmp_path):
    settings = {**VLLM, "max_steps": 4, "save_steps": 2}
    other = lab.copy(tmp_path / "other")
    whole = lab.run("ppo", **settings)
    with stopped_before(3):
        other.run("ppo", **settings)
    resumed = other.run("ppo", **settings)
    ours, theirs = lab.weights(whole.model), other.weights(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert lab.rows(whole.run) == other.rows(resumed.run)


@pytest.mark.check
def test_a_sampler_that_is_off_moves_the_weights_and_the_model(lab, fake):
    """Log-probabilities that are 1 too low: every weight is e, or the cap where that is less."""

    def lower(output):
        changed = [
            {token: SimpleNamespace(logprob=at.logprob - 1) for token, at in row.items()} for row in output.logprobs
        ]
        return SimpleNamespace(**{**vars(output), "logprobs": changed})

    one_step = {"num_ppo_epochs": 1, "num_mini_batches": 1, "per_device_train_batch_size": 16, "max_steps": 1}
    plain = lab.rows(lab.run("ppo", output_name="a", **{**VLLM, **one_step}).run)[0]
    fake.answer = staticmethod(lower)
    rows = {
        cap: lab.rows(lab.run("ppo", output_name=f"cap-{cap}", importance_weight_cap=cap, **{**VLLM, **one_step}).run)[
            0
        ]
        for cap in (2.0, 8.0)
    }
    for row in rows.values():
        assert row["sampler/logprob_difference"] == pytest.approx(1, abs=1e-5)
        assert row["objective/kl"] == plain["objective/kl"] == 0
    assert (rows[2.0]["sampler/truncated"], rows[8.0]["sampler/truncated"]) == (1, 0)
    # One batch at ratio 1: the loss is the sum of -A w over the tokens; w is the same for all of them.
    factor = {2.0: 2.0, 8.0: 2.718281828}
    for cap, row in rows.items():
        assert row["loss/policy_avg"] == pytest.approx(factor[cap] * plain["loss/policy_avg"], rel=1e-4, abs=1e-6)
        assert row["loss/value_avg"] == plain["loss/value_avg"]


def test_one_process_and_nothing_of_vllms_on_stdout(lab, fake, capsys):
    lab.run("ppo", **VLLM)
    captured = capsys.readouterr()
    assert "vLLM prints" not in captured.out and "vLLM prints" in captured.err
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def output(ids, reason="length", logprobs=None):
    at = [{token: SimpleNamespace(logprob=-0.5)} for token in ids]
    return SimpleNamespace(token_ids=ids, finish_reason=reason, logprobs=at if logprobs is None else logprobs)


@pytest.mark.parametrize(
    ("ids", "reason", "ended"),
    [
        ([3, 4, 0], "stop", True),
        ([0], "stop", True),
        ([3, 4, 5, 6], "length", False),
        ([3, 4, 5, 0], "stop", True),
        ([3, 4, 9], "stop", True),
        ([3, 4, 5, 0], "length", True),  # versions up to 0.9 looked at the length first
    ],
)
def test_a_response_ends_in_its_stop_token(ids, reason, ended):
    found = response_of(output(ids, reason), [0, 9], 4)
    assert (found.ids, found.ended, found.logprobs) == (ids, ended, [-0.5] * len(ids))


@pytest.mark.parametrize(
    ("ids", "reason"),
    [
        ([3, 4], "stop"),  # the stop token was taken off
        ([3, 4], "length"),
        ([], "stop"),
        ([3, 0, 4, 5], "length"),  # went on after it
        ([3, 4, 5, 6, 7], "length"),
        ([3, 4, 5, 6], "abort"),
    ],
)
def test_a_response_that_cannot_be_is_refused(ids, reason):
    with pytest.raises(RunFailed, match="rollout_engine vllm: found a response of"):
        response_of(output(ids, reason), [0], 4)


def test_missing_log_probabilities_are_refused():
    with pytest.raises(RunFailed, match="expected 2 log-probabilities, found 1"):
        response_of(output([3, 0], "stop", [{3: SimpleNamespace(logprob=-1.0)}]), [0], 4)
    with pytest.raises(RunFailed, match="found none"):
        response_of(SimpleNamespace(token_ids=[0], finish_reason="stop", logprobs=None), [0], 4)


def test_a_vllm_that_does_not_start_ends_the_run_in_a_line(lab, fake, monkeypatch):
    def broken(*args, **options):
        raise ValueError("Free memory on device is less than desired\nmore of it")

    monkeypatch.setattr(sys.modules["vllm"], "LLM", broken)
    with pytest.raises(RunFailed, match=r"starting 0.0.fake: ValueError: Free .* desired; lower vllm_gpu"):
        lab.run("ppo", **VLLM)


def test_a_vllm_that_cannot_take_the_weights_ends_the_run_in_a_line(lab, fake, monkeypatch):
    def refuse(self, weights):
        raise KeyError("model.layers.0.mlp.experts")

    monkeypatch.setattr(fake_vllm.Model, "load", refuse)
    with pytest.raises(RunFailed, match="loading the policy's weights: KeyError"):
        lab.run("ppo", **VLLM)


def test_the_process_is_given_back_as_it_was(lab, fake, monkeypatch):
    """vLLM seeds the generators, replaces torch.set_num_threads and changes LD_PRELOAD."""
    import random

    import numpy as np

    def moved(seed):
        monkeypatch.setenv("LD_PRELOAD", "of vllm")
        take_over(seed)

    take_over = fake.take_over
    monkeypatch.setattr(fake, "take_over", staticmethod(moved))
    monkeypatch.setenv("LD_PRELOAD", "ours")
    folder = lab.registry.resolve("sft").path
    policy = SimpleNamespace(language_model=load_causal_lm(folder))

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    torch.manual_seed(5)
    before, set_threads = state(), torch.set_num_threads
    engine = VllmEngine(policy, str(folder), dtype="float32", max_length=10, memory=0.3, seed=0)
    engine.load_weights(policy)
    engine.generate([[5]], samples=1, response_length=2, stop_ids=[1], generator=torch.Generator().manual_seed(1))
    assert state() == before
    assert torch.set_num_threads is set_threads and torch.get_num_threads() == 1
    assert os.environ["LD_PRELOAD"] == "ours"
    engine.close()
    assert fake.made[0].closed == 1


@pytest.mark.check
@pytest.mark.parametrize("fails", [False, True])
def test_the_engine_ends_with_the_run(lab, fake, fails):
    if fails:
        fake.answer = staticmethod(lambda output: SimpleNamespace(**{**vars(output), "logprobs": None}))
    with pytest.raises(RunFailed) if fails else contextlib.nullcontext():
        lab.run("ppo", **VLLM)
    assert [engine.closed for engine in fake.made] == [1]


def published(folder, model):
    from rlhf_pipeline.data import world

    model.save_pretrained(folder)
    world.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.check
@pytest.mark.parametrize("start", ["tied", "fewer rows"])
def test_a_tied_head_and_an_extended_embedding(lab, fake, tmp_path, start):
    """A tied head computes with a packed copy; an embedding with fewer rows than tokens is extended in memory."""
    from rlhf_pipeline.data import world

    count = len(world.tokenizer())
    model = tiny_model("llama", tie_word_embeddings=start == "tied", vocab_size=count - (start != "tied"))
    folder = published(tmp_path / "model", model)
    result = lab.run(
        "ppo",
        **VLLM,
        model_name_or_path=folder,
        reward_model_path=None,
        num_ppo_epochs=4,
        reward_functions=[{"source": "world"}],
    )
    assert max(differences(lab, result)) <= 1e-5


@pytest.mark.check
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"], ["lm_head", "q_proj"]])
def test_a_policy_of_adapters(lab, fake, targets):
    """The engine samples from base + adapter: a first run trains one on whole weights, a second on that adapter."""
    lora = {"use_peft": True, "lora_r": 2, "lora_target_modules": targets, "learning_rate": 5e-2, "num_ppo_epochs": 4}
    first = lab.run("ppo", **VLLM, **lora)
    second = lab.run("ppo", **VLLM, **lora, model_name_or_path="ppo", output_name="second")
    third = lab.run("ppo", **VLLM, model_name_or_path="second", output_name="third")
    for result in (first, second, third):  # adapters that large weights round more
        assert max(differences(lab, result)) <= 1e-4
    moved = lab.rows(second.run)[-1]
    assert abs(moved["objective/kl"]) > 1e-4


@pytest.mark.check
@pytest.mark.parametrize(
    ("model_type", "changes", "on_cpu", "refused"),
    [
        ("llama", {}, False, None),
        ("llama", {}, True, "heads of width 8"),
        ("llama", {"hidden_size": 64, "head_dim": 32}, True, None),
        ("gpt2", {"n_embd": 128}, True, None),
        ("gpt2", {"n_embd": 100}, True, "heads of width 50"),
        ("mixtral", {"num_local_experts": 2}, False, "mixture of experts"),
        ("qwen3_moe", {"num_experts": 2}, False, "mixture of experts"),
        ("gpt_neox", {"hidden_size": 64}, True, None),
    ],
)
def test_what_the_engine_cannot_take_over_is_refused_by_the_dry_run(
    lab, fake, tmp_path, monkeypatch, model_type, changes, on_cpu, refused
):
    from rlhf_pipeline.experiment.estimate import estimate_stage

    monkeypatch.setattr("rlhf_pipeline.models.handover.vllm_on_cpu", lambda: on_cpu)
    folder = published(tmp_path / "model", tiny_model(model_type, **changes))
    config = lab.config("ppo", **VLLM, model_name_or_path=folder)
    with pytest.raises(ConfigError, match=refused) if refused else contextlib.nullcontext():
        estimate_stage(config, lab.home)
    if refused:
        with pytest.raises(ConfigError, match=refused):
            lab.run("ppo", **VLLM, model_name_or_path=folder)


def test_several_processes_are_refused(lab, fake):
    from rlhf_pipeline.stages.ppo_models import check_processes

    with pytest.raises(ConfigError, match="rollout_engine: found 'vllm' on 2 processes; expected one process"):
        check_processes(lab.config("ppo", **VLLM), 2)


def cli(lab, tmp_path, *words: str, **changes) -> int:
    from rlhf_pipeline.cli.main import main

    values = {key: value for key, value in {**DEFAULTS["ppo"], **changes}.items() if value is not None}
    path = tmp_path / "ppo.yaml"
    path.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in values.items()))
    return main(["ppo", "--config", str(path), "--home", str(lab.home), *words])


@pytest.mark.check
def test_by_the_command_line(lab, fake, tmp_path, capsys):
    assert cli(lab, tmp_path, "--json", **VLLM) == 0
    result = json.loads(capsys.readouterr().out)
    rows = lab.rows(result["run"])
    assert len(rows) == 2 and max(row["sampler/logprob_difference"] for row in rows) <= 1e-5
    assert result["metrics"]["train"]["sampler/truncated"] == 0
    log = (Path(result["run"]) / "log.txt").read_text()
    assert "rollouts by vllm 0.0.fake in torch.float32, importance weights up to 2" in log


def test_without_vllm_the_command_line_says_what_is_missing(lab, tmp_path, capsys, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "vllm" else found(name, *rest))
    assert cli(lab, tmp_path, **VLLM) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    assert "rollout_engine: found 'vllm', but there is no package vllm in this environment" in captured.err
    assert "pip install 'vllm>=0.27,<0.31'" in captured.err
    # An empty folder is no run: other tests leave one in the home that this is a copy of.
    assert not list(lab.home.glob("runs/*"))


def test_responses_come_in_the_order_of_the_prompts(lab, fake):
    folder = lab.registry.resolve("sft").path
    policy = SimpleNamespace(language_model=load_causal_lm(folder))
    engine = VllmEngine(policy, str(folder), dtype="float32", max_length=10, memory=0.3, seed=0)
    engine.load_weights(policy)
    options = {"samples": 2, "response_length": 4, "stop_ids": [1]}
    prompts = [[5, 6, 7], [8, 9]]

    def draw(seed):
        return engine.generate(prompts, generator=torch.Generator().manual_seed(seed), **options)

    once = draw(0)
    assert [ids for ids, _ in fake.made[0].asked] == [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]]
    assert len(once) == 4
    assert draw(0) == once != draw(1)
    del fake.made[0].asked[:]
    options["tokens"] = 5
    assert all(token < 5 for response in draw(0) for token in response.ids)
    assert len({id(parameters.allowed_token_ids) for _, parameters in fake.made[0].asked}) == 1
