"""What is disturbed: a small home, a command for each stage and for an experiment, and what each leaves undisturbed."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import DEFAULTS, TINY_LLAMA
from tests.faults import children

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "train-rm", "dpo", "ppo")
EXPERIMENT = "run"
SFT = {
    **DEFAULTS["sft"],
    "output_name": "sft",
    "model_name_or_path": None,
    "model_init": TINY_LLAMA,
    "tokenizer_init": {"type": "world"},
    "dataset_name": "world:verdicts",
    "max_train_samples": 2000,
    "per_device_train_batch_size": 64,
    "max_steps": 30,
}
EVERY_STEP = {"save_steps": 1, "save_total_limit": 2, "weight_decay": 0.01, "warmup_steps": 2}
EVALUATION = {"eval_strategy": "steps", "eval_steps": 4}
PAIRS = {"dataset_name": "collected:pairs"}


def _write(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False))
    return path


def stage_config(stage: str, steps: int) -> dict[str, Any]:
    """The config of a disturbed run: a checkpoint at every step."""
    return {**DEFAULTS[stage], **EVERY_STEP, **({} if stage == "ppo" else EVALUATION), "max_steps": steps}


def experiment_files(folder: Path, steps: int, **changes: Any) -> Path:
    """An experiment of all stages and a comparison; changes are its keys."""
    linked = ("model_name_or_path", "dataset_name", "reward_model_path", "policy", "output_name")
    configs = {
        "sft": {**SFT, **EVERY_STEP, "max_steps": steps},
        "pairs": {**DEFAULTS["collect"], "num": 120},
        **{
            name: stage_config(stage, steps) for name, stage in (("reward", "train-rm"), ("ppo", "ppo"), ("dpo", "dpo"))
        },
        "compare": {**DEFAULTS["compare"], "max_prompts": 2, "samples": 2},
    }
    for name, values in configs.items():
        drop = () if name in ("sft", "compare") else linked
        kept = {key: value for key, value in values.items() if key not in drop}
        kept.pop("output_name", None)
        _write(folder / f"{name}.yaml", kept)
    stages = {
        "sft": {"stage": "sft", "config": "sft.yaml"},
        "pairs": {"stage": "collect", "config": "pairs.yaml", "policy": "sft"},
        "reward": {
            "stage": "train-rm",
            "config": "reward.yaml",
            "model_name_or_path": "sft",
            "dataset_name": "pairs",
        },
        "ppo": {
            "stage": "ppo",
            "config": "ppo.yaml",
            "model_name_or_path": "sft",
            "reward_model_path": "reward",
            "dataset_name": "pairs",
        },
        "dpo": {"stage": "dpo", "config": "dpo.yaml", "model_name_or_path": "sft", "dataset_name": "pairs"},
    }
    whole = {
        "name": "disturbed",
        "seeds": [0],
        "stages": stages,
        "compare": {"arms": ["ppo", "dpo"], "baseline": "sft", "config": "compare.yaml"},
    }
    return _write(folder / "experiment.yaml", whole | changes)


@dataclass(frozen=True)
class Subject:
    """One command, the home that it starts from, and what it leaves when nothing disturbs it."""

    name: str
    template: Path
    words: tuple[str, ...]
    seconds: float = 0.0  # of the undisturbed run
    acts: int = 0  # on the files of its home
    left: dict[str, str] = field(default_factory=dict)  # digests of weights and metrics by place

    def command(self, home: Path) -> list[str]:
        """The words of the command in a home."""
        return [*self.words, "--home", str(home)]

    def home(self, folder: Path) -> Path:
        """A fresh copy of the home that it starts from."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.template, folder)
        return folder


def digests(home: Path) -> dict[str, str]:
    """What must not depend on disturbances: every version's weights and data, every run's metrics."""
    found = {}
    patterns = ("models/*/v*/*.safetensors", "models/*/v*/snapshots/*/*.safetensors", "data/*/v*/records.jsonl")
    for pattern in (*patterns, "runs/*/metrics.jsonl"):
        for path in sorted(home.glob(pattern)):
            found[str(path.relative_to(home))] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def make_template(folder: Path) -> Path:
    """A home with sft@v1, the collected pairs and reward@v1."""
    home, configs = folder / "template", folder / "template-configs"
    stages = (
        ("sft", SFT),
        ("collect", {**DEFAULTS["collect"], "output_name": "pairs", "num": 200}),
        ("train-rm", {**DEFAULTS["train-rm"], "output_name": "reward", "max_steps": 10}),
    )
    for stage, values in stages:
        path = _write(configs / f"{stage}.yaml", values)
        name = ["data", "collect", "--config"] if stage == "collect" else [stage, "--config"]
        done = children.run([*name, str(path), "--home", str(home)], folder / "made" / stage)
        if done.code != 0:
            raise RuntimeError(f"{stage} for the template failed: {done.err}")
    shutil.rmtree(home / "runs")
    return home


def make_subjects(folder: Path, *, steps: int, names: tuple[str, ...] = (*STAGES, EXPERIMENT)) -> list[Subject]:
    """Each command with what it leaves undisturbed.

    Raises:
        RuntimeError: an undisturbed run failed.
    """
    template = make_template(folder)
    empty = folder / "empty"
    empty.mkdir()
    subjects = []
    for name in names:
        if name == EXPERIMENT:
            words = ("run", str(experiment_files(folder / "experiment", min(steps, 6))))
            subject = Subject(name, empty, words)
        else:
            path = _write(folder / "configs" / f"{name}.yaml", stage_config(name, steps))
            subject = Subject(name, template, (name, "--config", str(path)))
        home = subject.home(folder / "undisturbed" / name)
        note = folder / f"{name}.acts"
        done = children.run(subject.command(home), folder / "said" / name, before=children.count_writing(home, note))
        if done.code != 0:
            raise RuntimeError(f"{name}, undisturbed, failed with {done.code}: {done.err[-3000:]}")
        subjects.append(
            Subject(name, subject.template, subject.words, done.seconds, int(note.read_text()), digests(home))
        )
    return subjects


def make_demo_subjects(folder: Path) -> list[Subject]:
    """The stages of the demo with its own models, sizes and lengths of training; made to be stopped, not to end."""
    home, demo = folder / "demo", ROOT / "configs/demo"
    made = (
        ["sft", "--config", str(demo / "sft.yaml"), "max_steps=2"],
        ["data", "collect", "--config", str(demo / "pairs.yaml"), "num=2000", "policy=sft", "output_name=pairs"],
        ["train-rm", "--config", str(demo / "reward.yaml"), "max_steps=2"],
    )
    for words in made:
        done = children.run([*words, "--home", str(home)], folder / "made-demo")
        if done.code != 0:
            raise RuntimeError(f"rlhf {' '.join(words)} failed: {done.err}")
    shutil.rmtree(home / "runs")
    files = {"sft": "sft", "train-rm": "reward", "dpo": "dpo", "ppo": "ppo"}
    long = {"sft": "max_steps=100000", "ppo": "max_steps=100000"}
    return [
        Subject(stage, home, (stage, "--config", str(demo / f"{name}.yaml"), long.get(stage, "num_train_epochs=1000")))
        for stage, name in files.items()
    ]


def compared(home: Path) -> dict[str, Any] | None:
    """The figures of the comparison that an experiment ended with."""
    path = home / "reports/disturbed/results.json"
    return json.loads(path.read_text()) if path.exists() else None
