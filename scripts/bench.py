"""Benchmark every stage against its peer: SFT, reward model and DPO with TRL's trainers, PPO with that of TRL 1.12.

    .venv/bin/python scripts/bench.py [--hh FILE] [--stages dpo,reward,sft,ppo,ppo_shared] [--bf16] [--quick]
                                      [--model FOLDER [--lora RANK]] [--methods] [--ours]

Prepares the work once (bench_work.py), runs both sides alternately, each in its own process (bench_ours.py,
bench_peer.py), at least three times, and writes docs/benchmarks.md and its figures as JSON. It creates the environment
of TRL 1.12 if that is missing, as scripts/parity_ppo.py does. With --model the policy is pretrained, the work is less,
and the figures go to docs/benchmarks_pretrained.md (with --lora: docs/benchmarks_pretrained_lora.md). With --methods
the stages are DPO and PPO beside KTO, SimPO, ORPO, RLOO and GRPO (docs/benchmarks_methods.md). With --bf16 --ours our
side runs alone, in bf16 and in fp32 (docs/benchmarks_own_bf16.md).
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench_probe import PRODUCT, failure
from bench_table import METHODS, STAGES, TITLES, document, peer_stage, rate, summarise
from parity_ppo import ENVIRONMENT, dump, peer_python

from rlhf_pipeline.errors import BadInput, RlhfError

ROOT = Path(__file__).parent.parent
LEAST = 3
THREADS = 2


def processor() -> str:
    """The name of the processor."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*: *(.+)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """The machine on which the figures were measured."""
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "system": f"{platform.system()} {platform.machine()}",
    }


def child_environment(threads: int, folder: Path) -> dict[str, str]:
    """The environment of a run: fixed threads, no network, no cache of an earlier run, no GPU."""
    pinned = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {
        **os.environ,
        **pinned,
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_EXPERIMENTAL_SILENCE": "1",
    }


def call(python: Path | str, script: str, *words: str, environment: dict[str, str]) -> dict[str, Any]:
    """The JSON on the last line of a script's output.

    Raises:
        CalledProcessError: the script failed.
    """
    command = [str(python), str(Path(__file__).with_name(script)), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peer_of_ppo(environment: Path, interpreter: str) -> Path:
    """The interpreter of the environment with TRL 1.12.

    Raises:
        RlhfError: the environment cannot be created.
    """
    try:
        return peer_python(environment, interpreter)
    except (OSError, subprocess.CalledProcessError) as error:
        raise RlhfError(
            f"{environment}: cannot create the environment of TRL 1.12 ({error}); "
            "run the other stages only: --stages dpo,reward,sft"
        ) from None


def turns(stages: Sequence[str], number: int) -> list[tuple[str, str]]:
    """The runs of a round as (side, stage); each stage of the peer once, and the sides alternate in going first."""
    order: list[tuple[str, str]] = []
    for peer in dict.fromkeys(map(peer_stage, stages)):
        ours = [("ours", stage) for stage in stages if peer_stage(stage) == peer]
        order += [*ours, ("peer", peer)] if number % 2 else [("peer", peer), *ours]
    return order


def require_same_work(runs: Sequence[dict[str, Any]]) -> None:
    """Check that both sides of a round took the same examples in every step.

    Raises:
        RlhfError: a step differs; the message names the first one.
    """
    peers = {(run["stage"], run["precision"], run["round"]): run for run in runs if run["side"] == "peer"}
    for run in runs:
        peer = peers.get((peer_stage(run["stage"]), run["precision"], run["round"]))
        if run["side"] == "peer" or peer is None or run["digests"] == peer["digests"]:
            continue
        pairs = zip(run["digests"], peer["digests"])
        step = next((n for n, (mine, theirs) in enumerate(pairs, 1) if mine != theirs), None)
        counts = f"{len(run['digests'])} steps of ours, {len(peer['digests'])} of the peer's"
        where = counts if step is None else f"step {step}"
        raise RlhfError(f"{run['stage']}, round {run['round']}: {where}: the two sides took other examples")


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All rounds, and the machine's peak before and after them."""
    from bench_work import PRETRAINED, QUICK, Sizes, prepare

    # Check everything that can be wrong before the long work.
    sizes = replace(QUICK if options.quick else PRETRAINED if options.model else Sizes(), lora=options.lora)
    work = prepare(folder / "work", options.hh, sizes, options.threads, options.model)
    needs_ppo = "ppo" in map(peer_stage, options.stages) and not options.ours
    ppo_python = peer_of_ppo(options.environment, options.python) if needs_ppo else sys.executable
    environment = child_environment(options.threads, folder)

    def peak() -> dict[str, float]:
        return call(sys.executable, "bench_probe.py", str(options.threads), environment=environment)

    runs: list[dict[str, Any]] = []
    peaks = [peak()]
    for number in range(1, options.repeats + 1):
        for bf16 in (False, True) if options.bf16 else (False,):
            for side, stage in turns(options.stages, number):
                if options.ours and side == "peer":
                    continue
                python = ppo_python if (side, stage) == ("peer", "ppo") else sys.executable
                words = [stage, str(folder / "work/work.json"), *(["--bf16"] if bf16 else [])]
                run = call(python, f"bench_{side}.py", *words, environment=environment) | {"round": number}
                runs.append(run)
                load = " to ".join(f"{value:.1f}" for value in run["load"])
                what = f"round {number}/{options.repeats}  {TITLES[stage]}, {run['precision']}, {side}"
                setup = f"(set-up {run['setup_seconds']:.1f} s, load {load})"
                print(f"{what}: {rate(run):.2f}/s  {setup}", file=sys.stderr)
            require_same_work(runs)
    peaks.append(peak())
    best = {name: max(found[name] for found in peaks) for name in peaks[0]}
    versions = {"ours and TRL's other trainers": next(run["versions"] for run in runs if run["side"] == "ours")}
    if needs_ppo:
        versions["TRL's PPO"] = next(run["versions"] for run in runs if (run["side"], run["stage"]) == ("peer", "ppo"))
    left_out = ("policy", "reward", "pairs", "labels", "prompts", "order", "prompt_order")
    return {
        "command": command_of(options),
        "quick": options.quick,
        "date": datetime.date.today().isoformat(),
        "machine": machine(),
        "threads": options.threads,
        "repeats": options.repeats,
        "versions": versions,
        "product": PRODUCT,
        "peaks": peaks,
        "work": {key: value for key, value in work.items() if key not in left_out},
        "rows": summarise(runs, best, pretrained=options.model is not None),
        "runs": [{key: value for key, value in run.items() if key != "digests"} for run in runs],
    }


