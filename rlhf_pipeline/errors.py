"""Every error that this package raises on purpose.

    RlhfError                    exit 1
    ├── BadInput                 exit 2: the user can mend it
    │   ├── ConfigError          faults of a config, an override or an argument
    │   ├── DataError            faults of a data source
    │   ├── UnknownReference     no such model or data set
    │   ├── MismatchError        two things that do not belong together
    │   └── DamagedFile          a file is not what its manifest says
    ├── RunFailed                exit 1: diverged, out of memory, disk full
    └── Interrupted              exit 130 / 143: stopped by a signal, checkpoint written

An error says what was found and where, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# What a terminal would obey and not show (control characters but tab and newline, marks that reorder text), and halves
# of surrogate pairs, which no encoding holds.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text for the terminal: what it would obey is shown by its escape."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with an input."""

    where: str
    found: str
    expected: str = ""
    fix: str = ""

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.fix:
            parts.append(self.fix)
        # Half a surrogate pair in a key or a value is shown by its number: no stream or file can hold it.
        return "; ".join(parts).encode(errors="backslashreplace").decode()


class RlhfError(Exception):
    """Root of all errors of this package."""

    exit_code = 1


class BadInput(RlhfError):
    """Something the user gave cannot be used."""

    exit_code = 2


class FaultyInput(BadInput):
    """An input with one or more faults, all of them listed."""

    SHOWN = 20

    def __init__(self, faults: Sequence[Fault] | Fault | str):
        if isinstance(faults, str):
            faults = [Fault("", faults)]
        elif isinstance(faults, Fault):
            faults = [faults]
        self.faults = list(faults)
        lines = [str(fault) for fault in self.faults[: self.SHOWN]]
        if len(self.faults) > self.SHOWN:
            lines.append(f"... and {len(self.faults) - self.SHOWN} more")
        super().__init__("\n".join(lines))


class ConfigError(FaultyInput):
    """Faults of a config file, an override or a command-line argument."""


class DataError(FaultyInput):
    """Faults of the rows of a data source."""


class UnknownReference(BadInput):
    """A model or data reference that names nothing."""


class MismatchError(BadInput):
    """Two things that do not belong together; the message names both."""


class DamagedFile(BadInput):
    """A file whose content is not what its manifest says."""


class RunFailed(RlhfError):
    """A run that could not go on: diverged, out of memory, disk full.

    agreed: whether every process of the run raises one now, and none may leave before all of them do.
    """

    agreed = False


class Interrupted(RlhfError):
    """A run stopped by a signal after its checkpoint was written."""

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean 'a' or 'b'?" for the nearest of `choices`, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
