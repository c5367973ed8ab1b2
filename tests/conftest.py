"""A small laboratory: a home with tiny models of the built-in world, made once and copied for each test."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

LENGTHS = {"max_prompt_length": 6, "response_length": 4}
CPU = {"use_cpu": True, "num_threads": 1}
TRAINING = {
    **LENGTHS,
    **CPU,
    "model_name_or_path": "sft",
    "dataset_name": "collected:pairs",
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 512,
    "max_steps": 4,
    "logging_steps": 1,
}
TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.25,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "sft": {**TRAINING, "output_name": "tuned"},
    "train-rm": {**TRAINING, "output_name": "scored", "reward_centering_samples": 64},
    "dpo": {**TRAINING, "output_name": "dpo", "beta": 0.5},
    "ppo": {
        **TRAINING,
        "output_name": "ppo",
        "reward_model_path": "reward",
        "kl_coef": 0.5,
        "rollout_batch_size": 16,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
    },
    "collect": {
        **LENGTHS,
        **CPU,
        "output_name": "collected",
        "policy": "sft",
        "prompts": "world:verdicts",
        "judge": "world",
        "num": 60,
    },
    "evaluate": {**CPU},
    "generate": {**CPU},
    "compare": {**CPU, "exact": False},
    "exact": {**CPU},
}


TESTS = [0]  # how many this process has run


# A shell switches SIGINT off for what it starts in the background, and children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def out_of_sight() -> None:
    """Take what there is out of the garbage collector's sight: each of its runs would look through all of it."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """What the tests import at their top stays."""
    out_of_sight()


def pytest_runtest_teardown() -> None:
    """So does what the first tests have imported and shared, more and more slowly: look at 50, 100, 200 ... tests."""
    TESTS[0] += 1
    if TESTS[0] >= 50 and (TESTS[0] // 50) & (TESTS[0] // 50 - 1) == 0 and TESTS[0] % 50 == 0:
        out_of_sight()


def word_rankings(count: int, *, ties: bool, seed: int = 1) -> list[dict[str, Any]]:
    """Rankings of two to five different responses in words of the built-in world; by ranks, with `ties` not of all."""
    from rlhf_pipeline.data.world.vocabulary import ADJECTIVES, ASPECTS, FRAME, GENRES, MODIFIERS

    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        size = draw.randint(2, 5)
        texts: dict[str, bool] = {}  # at most 4 tokens, the end token of an ended one included
        while len(texts) < size:
            ended = draw.random() < 0.5
            words = draw.choices(ADJECTIVES + MODIFIERS, k=draw.randint(1, 3 if ended else 4))
            texts.setdefault(" " + " ".join(words), ended)
        ranks = draw.sample(range(1, size + 1), size)
        if ties and size > 2:
            ranks = [max(1, rank - 1) for rank in ranks]  # the first and the second are tied
        prompt = " ".join(draw.choices(FRAME + GENRES + ASPECTS, k=draw.randint(2, 6)))
        rows.append({"prompt": prompt, "completions": list(texts), "ended": list(texts.values()), "ranks": ranks})
    return rows


@dataclass(frozen=True)
class Lab:
    """A home and the short way to run stages in it."""

    home: Path

    def config(self, stage: str, **changes: Any) -> Any:
        """The config of a stage; a value of None takes a key out of the defaults."""
        from rlhf_pipeline.config.load import load_config

        values = {key: value for key, value in {**DEFAULTS[stage], **changes}.items() if value is not None}
        return load_config(stage, None, extra=values).config

    def run(self, stage: str, *, resume: bool = True, **changes: Any) -> Any:
        """Run a stage quietly and return its result."""
        from rlhf_pipeline.experiment.run import stage_function

        return stage_function(stage)(self.config(stage, **changes), self.home, resume=resume, quiet=True)

    @property
    def registry(self) -> Any:
        from rlhf_pipeline.registry.store import Registry

        return Registry(self.home)

    def weights(self, reference: str) -> dict[str, Any]:
        """The weights of a registered model, or of its adapter."""
        from safetensors.torch import load_file

        folder = self.registry.resolve(reference).path
        return load_file(next(folder.glob("*model.safetensors")))

    def rows(self, run: str) -> list[dict[str, Any]]:
        """The lines of a run's metrics.jsonl."""
        return [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]

    def copy(self, target: Path) -> Lab:
        """The same laboratory in another folder."""
        shutil.copytree(self.home, target)
        return Lab(target)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """sft@v1, reward@v1 and the collected pairs; for reading only."""
    import torch

    torch.set_num_threads(1)
    lab = Lab(tmp_path_factory.mktemp("tiny") / "home")
    lab.run(
        "sft",
        output_name="sft",
        model_name_or_path=None,
        model_init=TINY_LLAMA,
        tokenizer_init={"type": "world"},
        dataset_name="world:verdicts",
        max_train_samples=2000,
        per_device_train_batch_size=64,
        max_steps=40,
    )
    lab.run("collect", output_name="pairs", num=300)
    lab.run("train-rm", output_name="reward", max_steps=20)
    shutil.rmtree(lab.home / "runs")
    return lab


@pytest.fixture(scope="session")
def rankings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Write rankings, drawn or given, and return their file."""

    def write(count: int = 24, *, ties: bool = False, rows: list[dict[str, Any]] | None = None) -> str:
        path = tmp_path_factory.mktemp("rankings") / "rankings.jsonl"
        rows = word_rankings(count, ties=ties) if rows is None else rows
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@contextmanager
def stopped_before(update: int) -> Iterator[None]:
    """A run in this block ends without warning before an update is recorded, as if its process were killed."""
    from rlhf_pipeline.training import session

    fit = session.fit

    def ends(*args: Any, on_update: Callable[..., None], **options: Any) -> Any:
        def hook(step: int, *rest: Any) -> None:
            if step == update:
                raise KeyboardInterrupt
            on_update(step, *rest)

        return fit(*args, on_update=hook, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(session, "fit", ends)
        yield


@pytest.fixture(autouse=True)
def unsynced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for the disk, but where storage itself is tested: no test cuts the power."""
    if request.path.parent.name not in ("faults", "registry"):
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)


