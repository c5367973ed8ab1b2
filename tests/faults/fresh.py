"""Some of every kind of fault in processes of their own, which share nothing with a parent that has imported all.

Kills, SIGTERM, full disks and the registry have theirs where they are made; here are the other kinds.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import Lab
from tests.faults import bad_configs, bad_data, children, kills
from tests.faults.subjects import Subject, digests

COUNT = 20


@dataclass(frozen=True)
class Trial:
    """One trial and what was wrong with it."""

    what: str
    faults: list[str]


def not_refused(bad: Any, folder: Path, home: Path, code: int | None, said: str) -> list[str]:
    """What is wrong with the way a bad file was refused. bad: of `bad_data` or `bad_configs`."""
    faults = [] if code == 2 else [f"exit code {code}: {said[-2000:]}"]
    faults += ["a traceback"] if "Traceback" in said else []
    faults += [missing] if (missing := bad.missing(folder, said)) else []
    # A large source is kept in the cache, its faults too: the same command with skip_bad_rows reads it from there.
    left = [str(path) for path in home.rglob("*") if path.is_file() and path.relative_to(home).parts[0] != "cache"]
    return faults + ([f"left in the home: {left}"] if left else [])


def bad_files(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """So many bad data files and as many bad configs."""
    draw = children.draws(seed, "fresh bad files")
    for number, bad in enumerate([*draw.sample(bad_data.BAD, count), *draw.sample(bad_configs.BAD, count)]):
        place = folder / str(number)
        place.mkdir(parents=True)
        home = place / "home"
        done = children.fresh([*bad.write(place), "--home", str(home)], place / "said").wait()
        yield Trial(bad.name, not_refused(bad, place, home, done.code, done.err + done.out))
        shutil.rmtree(place)


def names(folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """So many hostile names, each in one place."""
    from tests.faults.hostile_names import NAMES, WAYS, attack, make_place, with_home

    draw = children.draws(seed, "fresh names")
    place = make_place(folder / "place")

    def run(place: Path, *words: str) -> tuple[int, str]:
        done = children.fresh(
            with_home(place, words), folder / "said", cwd=place / "work", HOME=str(place / "house")
        ).wait()
        return -1 if done.code is None else done.code, done.out + done.err

    ways = list(WAYS)
    for number in range(count):
        way = ways[number % len(ways)]
        name = draw.choice([name for name in NAMES if _can_be_a_word(name)])
        yield Trial(f"{way} {name!r}", attack(place, way, [name], run))


def _can_be_a_word(name: str) -> bool:
    """Whether a command line can hold it at all."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def files(home: Path, folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """So many hostile files in scenes of their own."""
    from tests.faults.hostile_files import CASES, Scene, attempt, make_scene
    from tests.faults.hostile_names import with_home

    def run(scene: Scene, words: Sequence[str]) -> tuple[int, str, list[str]]:
        note = scene.folder / "asked"
        done = children.fresh(
            with_home(scene.folder, words),
            scene.folder / "said",
            trap=("cut_off", str(note)),
            cwd=scene.work,
            HOME=str(scene.folder / "house"),
        ).wait()
        asked = note.read_text().splitlines() if note.exists() else []
        return -1 if done.code is None else done.code, done.out + done.err, asked

    for number, name in enumerate(children.draws(seed, "fresh files").sample(list(CASES), count)):
        scene = make_scene(home, folder / str(number))
        yield Trial(name, attempt(name, scene, run))
        shutil.rmtree(scene.folder)


def _flip(path: Path, draw: Any) -> None:
    content = bytearray(path.read_bytes())
    position = draw.randrange(8 * len(content))
    content[position // 8] ^= 1 << position % 8
    path.write_bytes(bytes(content))


def flips(template: Path, subject: Subject, folder: Path, count: int, seed: int) -> Iterator[Trial]:
    """So many single bits: of a model's or data's files, told by `models verify`, and of checkpoints, on resuming.

    A run whose newest checkpoint is damaged names the file, goes on from the one before and ends as if nothing was.
    """
    draw = children.draws(seed, "fresh flips")
    stopped = subject.home(folder / "stopped")
    children.run(subject.command(stopped), folder / "said", before=kills.signal_at(4))
    for number in range(count):
        home, faults = folder / str(number) / "home", []
        at = ("models/sft/v1", "data/pairs/v1", "checkpoint")[number % 3]
        shutil.copytree(stopped if at == "checkpoint" else template, home)
        place = kills.checkpoints(home)[-1] if at == "checkpoint" else home / at
        path = draw.choice(sorted(path for path in place.rglob("*") if path.is_file() and path.stat().st_size))
        _flip(path, draw)
        words = subject.command(home) if at == "checkpoint" else ["models", "verify", "--home", str(home)]
        done = children.fresh(words, folder / "said").wait()
        said = done.err + done.out
        if path.name not in said and "manifest.json" not in said:
            faults.append(f"{path} is not named: exit code {done.code}: {said[-2000:]}")
        if at == "checkpoint":
            faults += kills.judge(subject, home, done)
        elif done.code in (0, None) or "Traceback" in said:
            faults.append(f"exit code {done.code}: {said[-2000:]}")
        yield Trial(f"{at}: {path.name}", faults)
        shutil.rmtree(folder / str(number))


NOT_FINITE: tuple[tuple[str, str, str], ...] = tuple(
    (stage, figure, bad)
    for stage, said in (("sft", "logprobs"), ("train-rm", "scores"), ("dpo", "logprobs"), ("ppo", "values"))
    for figure, bad in ((said, "nan"), (said, "inf"), ("loss", "nan"), ("loss", "inf"), ("gradient", "nan"))
)
NAMED = {"logprobs": "log-probabilities of the policy"}


def _config(template: Path, path: Path, stage: str, **changes: Any) -> tuple[str, ...]:
    """The words of a stage of the tests' laboratory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = Lab(template).config(stage, **changes)
    path.write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    return (stage, "--config", str(path))


