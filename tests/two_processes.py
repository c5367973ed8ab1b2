"""A program in several processes that know of each other as `torchrun` would have it."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Lab
from tests.faults import children


def in_two_processes(program: str, *arguments: str) -> tuple[list[int | None], list[str]]:
    """`in_processes` with ranks 0 and 1."""
    return in_processes(2, program, *arguments)


def run_stages(lab: Lab, count: int, program: str, runs: Sequence[tuple[Any, ...]]) -> list[str]:
    """Run (stage, config, whatever else the program reads) one after another in `count` ranks; returns the outputs."""
    values = json.dumps([(stage, config.model_dump(mode="json"), *how) for stage, config, *how in runs])
    codes, outputs = in_processes(count, program, str(lab.home), values)
    assert codes == [0] * count, "\n".join(outputs)
    return outputs


def run_of(lab: Lab, name: str) -> Path:
    """The directory of the only run of a name."""
    (run,) = (lab.home / "runs").glob(f"{name}-*")
    return run


def same(lab: Lab, name: str, expected: str, *, within: float = 1e-5, but: Sequence[str] = ()) -> None:
    """Weights of two runs are the same to 1e-5, all metrics (but some) `within` that, and each step is written once."""
    found, weights = lab.weights(name), lab.weights(expected)
    assert found.keys() == weights.keys()
    assert max(float((found[key] - weights[key]).abs().max()) for key in weights) <= 1e-5
    mine, theirs = lab.rows(run_of(lab, name)), lab.rows(run_of(lab, expected))
    assert [row["step"] for row in mine] == [row["step"] for row in theirs]
    for row, other in zip(mine, theirs, strict=True):
        left_out = {*but}
        if row["step"] == 1:  # policy and reference agree: the signs are rounding
            left_out.add("rewards/accuracies")
        row, other = ({key: value for key, value in each.items() if key not in left_out} for each in (row, other))
        assert row == pytest.approx(other, abs=within)


def in_processes(count: int, program: str, *arguments: str) -> tuple[list[int | None], list[str]]:
    """Run a Python program on the CPU as so many ranks; returns the exit codes and what was said.

    The processes are forked from this one, which has imported everything already: a new one takes seconds for that.
    """
    children.prepare()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}

    def work(rank: str) -> int:
        from accelerate.state import AcceleratorState, PartialState

        AcceleratorState._reset_state()  # what the parent process has found out about itself
        PartialState._reset_state()
        os.environ |= {**shared, "RANK": rank, "LOCAL_RANK": rank}
        sys.argv = ["-c", *arguments]
        try:
            exec(compile(program, "program", "exec"), {"__name__": "__main__"})
        except SystemExit as left:
            return left.code
        return 0

    with tempfile.TemporaryDirectory() as folder:
        workers = [
            children.fork_to(lambda rank=rank: work(rank), Path(folder) / rank) for rank in map(str, range(count))
        ]
        try:
            outcomes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.send(signal.SIGKILL)
    return [outcome.code for outcome in outcomes], [outcome.out + outcome.err for outcome in outcomes]
