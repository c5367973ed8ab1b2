"""A disk that is full, and a home that may not be written: what is said, what is left, and whether the run goes on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.repair import registry_faults
from rlhf_pipeline.registry.store import Registry
from tests.conftest import DEFAULTS
from tests.faults import children
from tests.faults.subjects import _write, make_template, stage_config

STEPS = 3


@dataclass(frozen=True)
class Act:
    """A command that writes: a training run with checkpoints, a collection, a comparison."""

    name: str
    words: tuple[str, ...]

    def command(self, home: Path) -> list[str]:
        """Its words in a home."""
        return [*self.words, "--home", str(home)]


def make_acts(folder: Path) -> tuple[Path, list[Act]]:
    """A home with sft@v1, reward@v1, dpo@v1 and pairs, and the commands that are disturbed in copies of it."""
    template, configs = make_template(folder), folder / "configs"
    dpo = {**stage_config("dpo", STEPS), "snapshot_steps": 2}
    first = _write(configs / "first.yaml", {**dpo, "output_name": "before"})
    done = children.run(["dpo", "--config", str(first), "--home", str(template)], folder / "first")
    if done.code != 0:
        raise RuntimeError(done.err)
    collect = {**DEFAULTS["collect"], "output_name": "pairs", "num": 100}
    compare = {**DEFAULTS["compare"], "max_prompts": 2, "samples": 2}
    acts = [
        Act("publish", ("dpo", "--config", str(_write(configs / "dpo.yaml", dpo)))),
        Act("ppo", ("ppo", "--config", str(_write(configs / "ppo.yaml", stage_config("ppo", STEPS))))),
        Act("collect", ("data", "collect", "--config", str(_write(configs / "collect.yaml", collect)))),
        Act(
            "compare",
            ("compare", "before", "--baseline", "sft", "--config", str(_write(configs / "compare.yaml", compare))),
        ),
    ]
    return template, acts


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int = 64) -> Iterator[bool]:
    """Mount a small file system of memory on a folder; yields whether that was possible."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def free(folder: Path) -> int:
    """Bytes that are free on the disk of a folder."""
    about = os.statvfs(folder)
    return about.f_bavail * about.f_frsize


def _versions(home: Path) -> list[str]:
    registry = Registry(home)
    return [item.label for item in [*registry.models.all(), *registry.data.all()]]


def _judge(home: Path, before: Sequence[str], done: children.Outcome, word: str) -> list[str]:
    """What is wrong with the end of a disturbed command, and with what it has left."""
    failed = []
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    if done.code != 0:
        if done.code != 1 or len(errors) != 1 or word not in errors[0] or str(home) not in errors[0]:
            failed.append(f"exit {done.code}: {done.err[-1500:]}")
        if "Traceback" in done.err:
            failed.append("a traceback")
    registry = Registry(home)
    if faults := registry_faults(registry):
        failed.append(f"damaged: {[str(fault) for fault in faults]}")
    for label in before:
        verify_files(registry.resolve(label) if label in _models(registry) else registry.resolve_data(label))
    if leftovers := [str(path) for part in ("models", "data") for path in (home / part).rglob(".*.tmp")]:
        failed.append(f"left behind: {leftovers}")
    return failed


def _models(registry: Registry) -> list[str]:
    return [item.label for item in registry.models.all()]


def _again(act: Act, home: Path, said: Path) -> list[str]:
    """The same command, undisturbed: it has to go on to its end."""
    done = children.run(act.command(home), said)
    faults = registry_faults(Registry(home))
    return [] if done.code == 0 and not faults else [f"again: exit {done.code}, {faults}: {done.err[-1500:]}"]


def _fill(place: Path, leave: int) -> Path:
    ballast = place / "ballast"
    size = free(place) - leave
    with ballast.open("wb") as file:
        if size > 0:
            os.posix_fallocate(file.fileno(), 0, size)
    return ballast


def in_its_own_process(point: int) -> bool:
    """Whether a point is tried in a process of its own, as two of three are where a disk can be mounted."""
    return point % 3 != 2


