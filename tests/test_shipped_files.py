"""What the project ships: every YAML parses, the contract's files are there, the README's commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.experiment import load_experiment
from rlhf_pipeline.config.grid import expand
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.stages import SCHEMAS, STAGES
from rlhf_pipeline.experiment.workers import Job

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "accelerate")
EXPERIMENTS = [path for path in CONFIGS if "\nstages:" in path.read_text()]
STAGE_OF_FILE = {
    "base": "sft",
    "sft": "sft",
    "reward": "train-rm",
    "judge": "train-rm",
    "ppo": "ppo",
    "ppo_true": "ppo",
    "preferred": "sft",
    "dpo": "dpo",
    "pairs": "collect",
    "compare": "compare",
}
FILES = (
    "pyproject.toml",
    "README.md",
    "Makefile",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "constraints.txt",
    ".ci/run",
    "docs/architecture.md",
    "docs/log.md",
)


@pytest.fixture
def beside_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs that name files which the user hands over: empty stand-ins in the working directory."""
    (tmp_path / "build" / "reviews").mkdir(parents=True)
    for name in ("hh.jsonl.gz", *(f"build/reviews/{part}.jsonl" for part in ("reviews", "openings", "openings_one"))):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p not in EXPERIMENTS], ids=lambda p: f"{p.parent.name}/{p.name}"
)
def test_every_stage_config_is_valid(path: Path, beside_data: None) -> None:
    stage = STAGE_OF_FILE[path.stem]
    extra = {"arms": ["ppo", "dpo"], "baseline": "sft"} if stage == "compare" else None
    loaded = load_config(stage, path, extra=extra)
    assert isinstance(loaded.config, SCHEMAS[stage]) and not loaded.notes


@pytest.mark.check
def test_every_config_of_accelerate_is_valid() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    found = {path.stem: load_config_from_file(str(path)) for path in (ROOT / "configs" / "accelerate").iterdir()}
    kinds = {"ddp": "MULTI_GPU", "ddp_nodes": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert {name: config.distributed_type for name, config in found.items()} == kinds
    for name, config in found.items():
        assert (config.num_machines, config.num_processes) == ((2, 16) if name == "ddp_nodes" else (1, 8))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_experiment_is_valid(path: Path, beside_data: None) -> None:
    experiment = load_experiment(path)
    arms = {spec.stage for spec in experiment.stages}
    assert {"sft", "ppo", "dpo"} <= arms
    if path.parent.name != "exact":  # whose arms are set against the optimum, by scripts/exact.py
        assert [arm for arm in experiment.compare.config.arms if arm in ("ppo", "dpo")] == ["ppo", "dpo"]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_a_worker_reads_the_config_that_it_is_given(path: Path, beside_data: None) -> None:
    for node in expand(load_experiment(path)):
        config = node.spec.config
        job = Job(node.spec.stage, config.model_dump(mode="json"), "home", 1, True, "log")
        read = Job.read(job.line())
        found = STAGES[read.stage].model_validate(read.config)
        assert (read, found) == (job, config) and config_digest(found) == config_digest(config)


def test_ppo_and_dpo_have_one_beta_and_no_option_that_moves_the_optimum(beside_data: None) -> None:
    from rlhf_pipeline.config.base import moves_optimum

    for folder in ("demo", "hh", "exact", "reviews"):
        ppo = load_config("ppo", ROOT / "configs" / folder / "ppo.yaml").config
        dpo = load_config("dpo", ROOT / "configs" / folder / "dpo.yaml").config
        assert ppo.kl_coef == dpo.beta
        assert ppo.lengths() == dpo.lengths()
        assert not moves_optimum(ppo) and not moves_optimum(dpo)


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_there(name: str) -> None:
    assert (ROOT / name).is_file()


def test_ci_runs_the_readmes_test_command() -> None:
    assert "make test" in (ROOT / ".ci/run").read_text()
    assert "make test" in (ROOT / "README.md").read_text() and "make demo" in (ROOT / "README.md").read_text()


def test_the_readmes_commands_exist() -> None:
    from typer.main import get_command

    from rlhf_pipeline.cli.main import app

    root = get_command(app)
    used = re.findall(r"^(?:\$ )?rlhf ([a-z-]+)(?: ([a-z-]+))?", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert used
    for name, inner in used:
        assert name in root.commands, f"rlhf {name}"
        if name in ("models", "data"):
            assert inner in root.commands[name].commands, f"rlhf {name} {inner}"


def test_the_readmes_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in re.findall(r"`?make ([a-z]+)", (ROOT / "README.md").read_text()):
        assert name in targets or name == "it", f"make {name}"


def test_the_page_of_config_keys_is_up_to_date() -> None:
    from importlib.util import module_from_spec, spec_from_file_location

    spec = spec_from_file_location("config_reference", ROOT / "scripts/config_reference.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.reference() == (ROOT / "docs/config.md").read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.json")), ids=lambda path: path.name)
def test_figures_name_no_folder_of_the_machine_that_made_them(path):
    assert not re.findall(r'"/[^"]*"', path.read_text())
