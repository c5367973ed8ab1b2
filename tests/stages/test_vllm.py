"""`rollout_engine: vllm` against a stand-in: weights that arrive, seeds, stop tokens, resuming, what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rlhf_pipeline.errors import ConfigError, RunFailed
from rlhf_pipeline.rollout.vllm_engine import VllmEngine, actor_weights, response_of
from tests import fake_vllm
from tests.conftest import DEFAULTS

VLLM = {"rollout_engine": "vllm", "use_cpu": False, "max_steps": 2}


@pytest.fixture
def fake(monkeypatch):
    """The stand-in as the module vllm; returns its LLM."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    return fake_vllm.LLM


def differences(lab, result):
    return [row["sampler/logprob_difference"] for row in lab.rows(result.run)]


def test_the_engine_samples_with_the_weights_of_each_update(lab, fake):
    """The stand-in begins with the weights of the folder: what it says of its tokens agrees with the training forward
    after an update only if the update's weights have reached it."""
    result = lab.run("ppo", **VLLM, num_ppo_epochs=4)
    (engine,) = fake.made
    assert engine.synced == 2
    assert max(differences(lab, result)) <= 1e-5
    start, end = lab.weights("sft"), lab.weights(result.model)
    assert max((end[name] - start[name]).abs().max().item() for name in start) > 1e-2
    assert all(row["sampler/truncated"] == 0 for row in lab.rows(result.run))


def test_weights_that_do_not_arrive_are_seen(lab, fake, monkeypatch):
    monkeypatch.setattr(VllmEngine, "load_weights", lambda self, policy: None)
    result = lab.run("ppo", **VLLM, num_ppo_epochs=4)
    first, second = differences(lab, result)
    assert first <= 1e-5 and second > 1e-2


def test_stale_weights_are_named_by_the_health_watch(lab, fake, monkeypatch):
    monkeypatch.setattr(VllmEngine, "load_weights", lambda self, policy: None)
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


def test_rollouts_are_of_the_same_kind_as_native_ones(lab, fake):
    """64 responses each of the first update, where both sample the SFT model."""
    settings = {"max_steps": 1, "rollout_batch_size": 64, "per_device_train_batch_size": 32}
    rows = [
        lab.rows(lab.run("ppo", output_name=name, **settings, **changes).run)[0]
        for name, changes in (("a", {"rollout_engine": "vllm", "use_cpu": False}), ("b", {}))
    ]
    ours, native = rows
    assert ours["objective/kl"] == native["objective/kl"] == 0
    assert set(ours) - set(native) == {"sampler/logprob_difference", "sampler/truncated"}
    assert set(native) <= set(ours)
    # Four standard errors of a difference: .5 sqrt(2 / 64) of a share, and of scores by their spread.
    assert abs(ours["val/ended"] - native["val/ended"]) < 4 * 0.5 * (2 / 64) ** 0.5
    spread = max(ours["objective/scores_std"], native["objective/scores_std"])
    assert abs(ours["objective/scores"] - native["objective/scores"]) < 4 * spread * (2 / 64) ** 0.5


def test_a_resumed_run_is_bit_equal_to_a_whole_one(lab, fake, tmp_path, monkeypatch):
    from rlhf_pipeline.training import session

    settings = {**VLLM, "max_steps": 4, "save_steps": 2}
    other = lab.copy(tmp_path / "other")
    whole = lab.run("ppo", **settings)
    fit = session.fit

    def dies(*args, on_update, **options):
        def hook(step, *rest):
            if step == 3:
                raise KeyboardInterrupt
            on_update(step, *rest)

        return fit(*args, on_update=hook, **options)

    with monkeypatch.context() as patch:
        patch.setattr(session, "fit", dies)
        with pytest.raises(KeyboardInterrupt):
            other.run("ppo", **settings)
    resumed = other.run("ppo", **settings)
    ours, theirs = lab.weights(whole.model), other.weights(resumed.model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert lab.rows(whole.run) == other.rows(resumed.run)


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


def test_only_the_actors_parameters_are_handed_over_and_tied_ones_once(lab):
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf_pipeline.models.forward import Reader
    from rlhf_pipeline.models.modules import make_actor_critic

    sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **sizes))
    names = [name for name, _ in actor_weights(make_actor_critic(model, Reader(), "sft"))]
    assert "transformer.wte.weight" in names and "lm_head.weight" not in names
    assert len(names) == len(set(names)) == len(list(model.named_parameters()))


def test_one_process_and_nothing_of_vllms_on_stdout(lab, fake, capsys):
    import os

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

    monkeypatch.setattr(fake_vllm.Model, "load_weights", refuse)
    with pytest.raises(RunFailed, match="loading the policy's weights: KeyError"):
        lab.run("ppo", **VLLM)


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
    assert "pip install 'vllm>=0.22,<=0.31'" in captured.err
    # An empty folder is no run: other tests leave one in the home that this is a copy of.
    assert not list(lab.home.glob("runs/*"))


def test_responses_come_in_the_order_of_the_prompts(lab, fake):
    engine = VllmEngine(str(lab.registry.resolve("sft").path), dtype="float32", max_length=10, memory=0.3, seed=0)
    options = {"samples": 2, "response_length": 4, "stop_ids": [1]}
    prompts = [[5, 6, 7], [8, 9]]

    def draw(seed):
        return engine.generate(prompts, generator=torch.Generator().manual_seed(seed), **options)

    once = draw(0)
    assert [ids for ids, _ in fake.made[0].asked] == [[5, 6, 7], [5, 6, 7], [8, 9], [8, 9]]
    assert len(once) == 4
    assert draw(0) == once != draw(1)
