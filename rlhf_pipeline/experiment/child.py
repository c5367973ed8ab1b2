"""New Python processes that get their work on standard input and answer on a pipe of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO


def calling_main(module: str) -> str:
    """The program of a child that calls the `main` of a module with the file descriptor of its answers.

    It has the parent's import path, so it finds the same modules. Nothing is imported before the path is set.
    """
    return f"import sys; sys.path[:] = sys.argv[2:]; from {module} import main; sys.exit(main(int(sys.argv[1])))"


class Child:
    """A new Python process, not a fork, that leads a session of its own: Ctrl-C reaches only the parent.

    Its standard input is a pipe from the parent, which ends if the parent dies in any way.

    Args:
        program: its first argument is the file descriptor that it writes its answers to, the rest the import path.
        environment: all variables of the process.
        said: the file that gets all its output; None: it goes to the parent's standard error, because the parent's
            standard output carries the result of the command.
    """

    def __init__(self, program: str, environment: Mapping[str, str], said: Path | None = None):
        reading, writing = os.pipe()
        output = None if said is None else said.open("w")
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program, str(writing), *map(str, sys.path)],
                stdin=subprocess.PIPE,
                stdout=2 if output is None else output,
                stderr=output,
                pass_fds=(writing,),
                start_new_session=True,
                env=environment,
                text=True,
            )
        except BaseException:
            os.close(reading)
            raise
        finally:
            os.close(writing)
            if output is not None:
                output.close()
        self.answers = os.fdopen(reading)
        self.killed = False

    @property
    def _jobs(self) -> IO[str]:
        assert self.process.stdin is not None
        return self.process.stdin

    def give(self, line: str) -> None:
        """Send a line; that a process has died is seen later, by its end."""
        with suppress(BrokenPipeError):
            self._jobs.write(line)
            self._jobs.flush()

    def kill(self) -> None:
        """Kill the process and its children, unless it has ended."""
        if self.process.poll() is None:
            self.killed = True
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Wait for the process to end, and close the pipes."""
        self.process.wait()
        with suppress(BrokenPipeError):
            self._jobs.close()
        self.answers.close()
