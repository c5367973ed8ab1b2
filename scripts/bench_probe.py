"""Measuring tools for both sides of bench.py: a stopwatch, peak memory, and the rate of a matrix product.

    python scripts/bench_probe.py THREADS

prints the rates of a matrix product. Imports only the standard library and torch, which the environments of both sides
have.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()  # before the import of torch: the set-up time of a side starts here
LOAD_BEFORE = os.getloadavg()[0]
PACKAGES = ("rlhf-pipeline", "trl", "torch", "transformers", "accelerate", "datasets", "tokenizers")
PRODUCT = 1024
ATTEMPTS = 40
LORA_TARGETS = ("q_proj", "v_proj")
"""The matrices that get adapters on both sides."""

Rows = Sequence[Sequence[Sequence[int]]]  # examples, each the token ids of its sequences


def _status(key: str) -> int | None:
    """A value of /proc/self/status in bytes; None if it is missing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return None


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    # ru_maxrss is the last resort: on Linux it starts at the memory of the parent process.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or int(peak if sys.platform == "darwin" else peak * 1024)


def restart_peak() -> None:
    """Reset the peak (on Linux; elsewhere it remains that since the start of the process)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def digest(rows: Rows) -> str:
    """A digest of the examples of one step, independent of their order."""
    return hashlib.sha256(json.dumps(sorted(rows)).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions of the libraries in this process."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def failure(error: subprocess.CalledProcessError) -> str:
    """The message on a command that failed, with the end of its output."""
    said = "\n".join(error.stderr.strip().splitlines()[-15:])
    return f"{' '.join(map(str, error.cmd))} ended with exit code {error.returncode}:\n{said}"


class Stopwatch:
    """Times the steps of one run. A step is an optimizer step; for PPO it is an update (a rollout and all its steps).

    Args:
        warmup: the number of first steps that do not count. examples: examples (episodes) per step.
    """

    def __init__(self, *, warmup: int, examples: int):
        self.warmup, self.examples = warmup, examples
        self.times: list[float] = []
        self.flops: list[float] = []
        self.losses: list[float] = []
        self.seen: list[Rows] = []
        self.optimizer_steps = 0
        self.setup_seconds = 0.0
        self.loaded_bytes: int | None = None
        self.peak = self.training_peak = 0

    def ready(self, optimizer: Any = None) -> None:
        """Record the end of set-up, just before the first step."""
        # Accelerate and the trainers wrap the optimizer, some of them after this point.
        inner = getattr(optimizer, "optimizer", optimizer)
        if inner is not None:
            inner.register_step_post_hook(self._stepped)
        gc.collect()
        self.peak, self.loaded_bytes = peak_bytes(), _status("VmRSS")
        restart_peak()
        now = time.perf_counter()
        self.setup_seconds = now - BEGAN
        self.times.append(now)

    def _stepped(self, *_: Any) -> None:
        self.optimizer_steps += 1

    def saw(self, rows: Rows) -> None:
        """Record the examples of a step; they are read after the run."""
        self.seen.append(rows)

    def tick(self, flops: float | None = None, loss: float | None = None) -> None:
        """Record the end of a step. flops: FLOPs since the start. loss: loss of this step."""
        self.times.append(time.perf_counter())
        self.training_peak = peak_bytes()  # before the end of the run, when models are saved
        self.flops += [] if flops is None else [flops]
        self.losses += [] if loss is None else [loss]

    def report(self, side: str, stage: str, bf16: bool) -> dict[str, Any]:
        """The figures of the run.

        Raises:
            RuntimeError: no step was taken after those of the warm-up.
        """
        import torch

        seconds = [after - before for before, after in zip(self.times, self.times[1:])]
        timed = seconds[self.warmup :]
        if not timed:
            raise RuntimeError(f"{stage}: {len(seconds)} steps, {self.warmup} of them warm-up: no step was timed")
        return {
            "side": side,
            "stage": stage,
            "precision": "bf16" if bf16 else "fp32",
            "steps": len(timed),
            "examples": len(timed) * self.examples,
            "seconds": [round(value, 5) for value in timed],
            "warmup_seconds": sum(seconds[: self.warmup]),
            "setup_seconds": self.setup_seconds,
            "peak_bytes": max(self.peak, self.training_peak),
            "loaded_bytes": self.loaded_bytes,
            "training_peak_bytes": self.training_peak,
            "flops": self.flops[-1] - self.flops[self.warmup - 1] if self.warmup and self.flops else None,
            "loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "optimizer_steps": self.optimizer_steps,
            "digests": [digest(rows) for rows in self.seen],
            "threads": torch.get_num_threads(),
            "load": [LOAD_BEFORE, os.getloadavg()[0]],
            "versions": versions(),
        }


def run_side(side: str, stages: Sequence[str], measure: Callable[[str, dict[str, Any], bool], Stopwatch]) -> int:
    """Run the command line of one side, `STAGE WORK.json [--bf16]`; the last line on stdout is the report."""
    parser = argparse.ArgumentParser(description=f"One timed run of bench.py: {side}.")
    parser.add_argument("stage", choices=stages)
    parser.add_argument("work", type=Path, help="the file that bench.py has written")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    options = parser.parse_args()
    try:
        work = json.loads(options.work.read_text())
    except (OSError, ValueError) as error:
        print(f"error: {options.work}: not a work file of bench.py ({error})", file=sys.stderr)
        return 2
    with contextlib.redirect_stdout(sys.stderr):  # trainers print there
        report = measure(options.stage, work, options.bf16).report(side, options.stage, options.bf16)
    print(json.dumps(report))
    return 0


def product_rates(threads: int) -> dict[str, float]:
    """FLOP/s of the fastest of several products of two square matrices, by precision."""
    import torch

    torch.set_num_threads(threads)
    rates = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        left, right = (torch.randn(PRODUCT, PRODUCT).to(dtype) for _ in range(2))
        best = float("inf")
        for _ in range(ATTEMPTS):
            begin = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - begin)
        rates[name] = 2.0 * PRODUCT**3 / best
    return rates


if __name__ == "__main__":
    print(json.dumps(product_rates(int(sys.argv[1]))))
