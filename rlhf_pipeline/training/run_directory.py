"""The directory of a run: its name, its status, and a lock that admits one process at a time.

runs/<output_name>-<config digest>[-k]/
    run.json       status (running, finished), process, model
    config.yaml    the resolved config
    .lock          held by the process that trains
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import IO, Any

from rlhf_pipeline.config.yaml import read_document
from rlhf_pipeline.disk.storage import lock, only_here, replace_text, writing
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.registry.store import Registry

STATUS, CONFIG, LOCK = "run.json", "config.yaml", ".lock"


def read_status(directory: Path) -> dict[str, Any]:
    """The status of a run; {} if the file is missing or damaged."""
    try:
        found = json.loads((directory / STATUS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_status(directory: Path, **status: Any) -> None:
    """Replace the status of a run."""
    replace_text(directory / STATUS, json.dumps(status) + "\n")


def is_finished(directory: Path) -> bool:
    """Whether a run has registered its model."""
    return read_status(directory).get("status") == "finished"


def left_open(home: Path, made_by: str) -> Path | None:
    """The directory of the run that made a model, if its process was killed after it registered the model; else None.

    made_by: the model's `run` in its manifest, NAME/TOKEN.
    """
    name, _, token = made_by.partition("/")
    directory = home / "runs" / name
    status = read_status(directory) if token else {}
    return directory if status.get("status") == "running" and status.get("token") == token else None


def finish_run(directory: Path, model: str) -> None:
    """Mark a run as finished, the last thing that is done; the next run of its config creates a new version."""
    write_status(directory, status="finished", model=model, token=read_status(directory).get("token"))


def finished_runs(home: Path, name: str, digest: str) -> list[tuple[str, str]]:
    """Runs of a config that have registered their model, each with its model, the newest last."""
    base = home / "runs" / f"{name}-{digest[:10]}"
    found = [(_place(base, number).name, read_status(_place(base, number))) for number in _numbers(base)]
    return [(run, str(status["model"])) for run, status in found if status.get("status") == "finished"]


def made_before(home: Path, name: str, digest: str) -> list[str]:
    """A line about the newest existing version that a finished run of this config has created; [] without one."""
    versions = {f"{name}@v{number}" for number in Registry(home).models.numbers(name)}
    made = [(run, model) for run, model in finished_runs(home, name, digest) if model in versions]
    return [
        f"run {run} of this config has finished as {model}: this run creates a new version; `{model}` names the old one"
        for run, model in made[-1:]
    ]


def _numbers(base: Path) -> list[int]:
    """The numbers of a config's runs, in order."""
    numbers = [1] if base.exists() else []
    for path in base.parent.glob(f"{base.name}-*"):
        ending = path.name[len(base.name) + 1 :]
        numbers += [int(ending)] if ending.isdecimal() and int(ending) > 1 else []
    return sorted(numbers)


def _place(base: Path, number: int) -> Path:
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def run_directory(home: Path, name: str, digest: str, *, resume: bool) -> Path:
    """runs/<name>-<digest>[-k]: the newest unfinished run if `resume`, else the next free number k."""
    base = home / "runs" / f"{name}-{digest[:10]}"
    numbers = _numbers(base)
    unfinished = [number for number in numbers if not is_finished(_place(base, number))] if resume else []
    return _place(base, unfinished[-1] if unfinished else max(numbers, default=0) + 1)


def open_directory(home: Path, name: str, digest: str, *, resume: bool) -> tuple[Path, IO[str]]:
    """Create or reopen the directory of a run, and lock it until the returned file is closed or the process ends.

    If the file system does not support locks, other processes are not kept out.

    Raises:
        BadInput: another process is training this run.
    """
    while True:
        directory = run_directory(home, name, digest, resume=resume)
        with writing(home, "a run"):
            directory.parent.mkdir(parents=True, exist_ok=True)
            if not directory.exists():
                try:
                    directory.mkdir()
                except FileExistsError:  # made meanwhile by another process
                    continue
            try:
                file = (directory / LOCK).open("a")
            except FileNotFoundError:  # removed meanwhile
                continue
        try:
            lock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(directory / LOCK))
        except FileNotFoundError:
            same = False
        except BlockingIOError:
            file.close()
            if resume:
                process = read_status(directory).get("pid", "another one")
                raise BadInput(
                    f"run {directory.name} is being trained by process {process}; wait for it, stop it, "
                    "or train a second version at the same time with --no-resume"
                ) from None
            continue
        if not same or is_finished(directory):  # removed, or finished by the process that has just released the lock
            file.close()
            continue
        only_here(file)
        return directory, file


def unfinished_with_other_config(directory: Path, name: str, config: dict[str, Any]) -> list[str]:
    """A line for each unfinished run of the same name with another config, naming the keys that differ."""
    lines = []
    for other in sorted(directory.parent.glob(f"{name}-*")):
        if other == directory or is_finished(other) or not (other / "checkpoints").is_dir():
            continue
        before = read_document(other / CONFIG).values  # empty if it cannot be read
        if before.get("output_name") != name:
            continue
        # Options that a config leaves open are filled in during a run; this is no difference.
        changed = [key for key, value in config.items() if value is not None and before.get(key) != value]
        if changed:
            listed = ", ".join(f"{key} {before.get(key)!r} there, {config[key]!r} here" for key in changed[:5])
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            lines.append(f"run {other.name} is unfinished but has another config ({listed}{more}): not resumed")
    return lines
