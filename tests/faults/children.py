"""Children that run the real command line: forked from a parent that has everything imported, or fresh processes."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMEOUT = 120.0
WRITING = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "fsync")
"""What a child can be killed at: the audit events that change files, and `fsync`, which has none of its own."""


@dataclass(frozen=True)
class Outcome:
    """How a child ended. code: its exit code; None where a signal killed it."""

    code: int | None
    killed_by: int | None
    out: str
    err: str
    seconds: float
    late: float | None = None  # seconds from the signal that it was sent to its end


@dataclass
class Child:
    """A running child and the files that it writes its output to."""

    pid: int
    out: Path
    err: Path
    started: float
    status: int | None = None  # the wait status, once the child was seen to have ended

    def send(self, number: int) -> None:
        """Send a signal; a child that has ended already gets none."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has ended."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = status if pid else None
        return self.status is not None

    def wait(self, timeout: float = TIMEOUT, sent: float | None = None) -> Outcome:
        """Wait for the end. sent: when it was told to end, by `time.perf_counter`.

        Raises:
            TimeoutError: it did not end; it is killed.
        """
        expired = threading.Event()

        def give_up() -> None:
            expired.set()
            self.send(signal.SIGKILL)

        timer = threading.Timer(timeout, give_up)
        timer.start()
        try:
            if self.status is None:
                _, self.status = os.waitpid(self.pid, 0)
        finally:
            timer.cancel()
        status, now = self.status, time.perf_counter()
        if expired.is_set():
            raise TimeoutError(f"a child did not end within {timeout:g} s; it said:\n{self.err.read_text()[-2000:]}")
        return Outcome(
            os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
            self.out.read_text(errors="replace"),
            self.err.read_text(errors="replace"),
            now - self.started,
            None if sent is None else now - sent,
        )


def prepare() -> None:
    """Import in the parent what the children need; nothing is computed, so no thread pool exists before the fork."""
    from rlhf_pipeline.cli.libraries import load_libraries

    load_libraries()
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    from rlhf_pipeline.stages import collect, dpo, ppo, reward, sft  # noqa: F401

    torch.set_num_threads(1)


def fork(words: Sequence[str], folder: Path, *, before: Callable[[], None] | None = None) -> Child:
    """Run `rlhf WORDS` in a forked child.

    Args:
        folder: for its output. before: called in the child first, to set a trap.
    """

    def work() -> int:
        import rlhf_pipeline.training.tracking as tracking
        from rlhf_pipeline.cli.main import main

        tracking.console.file = sys.stderr
        if before is not None:
            before()
        return main(list(words))

    return fork_to(work, folder)


def fork_to(work: Callable[[], int], folder: Path) -> Child:
    """Call a function in a forked child whose exit code it returns; the child's output goes to files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "out.txt", folder / "err.txt"
    sys.stdout.flush()
    sys.stderr.flush()
    started = time.perf_counter()
    pid = os.fork()
    if pid:
        return Child(pid, out, err, started)
    code = 70
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
        for path, descriptor in ((out, 1), (err, 2)):
            target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(target, descriptor)
            os.close(target)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        code = work()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def fresh(
    words: Sequence[str], folder: Path, *, trap: Sequence[str] = (), cwd: Path | None = None, **variables: str
) -> Child:
    """Run `rlhf WORDS` in a process of its own.

    Args:
        folder: for its output. trap: of `traps`, with its values. cwd: its working directory. variables: of its
        environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "out.txt", folder / "err.txt"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    with out.open("w") as stdout, err.open("w") as stderr:
        started = time.perf_counter()
        module = ["tests.faults.traps", *trap, "--"] if trap else ["rlhf_pipeline.cli.main"]
        command = [sys.executable, "-m", *module, *words]
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, cwd=cwd)
    process.returncode = 0  # waited for by its number, not by this object
    return Child(process.pid, out, err, started)


def run(words: Sequence[str], folder: Path, *, before: Callable[[], None] | None = None) -> Outcome:
    """Run `rlhf WORDS` in a forked child to its end."""
    return fork(words, folder, before=before).wait()


def watch_writing(home: Path, act: Callable[[int], None]) -> Callable[[], None]:
    """A trap: `act(n)` is called before the n-th thing that the child does to the files below `home`."""

    def install() -> None:
        count = 0
        root = str(home)

        def happened(event: str, argument: object) -> None:
            nonlocal count
            if event == "open":
                path, _, flags = argument  # type: ignore[misc]
                writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
                inside = isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(root) and writes
            elif event == "fsync":
                inside = True
            else:
                first = argument[0] if isinstance(argument, tuple) and argument else None
                inside = isinstance(first, (str, os.PathLike)) and str(first).startswith(root)
                inside = inside or not isinstance(first, (str, os.PathLike))  # removed relative to an open folder
            if inside:
                count += 1
                act(count)

        def hook(event: str, argument: object) -> None:
            if event in WRITING:
                happened(event, argument)

        sync = os.fsync

        def fsync(descriptor: int) -> None:
            happened("fsync", None)
            sync(descriptor)

        os.fsync = fsync
        sys.addaudithook(hook)

    return install


def die_at(home: Path, number: int) -> Callable[[], None]:
    """A trap: SIGKILL before the child's `number`-th act on the files of a home."""

    def act(count: int) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return watch_writing(home, act)


def count_writing(home: Path, note: Path) -> Callable[[], None]:
    """A trap that harms nobody: it keeps the number of acts on the files of a home in `note`."""
    handle: list[int] = []

    def act(count: int) -> None:
        if not handle:
            handle.append(os.open(note, os.O_WRONLY | os.O_CREAT))
        os.pwrite(handle[0], f"{count:12d}".encode(), 0)

    return watch_writing(home, act)


def kill_after(child: Child, seconds: float) -> Outcome:
    """SIGKILL a child after so many seconds, unless it has ended."""
    timer = threading.Timer(seconds, child.send, (signal.SIGKILL,))
    timer.start()
    try:
        return child.wait()
    finally:
        timer.cancel()


def processes(variable: str, value: str) -> list[int]:
    """The running processes that were started with this variable in their environment (Linux)."""
    found, mark = [], f"{variable}={value}\0".encode()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark in (folder / "environ").read_bytes():
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                found += [] if state in "ZX" else [int(folder.name)]
        except OSError:  # it has just ended
            continue
    return found


def gone(variable: str, value: str, seconds: float) -> bool:
    """Whether no process with this variable runs any more, after waiting for at most so many seconds."""
    until = time.monotonic() + seconds
    while found := processes(variable, value):
        if time.monotonic() > until:
            break
        time.sleep(0.01)
    return not found


def draws(seed: int, what: str) -> random.Random:
    """Random numbers of one kind of fault."""
    return random.Random(f"{seed} {what}")
