"""`python -m tests.faults.traps TRAP [VALUE ...] -- WORDS`: `rlhf WORDS` in a process of its own, with a trap set."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable
from typing import Any

import pytest


def signal_at(step: str) -> None:
    """SIGTERM while an update is logged."""
    from tests.faults import kills

    kills.signal_at(int(step))()


def spoil(stage: str, figure: str, bad: str) -> None:
    """NaN or an infinity in what the model says, in the loss or in the gradient of one example."""
    from tests.training import test_finite

    fault, value = test_finite.Fault(pytest.MonkeyPatch(), stage), float(bad)
    if figure not in ("loss", "gradient"):
        fault.spoil_output(figure, value)
        return
    name, change = test_finite.LOSSES[stage]

    def act(found: Any) -> Any:
        return found + value if figure == "loss" else test_finite.Poison.apply(found, value)

    fault.spoil_function(name, lambda found: change(found, act))
    assert not math.isfinite(value)


def memory(most: str, error: str) -> None:
    """Training that has room for only so many completions; `error` numbers the way in which that is said."""
    from tests.training import test_halves

    test_halves.Limit(pytest.MonkeyPatch(), int(most), error=test_halves.ERRORS[int(error)])


def closed() -> None:
    """Permission bits bind also for root."""
    from tests.faults.disks import without_privileges

    without_privileges()


def cut_off(note: str) -> None:
    """Every connection to another machine is refused and noted."""

    def tell(what: object) -> None:
        with open(note, "a", encoding="utf-8") as file:
            file.write(f"{what}\n")

    def refuse(self: socket.socket, address: Any, *rest: Any) -> None:
        tell(address)
        raise OSError(101, "Network is unreachable")

    def refuse_name(host: Any, *rest: Any, **options: Any) -> None:
        tell(host)
        raise socket.gaierror(-2, "Name or service not known")

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", refuse)
    patch.setattr(socket.socket, "connect_ex", refuse)
    patch.setattr(socket, "getaddrinfo", refuse_name)


TRAPS: dict[str, Callable[..., None]] = {
    "signal_at": signal_at,
    "spoil": spoil,
    "memory": memory,
    "closed": closed,
    "cut_off": cut_off,
}


def main(arguments: list[str]) -> int:
    at = arguments.index("--")
    (name, *values), words = arguments[:at], arguments[at + 1 :]
    TRAPS[name](*values)
    from rlhf_pipeline.cli.main import main

    return main(words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
