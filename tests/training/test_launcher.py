"""What `accelerate launch` asks for: the environment that accelerate itself makes from its config files, and TRL's."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands import launch
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from rlhf_pipeline.errors import BadInput, ConfigError
from rlhf_pipeline.training import launcher
from rlhf_pipeline.training.accelerator import make_accelerator
from rlhf_pipeline.training.launcher import launched, read_launcher, with_launcher

OURS = Path(__file__).parents[2] / "configs/accelerate"
TRLS = Path(find_spec("trl").submodule_search_locations[0]) / "accelerate_configs"
THIRD = {"fsdp": True, "fsdp_reshard_after_forward": True}
SECOND = {"fsdp": True, "fsdp_reshard_after_forward": False}


def environment(path: Path) -> dict[str, str]:
    """The variables that `accelerate launch --config_file PATH` gives to each process."""
    words = ["--config_file", str(path), "-m", "rlhf_pipeline.cli.main"]
    arguments, *_ = launch._validate_launch_command(launch.launch_command_parser().parse_args(words))
    # As `accelerate launch` itself does it for DeepSpeed, whose package it then asks for.
    arguments.deepspeed_fields_from_accelerate_config = ""
    _, variables = (prepare_deepspeed_cmd_env if arguments.use_deepspeed else _of_several)(arguments)
    return {name: value for name, value in variables.items() if os.environ.get(name) != value}


def _of_several(arguments: Any) -> tuple[None, dict[str, str]]:
    return None, prepare_multi_gpu_env(arguments)


@pytest.fixture
def asking(tmp_path: Path):
    """The variables for a config file with these keys."""

    def variables(**keys: Any) -> dict[str, str]:
        path = tmp_path / "accelerate.yaml"
        common = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2, "machine_rank": 0}
        path.write_text(yaml.safe_dump({**common, "mixed_precision": "no", **keys}))
        return environment(path)

    return variables


@pytest.fixture(autouse=True)
def forgotten():
    launched.cache_clear()
    yield
    launched.cache_clear()


@pytest.mark.parametrize(
    ("path", "keys", "precision"),
    [
        (OURS / "ddp.yaml", {}, None),
        (OURS / "fsdp.yaml", THIRD, None),
        (OURS / "zero2.yaml", SECOND, None),
        (OURS / "zero3.yaml", THIRD, None),
        (TRLS / "multi_gpu.yaml", {}, "bf16"),
        (TRLS / "fsdp1.yaml", THIRD, "bf16"),
        (TRLS / "fsdp2.yaml", THIRD, "bf16"),
        (TRLS / "zero1.yaml", SECOND, "bf16"),
        (TRLS / "zero2.yaml", SECOND, "bf16"),
        (TRLS / "zero3.yaml", THIRD, "bf16"),
    ],
    ids=lambda value: f"{value.parent.name}/{value.name}" if isinstance(value, Path) else "",
)
def test_config_files_of_this_package_and_of_trl(path, keys, precision):
    variables = environment(path)
    found = read_launcher(variables)
    assert found.keys == keys and found.precision == precision
    assert not {*launcher.USES.values(), launcher.PRECISION} & variables.keys()  # accelerate would act on them


FSDP = {"fsdp_version": 1, "fsdp_offload_params": False, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}


@pytest.mark.parametrize(
    ("version", "name", "strategy", "keys"),
    [
        (2, "fsdp_reshard_after_forward", True, THIRD),
        (2, "fsdp_reshard_after_forward", False, SECOND),
        *((1, name, "FULL_SHARD", THIRD) for name in ("fsdp_reshard_after_forward", "fsdp_sharding_strategy")),
        *((1, name, "SHARD_GRAD_OP", SECOND) for name in ("fsdp_reshard_after_forward", "fsdp_sharding_strategy")),
        (1, "fsdp_sharding_strategy", "NO_SHARD", {}),
        (1, "fsdp_sharding_strategy", "2", SECOND),
    ],
)
def test_strategies_of_fsdp(asking, version, name, strategy, keys):
    found = read_launcher(
        asking(distributed_type="FSDP", fsdp_config={**FSDP, "fsdp_version": version, name: strategy})
    )
    assert found.keys == keys
    assert found.said.startswith("fsdp_config of accelerate (")
    assert ("divides no weights: the key fsdp of the stage decides" in found.said) is not bool(keys)
    assert ("carried out by PyTorch's FSDP2 (fsdp: true" in replace(found, processes=2).said) is bool(keys)


BOTH = {**FSDP, "fsdp_reshard_after_forward": "SHARD_GRAD_OP"}
ZERO = {"zero_stage": 3, "offload_optimizer_device": "none", "offload_param_device": "none"}


@pytest.mark.parametrize(("stage", "keys"), [(0, {}), (1, SECOND), (2, SECOND), (3, THIRD)])
def test_stages_of_zero(asking, tmp_path, stage, keys):
    found = read_launcher(asking(distributed_type="DEEPSPEED", deepspeed_config={**ZERO, "zero_stage": stage}))
    assert found.keys == keys and f"ZeRO stage {stage}" in found.said
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage, "offload_param": {"device": "none"}}}))
    named = asking(distributed_type="DEEPSPEED", deepspeed_config={"deepspeed_config_file": str(path)})
    assert read_launcher(dict(named)) == found
    content = json.loads(path.read_text()) | {"bf16": {"enabled": True}, "fp16": {"enabled": "auto"}}
    path.write_text(json.dumps(content))
    assert read_launcher(named) == replace(found, precision="bf16")


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("FSDP", "fsdp_config", {**FSDP, "fsdp_offload_params": True}, "found fsdp_offload_params: true"),
        ("FSDP", "fsdp_config", {**FSDP, "fsdp_activation_checkpointing_offload": True}, "checkpointing_offload: true"),
        ("FSDP", "fsdp_config", {**FSDP, "fsdp_sharding_strategy": "HYBRID_SHARD"}, "the strategy HYBRID_SHARD"),
        ("FSDP", "fsdp_config", {**BOTH, "fsdp_sharding_strategy": "HYBRID_SHARD"}, "the strategy HYBRID_SHARD"),
        ("FSDP", "fsdp_config", {**BOTH, "fsdp_sharding_strategy": "NO_SHARD"}, "SHARD_GRAD_OP and NO_SHARD"),
        (
            "FSDP",
            "fsdp_config",
            {**FSDP, "fsdp_version": 2, "fsdp_reshard_after_forward": "NO"},
            "expected true or false",
        ),
        ("DEEPSPEED", "deepspeed_config", {**ZERO, "offload_optimizer_device": "cpu"}, "offload_optimizer_device: cpu"),
        ("DEEPSPEED", "deepspeed_config", {**ZERO, "offload_param_device": "nvme"}, "offload_param_device: nvme"),
        ("DEEPSPEED", "deepspeed_config", {**ZERO, "zero_stage": 4}, "zero_stage: 4"),
        ("MEGATRON_LM", "megatron_lm_config", {"megatron_lm_tp_degree": 2}, "found megatron_lm_config in"),
    ],
)
def test_what_no_stage_has_is_refused_by_name(asking, monkeypatch, lab, kind, name, content, message):
    variables = asking(distributed_type=kind, **{name: content})
    with pytest.raises(BadInput, match=message) as refused:
        read_launcher(dict(variables))
    assert ", expected " in str(refused.value) and str(refused.value).endswith("; see docs/scaling.md")
    for variable, value in variables.items():
        monkeypatch.setenv(variable, value)
    for _ in range(2):  # it is not forgotten either
        with pytest.raises(BadInput, match=message):
            make_accelerator(lab.config("dpo"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("[1", "Expecting"),
        ("[]", "list"),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}',
            "offload_optimizer.device: cpu",
        ),
        ('{"zero_optimization": {"stage": 2, "cpu_offload": true}}', "cpu_offload: True"),
    ],
)
def test_a_config_file_of_deepspeed_that_is_refused(tmp_path, content, message):
    path = tmp_path / "deepspeed.json"
    if content is not None:
        path.write_text(content)
    variables = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}
    with pytest.raises(BadInput, match=message):
        read_launcher(variables)


def test_the_config_of_a_stage_gets_what_the_launcher_asks_for(asking, lab, monkeypatch):
    for variable, value in asking(distributed_type="DEEPSPEED", deepspeed_config=ZERO, mixed_precision="bf16").items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = lab.config("dpo")
    config, lines = with_launcher(given)
    monkeypatch.delenv("WORLD_SIZE")
    assert config == given.model_copy(update=THIRD)
    assert len(lines) == 2 and "(ZeRO stage 3) is carried out by PyTorch's FSDP2" in lines[0]
    assert lines[1].endswith("has no effect: the key bf16 of the stage decides, and is false")
    assert with_launcher(given) == (config, lines)  # the environment is read once
    assert make_accelerator(config).distributed_type.value == "NO"
    assert with_launcher(config)[0] is config
    assert len(with_launcher(given.model_copy(update={"bf16": True}))[1]) == 1
    with pytest.raises(ConfigError, match=r"optim: found 'muon'.*deepspeed_config of accelerate.*ddp\.yaml"):
        with_launcher(lab.config("dpo", optim="muon"))


@pytest.mark.parametrize("steps", ["4", "auto"])
def test_accumulation_and_compilation_are_those_of_the_stage(asking, lab, monkeypatch, steps):
    """Else accelerate divides every loss by the steps of its own config."""
    content = {**ZERO, "gradient_accumulation_steps": steps}
    for variable, value in asking(distributed_type="DEEPSPEED", deepspeed_config=content).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert os.environ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"] == steps
    accelerator = make_accelerator(lab.config("dpo"))
    assert accelerator.gradient_accumulation_steps == 1
    weight = torch.ones(1, requires_grad=True)
    accelerator.backward(8 * weight.sum())
    assert weight.grad.tolist() == [8.0]
    model = torch.nn.Linear(1, 1)
    assert accelerator.prepare_model(model, evaluation_mode=True) is model


def test_a_launcher_of_one_process_divides_nothing(asking, lab, monkeypatch):
    for variable, value in asking(distributed_type="DEEPSPEED", deepspeed_config=ZERO).items():
        monkeypatch.setenv(variable, value)
    config = lab.config("dpo", optim="muon")
    found, lines = with_launcher(config)
    assert found is config and lines == ["deepspeed_config of accelerate (ZeRO stage 3) has no effect in one process"]


def test_a_file_that_divides_nothing_leaves_the_key_of_the_stage(asking, lab, monkeypatch):
    content = {**ZERO, "zero_stage": 0}
    for variable, value in asking(distributed_type="DEEPSPEED", deepspeed_config=content).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = lab.config("dpo", fsdp=True)
    found, (line,) = with_launcher(config)
    assert found is config and line.endswith("divides no weights: the key fsdp of the stage decides")


def test_activation_checkpointing_is_a_key_of_the_stage(asking, lab, monkeypatch):
    content = {**FSDP, "fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_activation_checkpointing": True}
    for variable, value in asking(distributed_type="FSDP", fsdp_config=content).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "gradient_checkpointing: true" in with_launcher(lab.config("sft"))[1][1]
    assert len(with_launcher(lab.config("sft", gradient_checkpointing=True))[1]) == 1


def test_without_a_launcher_nothing_changes(lab):
    config = lab.config("sft")
    assert with_launcher(config) == (config, []) and with_launcher(config)[0] is config