def finite(template: Path, folder: Path, count: int) -> Iterator[Trial]:
    """What is not finite stops the run before the step, with exit code 1; undisturbed it goes on to the same end."""
    from tests.training.test_finite import LAST, UPDATE, settings

    whole: dict[str, dict[str, str]] = {}
    for number, (stage, figure, bad) in enumerate(NOT_FINITE[:: max(1, len(NOT_FINITE) // count)]):
        words, said = _config(template, folder / f"{stage}.yaml", stage, **settings(stage)), folder / "said"
        if stage not in whole:
            home = Subject(stage, template, words).home(folder / stage)
            children.run([*words, "--home", str(home)], said)
            whole[stage] = digests(home)
        home = Subject(stage, template, words).home(folder / str(number))
        done = children.fresh([*words, "--home", str(home)], said, trap=("spoil", stage, figure, bad)).wait()
        wanted = (f"update {UPDATE}: the {NAMED.get(figure, figure)} ", "this step was not applied", LAST)
        faults = [f"not said: {words!r}: {done.err[-2000:]}" for words in wanted if words not in done.err]
        faults += [f"exit code {done.code}"] if done.code != 1 or "Traceback" in done.err else []
        kept = [json.loads(path.read_text())["cause"] for path in home.glob("runs/*/failure/failure.json")]
        faults += [] if kept == [NAMED.get(figure, figure)] else [f"kept: {kept}"]
        again = children.fresh([*words, "--home", str(home)], said).wait()
        faults += [] if again.code == 0 else [f"again: exit code {again.code}: {again.err[-2000:]}"]
        faults += [] if digests(home) == whole[stage] else ["not the weights and metrics of the undisturbed run"]
        yield Trial(f"{stage}: {figure} {bad}", faults)
        shutil.rmtree(home)


ROOM = ((4, 0), (2, 0), (1, 0), (4, 1), (0, 2))
"""Examples of 8 that fit, and the way in which it is said that more do not."""


def memory(template: Path, folder: Path, count: int) -> Iterator[Trial]:
    """With less room the weights are those of the whole step to 1e-6; with none the run ends with exit code 1."""
    from tests.training.test_halves import SETTINGS

    whole: dict[str, Lab] = {}
    stages = (("sft", 1), ("train-rm", 2), ("dpo", 2), ("ppo", 1))
    cases = [(stage, each, room) for stage, each in stages for room in ROOM]
    for number, (stage, each, (fit, error)) in enumerate(cases[:: max(1, len(cases) // count)]):
        words, said = _config(template, folder / f"{stage}.yaml", stage, **SETTINGS), folder / "said"
        if stage not in whole:
            whole[stage] = Lab(Subject(stage, template, words).home(folder / stage))
            children.run([*words, "--home", str(whole[stage].home)], said)
        lab = Lab(Subject(stage, template, words).home(folder / str(number)))
        trap = ("memory", str(fit * each), str(error))
        done = children.fresh([*words, "--home", str(lab.home)], said, trap=trap).wait()
        faults = [] if done.code == (0 if fit else 1) else [f"exit code {done.code}: {done.err[-2000:]}"]
        faults += [] if "out of memory in training: " in done.err else [f"not said: {done.err[-2000:]}"]
        if fit and done.code == 0:
            faults += _different(lab, whole[stage])
        yield Trial(f"{stage}: room for {fit}", faults)
        shutil.rmtree(lab.home)


def _different(lab: Lab, other: Lab, most: float = 1e-6) -> list[str]:
    (label,) = {item.label for item in lab.registry.models.all()} - {"sft@v1", "reward@v1"}
    found, wanted = lab.weights(label), other.weights(label)
    far = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    return [] if far <= most else [f"the weights differ by {far:g}"]


def every_kind(template: Path, subject: Subject, folder: Path, count: int, seed: int) -> dict[str, Iterator[Trial]]:
    """The kinds, `count` trials of each. template: a home. subject: a stage whose runs are resumed from checkpoints."""
    return {
        "bad data files and bad configs": bad_files(folder / "bad", count, seed),
        "hostile names": names(folder / "names", count, seed),
        "hostile files": files(template, folder / "files", count, seed),
        "flipped bits": flips(template, subject, folder / "flips", count, seed),
        "values that are not finite": finite(template, folder / "finite", count),
        "runs out of memory": memory(template, folder / "memory", count),
    }