def command_of(options: argparse.Namespace) -> str:
    """The command that reproduces these figures, without the folders of this machine."""
    words = ["python", "scripts/bench.py"]
    words += ["--hh", options.hh.name] if options.hh else []
    words += ["--model", options.model.name] if options.model else []
    words += ["--lora", str(options.lora)] if options.lora else []
    words += ["--methods"] if options.methods else []
    words += ["--stages", ",".join(options.stages)] if options.stages != known_stages(options) else []
    words += [f"--{name}" for name in ("bf16", "ours", "quick") if getattr(options, name)]
    words += ["--repeats", str(options.repeats)] if options.repeats != LEAST else []
    words += ["--threads", str(options.threads)] if options.threads != THREADS else []
    return " ".join(words)


def known_stages(options: argparse.Namespace) -> list[str]:
    """The stages that can be measured."""
    return list(METHODS if options.methods else STAGES)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked.

    Raises:
        BadInput: a stage or model does not exist, or there are too few rounds.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hh", type=Path, metavar="FILE", help="preference pairs; without it a synthetic set")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="a pretrained policy; without it random weights")
    parser.add_argument(
        "--lora", type=int, default=0, metavar="RANK", help="train adapters of this rank (with --model)"
    )
    parser.add_argument("--stages", help="default: all")
    parser.add_argument("--methods", action="store_true", help="the further methods, beside DPO and PPO")
    parser.add_argument("--repeats", type=int, help=f"rounds (default and least {LEAST}; with --quick 1)")
    parser.add_argument("--bf16", action="store_true", help="run everything also with bf16 autocast")
    parser.add_argument("--ours", action="store_true", help="without TRL: bf16 beside fp32 (with --bf16)")
    parser.add_argument("--quick", action="store_true", help="a smoke test on a few examples; its figures mean nothing")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--output", type=Path, help="default: see above; with --quick build/bench_quick.md")
    parser.add_argument("--json", type=Path, help="default: the output with the suffix .json")
    parser.add_argument("--environment", type=Path, default=ENVIRONMENT, help="environment of TRL 1.12")
    parser.add_argument("--python", default=sys.executable, help="interpreter that creates the environment")
    options = parser.parse_args(arguments)
    if options.model is not None and not (options.model / "config.json").is_file():
        raise BadInput(
            f"--model {options.model}: no config.json; expected the folder of a model in Hugging Face's form"
        )
    if options.lora < 0 or (options.lora and options.model is None):
        raise BadInput(f"--lora: found {options.lora}; expected a rank above 0, together with --model")
    if options.methods and options.lora:
        raise BadInput("--methods: found --lora beside it; expected all weights to be trained")
    if options.ours and not options.bf16:
        raise BadInput("--ours: found no --bf16; expected both, since the table sets our bf16 beside our fp32")
    known = known_stages(options)
    given = known if options.stages is None else [stage.strip() for stage in options.stages.split(",") if stage.strip()]
    unknown = [stage for stage in given if stage not in known]
    if unknown or not given:
        raise BadInput(f"--stages: found {', '.join(unknown) or 'none'}; expected some of {','.join(known)}")
    options.stages = [stage for stage in known if stage in given]
    least = 1 if options.quick else LEAST
    options.repeats = least if options.repeats is None else options.repeats
    if options.repeats < least:
        raise BadInput(f"--repeats: found {options.repeats}; expected at least {least}, for a median and a spread")
    if options.threads < 1:
        raise BadInput(f"--threads: found {options.threads}; expected at least 1")
    name = f"benchmarks{'_pretrained' if options.model else ''}{'_lora' if options.lora else ''}"
    name += "_methods" if options.methods else ""
    name += "_own_bf16" if options.ours else ""
    options.output = options.output or ROOT / ("build/bench_quick.md" if options.quick else f"docs/{name}.md")
    options.json = options.json or options.output.with_suffix(".json")
    return options


def said(work: Callable[[], str]) -> int:
    """Print the text that `work` returns, or its error in one line; returns the exit code."""
    try:
        text = work()
    except subprocess.CalledProcessError as error:
        print(f"error: {failure(error)}", file=sys.stderr)
        return 1
    except RlhfError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(text)
    return 0


def benchmark(arguments: Sequence[str] | None) -> str:
    """Measure, write the document and its figures, and return the document."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    text = document(found)
    for path, content in ((options.json, dump(found)), (options.output, text)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    return said(partial(benchmark, arguments))


if __name__ == "__main__":
    sys.exit(main())
