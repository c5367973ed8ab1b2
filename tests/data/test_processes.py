"""Work of several processes: their items come in turn, and no process outlives the first one."""

from __future__ import annotations

import os
import signal

import pytest

from rlhf_pipeline.data.processes import taken_in_turns
from rlhf_pipeline.errors import DataError, Fault, RunFailed


def test_items_come_in_turn():
    def work(number: int, of: int):
        yield from ((place, os.getpid()) for place in range(number, 7, of))

    found = list(taken_in_turns(work, 3))
    assert [place for place, _ in found] == list(range(7))
    assert len({process for _, process in found} - {os.getpid()}) == 3


def test_an_error_of_a_process_is_raised():
    def work(number: int, of: int):
        yield number
        if number == 1:
            raise DataError([Fault("f:1", "wrong"), Fault("f:2", "wrong too")])
        yield number

    with pytest.raises(DataError, match="f:1: wrong\nf:2: wrong too") as caught:
        list(taken_in_turns(work, 2))
    assert len(caught.value.faults) == 2


def test_a_process_that_is_killed_is_an_error():
    def work(number: int, of: int):
        yield number
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RunFailed, match=r"one of 2 processes .* was ended \(exit code -9\); .* lower dataset_num_proc"):
        list(taken_in_turns(work, 2))


def test_the_processes_end_with_the_first_one():
    """It is killed; a pipe ends when all that can write to it have ended."""
    ends, writes = os.pipe()

    def work(number: int, of: int):
        while True:
            yield number

    parent = os.fork()
    if not parent:
        found = taken_in_turns(work, 3)
        os.write(writes, bytes([next(found)]))
        while True:
            next(found)
    os.close(writes)
    assert os.read(ends, 1) == b"\0"
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert os.read(ends, 1) == b""
    os.close(ends)
