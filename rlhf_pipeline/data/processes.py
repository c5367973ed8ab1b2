"""Work that several processes share: forked from this one, in a fixed order, and never longer alive than it."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from rlhf_pipeline.errors import RunFailed

Item = TypeVar("Item")


def taken_in_turns(work: Callable[[int, int], Iterable[Item]], processes: int) -> Iterator[Item]:
    """Yield what each of several processes makes, one item of each in turn, until one has no more.

    Args:
        work: gets the number of a process and how many there are, and makes the items of that process.

    Raises:
        RunFailed: a process was ended from outside. Errors of `work` are raised here.
    """
    context = multiprocessing.get_context("fork")  # the children have tokenizer and records without loading them
    readers: list[Any] = []
    children: list[Any] = []
    try:
        for number in range(processes):
            reader, writer = context.Pipe(duplex=False)
            readers.append(reader)
            child = context.Process(target=_serve, args=(work, number, processes, writer, [*readers]), daemon=True)
            with warnings.catch_warnings():
                # Python 3.12 warns of threads that a child does not have; it uses none of theirs.
                warnings.simplefilter("ignore", DeprecationWarning)
                child.start()
            children.append(child)
            writer.close()
        while True:
            for reader, child in zip(readers, children):
                try:
                    made, error, ended = reader.recv()
                except EOFError:
                    child.join()
                    found = f"one of {processes} processes that encode texts was ended (exit code {child.exitcode})"
                    raise RunFailed(f"{found}; if memory ran out, lower dataset_num_proc") from None
                if error is not None:
                    raise error
                if ended:
                    return
                yield made
    finally:
        for child in children:
            child.kill()
            child.join()
        for reader in readers:
            reader.close()


def _serve(
    work: Callable[[int, int], Iterable[Any]], number: int, processes: int, writer: Any, readers: Sequence[Any]
) -> None:
    """Send what one process makes; a child whose parent has ended cannot send, and ends too."""
    for reader in readers:
        reader.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        try:
            for made in work(number, processes):
                writer.send((made, None, False))
            writer.send((None, None, True))
        except BrokenPipeError:
            raise
        except Exception as error:
            writer.send((None, error, False))
    except BrokenPipeError:
        pass


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> tuple[int | None, int | None]:
    """Bytes of memory in all, at most those of the container, and available; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        found = {name: int(size) * 1024 for name, size in re.findall(r"^(\w+): +(\d+) kB", text, re.MULTILINE)}
        total, free = found["MemTotal"], found["MemAvailable"]
    except (OSError, KeyError):
        return None, None
    with suppress(OSError, ValueError):  # "max": no limit
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8")))
    return total, min(free, total)