def _on_a_small_disk(
    act: Act, template: Path, place: Path, said: Path, points: int
) -> Iterator[tuple[str, int, list[str]]]:
    home = place / "home"

    def renew() -> None:
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(template, home)

    renew()
    before, names = free(place), _versions(home)
    whole = children.run(act.command(home), said)
    if whole.code != 0:
        raise RuntimeError(whole.err)
    need = before - free(place)
    for point in range(points):
        renew()
        leave = int(need * (point + 0.5) / points)  # always less than the command leaves behind
        ballast = _fill(place, leave)
        start = children.fresh if in_its_own_process(point) else children.fork
        done = start(act.command(home), said).wait()
        failed = _judge(home, names, done, "disk full")
        ballast.unlink()
        yield f"{act.name}, {leave} bytes free", done.code, failed + _again(act, home, said)


def _with_short_files(
    act: Act, template: Path, place: Path, said: Path, points: int
) -> Iterator[tuple[str, int, list[str]]]:
    """Where nothing can be mounted: no file may grow beyond a limit, which fails at the same system calls."""
    home, names = place / "home", _versions(template)
    shutil.copytree(template, home)
    sizes = {path: path.stat().st_size for path in home.rglob("*") if path.is_file()}
    whole = children.run(act.command(home), said)
    if whole.code != 0:
        raise RuntimeError(whole.err)
    largest = max(path.stat().st_size for path in home.rglob("*") if path.is_file() and path not in sizes)
    for point in range(points):
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(template, home)
        limit = max(2000, int(largest * (point + 0.5) / points))

        def before(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        done = children.run(act.command(home), said, before=before)
        failed = _judge(home, names, done, "disk full")
        yield f"{act.name}, files of at most {limit} bytes", done.code, failed + _again(act, home, said)


def disk_full(
    points: int = 30, folder: Path | None = None, *, mount: bool = True, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Fill the disk at so many points of a training run with checkpoints, of PPO, a collection and a comparison.

    Every time: one line that says where, nothing registered before damaged, no part of a version visible, and the same
    command runs to its end once there is room. Two of three points in processes of their own.

    Returns how often the disk was full and what failed.
    """
    import tempfile

    children.prepare()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if folder is None else folder
        template, acts = make_acts(folder)
        acts = [act for act in acts if not only or act.name in only]
        place = folder / "disk"
        mounted = stack.enter_context(small_disk(place)) if mount else False
        place.mkdir(exist_ok=True)
        full, trials, fresh, failed = 0, 0, 0, []
        way: Callable[..., Any] = _on_a_small_disk if mounted else _with_short_files
        shares = [points // len(acts) + (number < points % len(acts)) for number in range(len(acts))]
        for act, share in zip(acts, shares, strict=True):
            for point, (what, code, problems) in enumerate(way(act, template, place, folder / "said", share)):
                trials += 1
                fresh += mounted and in_its_own_process(point)
                full += code == 1
                failed += [f"{what}: {problem}" for problem in problems]
    return {
        "trials": trials,
        "full": full,
        "in_fresh_processes": fresh,
        "mounted": mounted,
        "failed": failed,
        "ok": not failed and full > 0,
    }


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("process", ctypes.c_int))


def without_privileges() -> None:
    """In a child: let permission bits bind, as they do not for root. It stays the owner of its files."""
    if os.geteuid() != 0:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    none = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable capabilities, twice 32 of each
    if libc.capset(ctypes.byref(_Header(0x20080522, 0)), none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _close(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o555 if path.is_dir() else 0o444)


def _open(folder: Path) -> None:
    for path in [folder, *folder.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() else 0o644)


def read_only(folder: Path, only: Sequence[str] = (), *, fresh: bool = False) -> dict[str, Any]:
    """Run the same commands in a home that may be read and not written, and again once it may.

    fresh: in processes of their own.
    """
    children.prepare()
    template, acts = make_acts(folder)
    failed = []
    acts = [act for act in acts if not only or act.name in only]
    for act in acts:
        home = folder / "closed" / "home"
        shutil.rmtree(home.parent, ignore_errors=True)
        shutil.copytree(template, home)
        names = _versions(home)
        _close(home)
        said = folder / "said"
        if fresh:
            done = children.fresh(act.command(home), said, trap=("closed",)).wait()
        else:
            done = children.run(act.command(home), said, before=without_privileges)
        _open(home)
        failed += [f"{act.name}: {problem}" for problem in _judge(home, names, done, "no permission")]
        if done.code == 0:
            failed.append(f"{act.name}: it was written all the same")
        failed += [f"{act.name}: {problem}" for problem in _again(act, home, said)]
        reading = children.run(["models", "verify", "--home", str(home)], said, before=without_privileges)
        if reading.code != 0:
            failed.append(f"reading: {reading.err}")
    return {"trials": len(acts), "failed": failed, "ok": not failed}
