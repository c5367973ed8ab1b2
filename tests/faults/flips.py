"""Single changed bits and cut files: every file of a model, of collected data and of a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.sources import read_source
from rlhf_pipeline.errors import DamagedFile
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.repair import registry_faults
from rlhf_pipeline.registry.store import Registry
from rlhf_pipeline.training.checkpoint import newest_checkpoint, verify_checkpoint
from tests.conftest import Lab


@dataclass(frozen=True)
class Target:
    """A folder whose files are damaged, and the checks that have to notice: each returns what it says."""

    name: str
    folder: Path
    checks: tuple[Callable[[Path], str], ...]

    @property
    def files(self) -> list[Path]:
        """Every file of it, also the manifest."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def _said(action: Callable[[], Any]) -> str:
    try:
        action()
    except DamagedFile as error:
        return str(error)
    return ""


def targets(home: Path, model: str, data: str, checkpoint: Path) -> list[Target]:
    """A registered model, collected data and a checkpoint."""
    registry = Registry(home)

    def listed(reference: str) -> Callable[[Path], str]:
        return lambda _: "\n".join(str(fault) for fault in registry_faults(registry, reference))

    def loaded(path: Path) -> str:
        # The card beside a model changes nothing that is loaded; `verify` names it.
        if path.name == "README.md" or "snapshots" in path.parts:
            return path.name
        return _said(lambda: verify_files(registry.resolve(model)))

    def passed_over(_: Path) -> str:
        said: list[str] = []
        newest_checkpoint(checkpoint.parent, warn=said.append)
        return "\n".join(said)

    return [
        Target("model", registry.resolve(model).path, (listed(model), loaded)),
        Target(
            "data",
            registry.resolve_data(data).path,
            (listed(f"collected:{data}"), lambda _: _said(lambda: read_source(f"collected:{data}", home=home))),
        ),
        Target("checkpoint", checkpoint, (lambda _: _said(lambda: verify_checkpoint(checkpoint)), passed_over)),
    ]


def trained(lab: Lab) -> list[Target]:
    """A model of a laboratory with a snapshot, its pairs, and a checkpoint on the way to the model."""
    result = lab.run("sft", output_name="more", max_steps=2, save_steps=1, snapshot_steps=1)
    return targets(lab.home, "more", "pairs", Path(result.run) / "checkpoints/step-1")


def prepare(folder: Path) -> list[Target]:
    """What `trained` makes, from nothing."""
    from tests.faults.subjects import make_template

    return trained(Lab(make_template(folder)))


def _missed(target: Target, path: Path, what: str) -> Iterator[str]:
    for number, check in enumerate(target.checks):
        said = check(path)
        # A changed manifest may say of other files that they are not what it says: it is named all the same.
        if path.name not in said and "manifest.json" not in said:
            yield f"{target.name}: {path.name}: {what}: check {number} said {said!r}"


def _flip(target: Target, path: Path, position: int) -> list[str]:
    content = path.read_bytes()
    changed = bytearray(content)
    changed[position // 8] ^= 1 << position % 8
    path.write_bytes(bytes(changed))
    try:
        return list(_missed(target, path, f"bit {position}"))
    finally:
        path.write_bytes(content)


def _cut(target: Target, path: Path, percent: int) -> list[str]:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * percent // 100])
    try:
        return list(_missed(target, path, f"cut to {percent} %"))
    finally:
        path.write_bytes(content)


def flips(count: int, seed: int, among: Iterable[Target], percents: Iterable[int] = range(100)) -> dict[str, Any]:
    """Flip `count` single bits, each in a file drawn evenly, and cut every file at each of the percents.

    Returns how many changes there were, and those that a check did not see or did not name.
    """
    draw = random.Random(f"{seed} flips")
    among = list(among)
    places = [(target, path) for target in among for path in target.files if path.stat().st_size]
    missed: list[str] = []
    for _ in range(count):
        target, path = draw.choice(places)
        missed += _flip(target, path, draw.randrange(8 * path.stat().st_size))
    cuts = 0
    for target, path in places:
        for percent in percents:
            missed += _cut(target, path, percent)
            cuts += 1
    clean = [said for target in among for check in target.checks if (said := check(Path("none")))]
    return {
        "flips": count,
        "cuts": cuts,
        "files": len(places),
        "missed": missed,
        "after": clean,
        "ok": not missed and not clean,
    }


def every_bit(target: Target, path: Path) -> list[str]:
    """The bits of one file whose change is not seen."""
    return [said for position in range(8 * path.stat().st_size) for said in _flip(target, path, position)]
