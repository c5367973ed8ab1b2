"""Measure the waiting time before training: two updates of every stage on the demo's model, each in a new process.

    .venv/bin/python scripts/startup.py [--stages dpo,ppo] [--pairs N] [--threads N] [--repeats N] [--home DIR]
                                        [--quick]

Makes the demo's SFT model, pairs and reward model in a temporary home with the command line. Two updates are enough,
because the quality of the models does not affect the time. (With --home it uses sft, pairs and reward of that home, and
adds versions of startup-STAGE.) Then times in turn, each as a process from start to end: `rlhf --help`; the import of
torch, transformers and accelerate; the import of everything that a stage's models need; and
`rlhf STAGE --config configs/demo/STAGE.yaml max_steps=2`. DPO computes the reference's log-probabilities in its first
run and reads them from the cache afterwards. Prints a table on stdout.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench_probe import failure

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "configs/demo"
RLHF = (sys.executable, "-m", "rlhf_pipeline.cli.main")
CONFIGS = {"sft": "sft.yaml", "train-rm": "reward.yaml", "dpo": "dpo.yaml", "ppo": "ppo.yaml"}
PAIRS, QUICK_PAIRS = 36000, 400
THREADS, REPEATS, UPDATES = 2, 3, 2
HELP, PLAIN, IMPORTS = "rlhf --help", "import torch, transformers, accelerate", "import what the models need"
IMPORTING = {
    PLAIN: "import torch, transformers, accelerate",
    IMPORTS: "from rlhf_pipeline.cli.libraries import load_libraries; load_libraries()",
}


def seconds(command: Sequence[str], environment: dict[str, str]) -> float:
    """Wall time of a process from its start to its end.

    Raises:
        CalledProcessError: the process failed.
    """
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return time.perf_counter() - started


def stage_command(stage: str, home: Path, **overrides: object) -> list[str]:
    """`rlhf STAGE --config configs/demo/... KEY=VALUE`, in a home."""
    words = [f"{key}={value}" for key, value in overrides.items()]
    return [*RLHF, stage, "--home", str(home), "--config", str(DEMO / CONFIGS[stage]), *words]


def make_inputs(home: Path, pairs: int, environment: dict[str, str]) -> None:
    """Make the demo's SFT model, pairs and reward model with two updates each."""
    sft, reward = (stage_command(stage, home, max_steps=UPDATES) for stage in ("sft", "train-rm"))
    collect = [*RLHF, "data", "collect", "--home", str(home), "--config", str(DEMO / "pairs.yaml"), f"num={pairs}"]
    for command in (sft, collect, reward):
        seconds(command, environment)


def commands(stages: Sequence[str], home: Path) -> dict[str, list[str]]:
    """The timed commands, by their names in the table."""
    timed = {HELP: [*RLHF, "--help"]}
    timed |= {name: [sys.executable, "-c", code] for name, code in IMPORTING.items()}
    for stage in stages:
        # A separate name, so that the inputs remain the latest versions of their names.
        name = f"startup-{stage}"
        timed[f"rlhf {stage}"] = stage_command(stage, home, max_steps=UPDATES, output_name=name)
    return timed


def table(taken: dict[str, list[float]]) -> str:
    """Median and range of every command, and the share of the plain import in the stages' medians."""
    plain = statistics.median(taken[PLAIN])
    width = max(map(len, taken))
    lines = [f"{'':{width}}  median s   range s        importing torch, transformers, accelerate"]
    for name, values in taken.items():
        median = statistics.median(values)
        span = f"{min(values):.2f} - {max(values):.2f}"
        share = f"{plain / median:.0%}" if name not in (HELP, *IMPORTING) else ""
        lines.append(f"{name:{width}}  {median:8.2f}   {span:13}  {share}".rstrip())
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Make the inputs, time everything, print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(CONFIGS), help="stages, separated by commas")
    parser.add_argument("--pairs", type=int, help=f"number of pairs to collect (default {PAIRS}, as in the demo)")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--repeats", type=int, help=f"number of times that everything is timed (default {REPEATS})")
    parser.add_argument("--home", type=Path, help="a home with the models sft and reward and the data pairs")
    parser.add_argument("--quick", action="store_true", help="few pairs, everything timed once")
    options = parser.parse_args(words)
    options.stages = [stage for stage in options.stages.split(",") if stage]
    if unknown := [stage for stage in options.stages if stage not in CONFIGS]:
        parser.error(f"--stages {unknown[0]}: expected some of {', '.join(CONFIGS)}")
    options.pairs = options.pairs or (QUICK_PAIRS if options.quick else PAIRS)
    options.repeats = options.repeats or (1 if options.quick else REPEATS)
    pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))
    environment = {**os.environ, **pinned, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    try:
        with tempfile.TemporaryDirectory(prefix="startup-") as folder:
            home = options.home or Path(folder) / "home"
            if options.home is None:
                make_inputs(home, options.pairs, environment)
            timed = commands(options.stages, home.resolve())
            taken: dict[str, list[float]] = {name: [] for name in timed}
            for _ in range(options.repeats):  # the commands take turns, so that a slow minute affects all of them
                for name, command in timed.items():
                    taken[name].append(seconds(command, environment))
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"error: {failure(error)}\n")
        return 1
    sys.stdout.write(table(taken) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
