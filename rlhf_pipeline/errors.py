"""Every error that this package raises on purpose.

A message states what was found and where, what was expected, and what to do. `kind` names the class in the JSON output
of a failed command; `exit_code` is 1 for a run that failed, 2 for input that the user can correct, and 128 + the number
of the signal that stopped the run.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

# Characters that a terminal executes instead of showing (control characters except tab and newline, marks that reorder
# text), and halves of surrogate pairs, which no encoding can represent.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """The text with escapes in place of the characters that a terminal would execute."""
    return UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class name; at most 200 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with an input."""

    where: str
    found: str
    expected: str = ""
    fix: str = ""
    key: str = field(default="", compare=False)
    """The key of the config that is at fault, if there is one; `where` ends with it."""

    @classmethod
    def read(cls, line: str) -> Fault:
        """Parse a line of a message, `found; expected X; fix`, as `str` of a fault writes it."""
        found, _, rest = line.partition("; expected ")
        expected, _, fix = rest.partition("; ")
        return cls("", found, expected, fix)

    def as_dict(self) -> dict[str, str]:
        """Return the fault for JSON; `where` omits the key, which has its own field."""
        where = "" if self.where == self.key else self.where.removesuffix(f": {self.key}") if self.key else self.where
        found = self.found.removeprefix("found ")
        return {"where": where, "key": self.key, "found": found, "expected": self.expected, "fix": self.fix}

    def __str__(self) -> str:
        parts = [f"{self.where}: {self.found}" if self.where else self.found]
        if self.expected:
            parts.append(f"expected {self.expected}")
        if self.fix:
            parts.append(self.fix)
        # Half a surrogate pair in a key or a value is shown by its number, because no stream or file can hold it.
        return "; ".join(parts).encode(errors="backslashreplace").decode()


class RlhfError(Exception):
    """Root of all errors of this package."""

    exit_code = 1
    kind = "failed"


class BadInput(RlhfError):
    """Something the user gave cannot be used."""

    exit_code = 2
    kind = "input"


class FaultyInput(BadInput):
    """An input with one or more faults; the message lists them, at most SHOWN."""

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

    kind = "config"


class DataError(FaultyInput):
    """Faults of the rows of a data source."""

    kind = "data"


class UnknownReference(BadInput):
    """A model or data reference that names nothing."""

    kind = "reference"


class MismatchError(BadInput):
    """Two things that do not belong together; the message names both."""

    kind = "mismatch"


class DamagedFile(BadInput):
    """A file whose content differs from its manifest."""

    kind = "damaged"


class RunFailed(RlhfError):
    """A run that could not continue: diverged, out of memory, disk full.

    agreed: whether every process of the run raises this error now. No process may then exit before all have raised it.
    elsewhere: whether the cause is the error of another process.
    """

    kind = "run"
    agreed = False
    elsewhere = False


class Interrupted(RlhfError):
    """A run stopped by a signal after its checkpoint was written."""

    kind = "interrupted"

    def __init__(self, message: str, signal_number: int):
        super().__init__(message)
        self.exit_code = 128 + signal_number


class ProcessFailed(RlhfError):
    """The error of one of the processes of a run, as that process has described it."""

    def __init__(self, message: str, kind: str, exit_code: int, faults: Iterable[Mapping[str, str]]):
        super().__init__(message)
        self.kind, self.exit_code = kind, exit_code
        self.faults = [Fault(**fault) for fault in faults]


def faults_of(error: RlhfError) -> list[Fault]:
    """Return the faults of an error: those that it lists, else one fault per line of the message."""
    return (
        error.faults
        if isinstance(error, FaultyInput | ProcessFailed)
        else list(map(Fault.read, str(error).split("\n")))
    )


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return "did you mean 'a' or 'b'?" for the nearest of `choices`, or an empty string."""
    near = difflib.get_close_matches(word, list(choices), n=3, cutoff=0.6)
    return f"did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
