"""A registry that many processes use at once: publishers, readers, and processes that move aliases."""

from __future__ import annotations

import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UnknownReference
from rlhf_pipeline.registry.integrity import verify_files
from rlhf_pipeline.registry.repair import registry_faults
from rlhf_pipeline.registry.store import Registry

NAME = "shared"
CODE = {"package": "test"}


def _write(tag: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        for number in range(3):
            (folder / f"part{number}.safetensors").write_text(tag * 400)
        (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "tag": tag}))

    return write


def _publisher(home: Path, number: int, registrations: int, start: Any, said: Any) -> None:
    registry = Registry(home)
    start.wait()
    for turn in range(registrations):
        tag = f"{number}-{turn} "
        made = registry.publish(NAME, "sft", _write(tag), code=CODE, seed=number)
        said.put(("made", made.version, tag))
    said.put(("done", number, ""))


def _read(registry: Registry, reference: str) -> bool:
    """Whether a reference named something; what it named must be whole and of one publisher."""
    try:
        found = registry.resolve(reference)
    except UnknownReference:
        return False
    verify_files(found)
    tag = json.loads((found.path / "config.json").read_text())["tag"]
    for number in range(3):
        if (found.path / f"part{number}.safetensors").read_text() != tag * 400:
            raise AssertionError(f"{found.label} is made of two")
    return True


def _reader(home: Path, number: int, start: Any, stop: Any, said: Any) -> None:
    registry, reads, seen = Registry(home), 0, 0
    start.wait()
    references = (NAME, f"{NAME}@best", f"{NAME}@other")
    known: set[str] = set()
    while not (stop.is_set() and reads):
        for reference in references:
            try:
                if _read(registry, reference):
                    reads += 1
                    known.add(reference)
                elif reference in known:
                    said.put(("torn", number, f"{reference} was there and is not"))
                latest = registry.models.numbers(NAME)
                if latest and latest[-1] < seen:
                    said.put(("torn", number, f"v{seen} was the latest, now v{latest[-1]}"))
                seen = latest[-1] if latest else seen
            except Exception as error:
                said.put(("torn", number, f"{reference}: {type(error).__name__}: {error}"))
    said.put(("reads", number, reads))


def _flipper(home: Path, alias: str, start: Any, stop: Any, said: Any) -> None:
    registry, draw, flips = Registry(home), random.Random(alias), 0
    start.wait()
    while not (stop.is_set() and flips):  # on a busy machine its first turn may come after the last publication
        numbers = registry.models.numbers(NAME)
        if numbers:
            registry.alias(f"{NAME}@v{draw.choice(numbers)}", alias)
            flips += 1
        time.sleep(0.002)
    said.put(("flips", alias, flips))


def concurrency(
    processes: int = 16, registrations: int = 50, readers: int = 2, *, method: str = "fork"
) -> dict[str, Any]:
    """Let so many processes register so often under one name while others read, verify and move aliases.

    method: `spawn` makes every process start by itself instead of from a copy of this one.

    Returns the number of versions, what was lost or torn, and what is wrong in the end; `ok` says it in a word.
    """
    context: Any = multiprocessing.get_context(method)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        aliases = ("best", "other")
        said, stop, start = context.Queue(), context.Event(), context.Barrier(processes + readers + len(aliases))
        publishers = [
            context.Process(target=_publisher, args=(home, number, registrations, start, said))
            for number in range(processes)
        ]
        others = [context.Process(target=_reader, args=(home, number, start, stop, said)) for number in range(readers)]
        others += [context.Process(target=_flipper, args=(home, alias, start, stop, said)) for alias in aliases]
        started = time.perf_counter()
        for process in (*publishers, *others):
            process.start()
        made: list[tuple[int, str]] = []
        torn: list[str] = []
        counts = {"reads": 0, "flips": 0}
        waiting = processes + len(others)
        while waiting:
            what, number, value = said.get(timeout=300)
            if what == "made":
                made.append((number, value))
            elif what == "torn":
                torn.append(value)
            else:
                waiting -= 1
                if what in counts:
                    counts[what] += value
                elif (processes := processes - 1) == 0:
                    stop.set()
        for process in (*publishers, *others):
            process.join(60)
        registry = Registry(home)
        lost = [
            version
            for version, tag in made
            if json.loads((registry.models.folder(NAME, version) / "config.json").read_text())["tag"] != tag
        ]
        versions = registry.models.numbers(NAME)
        result = {
            "processes": len(publishers),
            "registered": len(made),
            "versions": len(versions),
            "distinct": len({version for version, _ in made}),
            "gapless": versions == list(range(1, len(made) + 1)),
            "lost": lost,
            "torn": torn,
            "aliases": sorted(registry.models.aliases(NAME)),
            "faults": [str(fault) for fault in registry_faults(registry)],
            "leftovers": [path.name for path in home.rglob(".*.tmp")],
            "exit_codes": sorted({process.exitcode for process in (*publishers, *others)}),
            "seconds": time.perf_counter() - started,
            **counts,
        }
    wanted = len(publishers) * registrations
    result["ok"] = (
        result["registered"] == result["versions"] == result["distinct"] == wanted
        and result["gapless"]
        and not (lost or torn or result["faults"] or result["leftovers"])
        and result["exit_codes"] == [0]
        and result["aliases"] == ["best", "other"]
    )
    return result