DRAWING = ("test_report.py", "test_report_browser.py", "test_report_parts.py", "test_report_snapshots.py")


@pytest.fixture(autouse=True)
def unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are painted, but laid out and written as SVG only where that is tested: it is most of a page's time."""

    def named(figure: Any, ident: str, title: str, description: str, class_: str | None) -> Any:
        from rlhf_pipeline.report.markup import h

        return h("svg", h("title", title, id=f"{ident}-title"), h("desc", description, id=f"{ident}-desc"))

    if request.path.name not in DRAWING:
        monkeypatch.setattr("rlhf_pipeline.report.drawing.fit", lambda axes: None)
        monkeypatch.setattr("rlhf_pipeline.report.drawing._inline", named)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons write results.json and draw no page, which costs most of their time."""
    monkeypatch.setattr("rlhf_pipeline.report.write_report", lambda *_: None)


@pytest.fixture
def lab(tiny: Lab, tmp_path: Path) -> Lab:
    """A copy of the tiny laboratory, to write into."""
    import torch

    torch.set_num_threads(1)
    return tiny.copy(tmp_path / "home")


@contextmanager
def sigterm_at(step: int) -> Iterator[None]:
    """Let training in this process receive SIGTERM at the end of a step, as from a scheduler."""
    from rlhf_pipeline.training import session

    fit = session.fit

    def stopped(*args, on_update, **options):
        def hook(number, metrics, window):
            if number == step:
                os.kill(os.getpid(), signal.SIGTERM)
            on_update(number, metrics, window)

        return fit(*args, on_update=hook, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "fit", stopped)
        yield
