"""Measure what it costs to get preference data ready for DPO, beside TRL 1.16 on the same file.

    .venv/bin/python scripts/bench_data.py [--hh FILE] [--tokenizer DIR] [--rows 160000] [--peer-rows 160000]
                                           [--repeats N] [--output FILE]

Writes as many pairs as asked for, made of those of --hh (without it of invented ones of HH's lengths) with words put
in. Then measures on one thread, each in a new process: the set-up of `rlhf dpo`'s data with nothing stored, that of a
second stage in the same home, and the construction of TRL's DPOTrainer. Writes docs/benchmarks_data.md.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import ROOT, call, child_environment, machine, said

from rlhf_pipeline.errors import BadInput

ROWS, MAX_LENGTH, VOCABULARY = 160_000, 512, 4096
SIDES = {"first": "ours, nothing stored", "second": "ours, a second stage", "trl": "TRL's DPOTrainer"}
CPU_RATIO, SECOND_SECONDS = 0.35, 3.0
MEMORY_MB = {160_000: 400, 1_000_000: 1000}
"""Most resident memory above that after imports, by the number of pairs."""
MODEL = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": True,
}

Pair = tuple[str, str, str]
"""A prompt and the two replies to it."""


def pairs_of(source: Path | None) -> list[Pair]:
    """The pairs of a file, else invented ones of HH's lengths.

    Raises:
        BadInput: the file does not exist.
        DataError: it has no pairs.
    """
    if source is None:
        from bench_work import synthetic_pairs

        return [(row["prompt"], row["chosen"], row["rejected"]) for row in synthetic_pairs(2300)]
    if not source.is_file():
        raise BadInput(f"--hh {source}: no such file; expected preference pairs (chosen, rejected), or leave it out")
    from rlhf_pipeline.data.kinds import as_kind
    from rlhf_pipeline.data.load import read_records
    from rlhf_pipeline.data.records import plain

    records, _ = as_kind(read_records(str(source), skip_bad_rows=True).records, "pair", str(source))
    return [(plain(one.prompt or ""), plain(one.completions[0]), plain(one.completions[1])) for one in records]


def variants(pairs: Sequence[Pair], count: int, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield `count` rows of transcripts: the pairs in turn, from the second turn on with a word put into each text."""
    draw = random.Random(seed)
    words = sorted({word for pair in pairs for word in re.findall(r"\b[a-z]{4,}\b", pair[1])}) or ["word"]

    def varied(text: str) -> str:
        parts = text.split(" ")
        parts[draw.randrange(len(parts))] += f" {draw.choice(words)}"
        return " ".join(parts)

    for number in range(count):
        prompt, *replies = pairs[number % len(pairs)]
        if number >= len(pairs):
            # The prompt keeps its last turn, so that it still ends in the mark of a reply.
            head, mark, tail = prompt.rpartition("\n\n")
            prompt, replies = varied(head) + mark + tail, [varied(reply) for reply in replies]
        yield dict(zip(("chosen", "rejected"), (prompt + reply for reply in replies)))


def prepare(folder: Path, options: argparse.Namespace) -> list[Pair]:
    """Write tokenizer and model for both sides into a folder; return the pairs.

    Raises:
        BadInput: no such tokenizer. DataError, BadInput: as `pairs_of`.
    """
    pairs = pairs_of(options.hh)
    from transformers.utils import logging

    from rlhf_pipeline.data.tokenizers import load_tokenizer, train_byte_level_bpe
    from rlhf_pipeline.models.loading import init_causal_lm, save_model

    logging.disable_progress_bar()
    if options.tokenizer is None:
        tokenizer = train_byte_level_bpe(["".join(pair) for pair in pairs], VOCABULARY)
    else:
        tokenizer = load_tokenizer(str(options.tokenizer))
    save_model(init_causal_lm({**MODEL, "vocab_size": len(tokenizer)}, tokenizer, seed=0), tokenizer, folder / "model")
    return pairs


@contextmanager
def measured(found: dict[str, Any]) -> Iterator[None]:
    """Note the CPU and wall seconds of a block, and its peak of resident memory above that at its start, in MB."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, cpu, wall = _memory("VmRSS"), sum(os.times()[:4]), time.perf_counter()
    yield
    found["wall_seconds"], found["cpu_seconds"] = time.perf_counter() - wall, sum(os.times()[:4]) - cpu
    found["memory_mb"] = _memory("VmHWM") - before


def _memory(name: str) -> float:
    """A figure of this process's memory, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024 / 1e6


def ours(model: str, pairs: str, home: str) -> dict[str, Any]:
    """The data of `rlhf dpo`: training and evaluation examples."""
    import rlhf_pipeline.stages.dpo  # noqa: F401  (all that the stage imports)
    from rlhf_pipeline.config.dpo import DpoConfig
    from rlhf_pipeline.data.tokenizers import load_tokenizer
    from rlhf_pipeline.stages.data import StageData

    keys: dict[str, Any] = {"output_name": "dpo", "model_name_or_path": model, "dataset_name": pairs}
    config = DpoConfig(**keys, max_length=MAX_LENGTH, skip_bad_rows=True, learning_rate=1e-6)
    tokenizer = load_tokenizer(model)
    tokenizer("the first text")
    found: dict[str, Any] = {}
    with measured(found):
        data = StageData(config, Path(home), lambda line: print(line, file=sys.stderr))
        train, _ = data.training(tokenizer)
        held_out, _ = data.held_out("preference", tokenizer)
    return {**found, "examples": [len(train), len(held_out)]}


def peer(model: str, pairs: str, folder: str) -> dict[str, Any]:
    """A DPOTrainer of TRL on all rows of the file."""
    import datasets
    import trl
    from transformers import AutoModelForCausalLM, AutoTokenizer

    datasets.disable_progress_bars()
    models = [AutoModelForCausalLM.from_pretrained(model) for _ in range(2)]
    keys: dict[str, Any] = {"output_dir": folder, "report_to": "none", "use_cpu": True, "bf16": False}
    arguments = trl.DPOConfig(**keys, max_length=MAX_LENGTH, gradient_checkpointing=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer("the first text")
    found: dict[str, Any] = {}
    with measured(found):
        rows = datasets.load_dataset("json", data_files=pairs, split="train")
        sides = {"model": models[0], "ref_model": models[1], "processing_class": tokenizer}
        trainer = trl.DPOTrainer(**sides, args=arguments, train_dataset=rows)
    return {**found, "examples": [len(trainer.train_dataset)], "trl": trl.__version__}


CHILDREN: dict[str, Callable[[str, str, str], dict[str, Any]]] = {"first": ours, "second": ours, "trl": peer}


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The runs of all sides, for every number of pairs and every round."""
    runs: list[dict[str, Any]] = []
    pairs = prepare(folder, options)
    file = folder / "pairs.jsonl"
    for rows in options.rows:
        with file.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in variants(pairs, rows))
        for number in range(options.repeats):
            sides = ["first", "second", *(["trl"] if rows <= options.peer_rows else [])]
            for side in sides if number % 2 == 0 else sorted(sides, key=lambda side: side != "trl"):
                place = folder / f"round-{number}" / ("trl" if side == "trl" else "home")
                place.mkdir(parents=True, exist_ok=True)
                words = ("--side", side, str(folder / "model"), str(file), str(place))
                found = call(sys.executable, "bench_data.py", *words, environment=child_environment(1, place))
                runs.append({"rows": rows, "file_mb": file.stat().st_size / 1e6, "side": side, **found})
                said = f"{found['cpu_seconds']:.1f} CPU s, {found['memory_mb']:,.0f} MB"
                print(f"{rows:,} pairs, round {number + 1}/{options.repeats}, {SIDES[side]}: {said}", file=sys.stderr)
            shutil.rmtree(folder / f"round-{number}")
    return runs


def summary(runs: Sequence[dict[str, Any]], rows: int, side: str, key: str) -> float | None:
    """The median of a figure over the rounds; the largest one of memory. None without a run."""
    found = [run[key] for run in runs if (run["rows"], run["side"]) == (rows, side)]
    if not found:
        return None
    return max(found) if key == "memory_mb" else statistics.median(found)


def targets(runs: Sequence[dict[str, Any]], rows: int) -> list[tuple[str, float, float, str]]:
    """What is aimed at for a number of pairs: (name, found, most, format)."""

    def of(side: str, key: str) -> float | None:
        return summary(runs, rows, side, key)

    found = []
    first, theirs, second = of("first", "cpu_seconds"), of("trl", "cpu_seconds"), of("second", "wall_seconds")
    if first is not None and theirs:
        found.append(("nothing stored: CPU seconds / TRL's", first / theirs, CPU_RATIO, ".2f"))
    if second is not None:
        found.append(("a second stage: seconds until its data are ready", second, SECOND_SECONDS, ".1f"))
    limit = next((most for size, most in MEMORY_MB.items() if rows <= size), None)
    memory = [one for one in (of("first", "memory_mb"), of("second", "memory_mb")) if one is not None]
    if limit is not None and memory:
        found.append(("resident memory above that after imports, MB", max(memory), limit, ",.0f"))
    return found


def document(options: argparse.Namespace, runs: Sequence[dict[str, Any]]) -> str:
    """The text of docs/benchmarks_data.md."""
    about, sizes = machine(), list(dict.fromkeys(run["rows"] for run in runs))
    words = ["python scripts/bench_data.py", *([f"--hh {options.hh.name}"] if options.hh else [])]
    words += [f"--tokenizer {options.tokenizer.name}"] if options.tokenizer else []
    words += ["--rows " + " ".join(map(str, options.rows))] if options.rows != [ROWS] else []
    words += [f"--peer-rows {options.peer_rows}"] if options.peer_rows != ROWS else []
    words += [f"--repeats {options.repeats}"] if options.repeats != 1 else []
    table = [
        "| pairs | | CPU seconds | seconds | peak memory, MB | examples |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    aims = ["| pairs | | found | at most | |", "| ---: | --- | ---: | ---: | --- |"]
    for rows in sizes:
        for side, title in SIDES.items():
            if (cpu := summary(runs, rows, side, "cpu_seconds")) is None:
                continue
            wall, memory = (summary(runs, rows, side, key) for key in ("wall_seconds", "memory_mb"))
            kept = next(run["examples"] for run in runs if (run["rows"], run["side"]) == (rows, side))
            counted = " + ".join(f"{count:,}" for count in kept)
            table.append(f"| {rows:,} | {title} | {cpu:.1f} | {wall:.1f} | {memory:,.0f} | {counted} |")
        for name, value, most, form in targets(runs, rows):
            reached = "reached" if value <= most else "**not reached**"
            aims.append(f"| {rows:,} | {name} | {value:{form}} | {most:{form}} | {reached} |")
    files = ", ".join(
        f"{run['file_mb']:,.0f} MB for {run['rows']:,} pairs" for run in {r["rows"]: r for r in runs}.values()
    )
    source = "invented words, of HH's lengths" if options.hh is None else f"the pairs of `{options.hh.name}`"
    own = options.tokenizer
    reader = f"byte-level BPE of {VOCABULARY:,} tokens" if own is None else f"that of `{own.name}`"
    version = next((run["trl"] for run in runs if run["side"] == "trl"), "1.16.0")
    rounds = "One round." if options.repeats == 1 else f"Medians of {options.repeats} rounds; the largest peak."
    blocks = [
        "# Benchmarks of the data's set-up",
        f"Made by `{' '.join(words)}` on {datetime.date.today().isoformat()}. The stages' speed is in "
        "[benchmarks.md](benchmarks.md).",
        "\n".join(table),
        "\n".join(aims),
        f"The file: {source}, in turn, later ones with a word put into the prompt and each reply; columns "
        f"`chosen` and `rejected`, JSON lines ({files}). Tokenizer: {reader}; `max_length: {MAX_LENGTH}`.\n"
        "Ours: from the file to the examples of `rlhf dpo` (training + evaluation, at most 2,000 of it), as "
        "`StageData` gives them to the stage. Nothing stored: in a new home, where records and token ids of 8 MiB or "
        "more are also written to `cache/tokens/`. A second stage: a new process in the same home.\n"
        f"TRL {version}: `datasets.load_dataset` and `DPOTrainer`'s construction on all rows, with empty caches.",
        "Not counted: imports, tokenizer, models. Every row is a process of its own, on one thread. CPU seconds: user "
        "and system. Memory: the peak of resident memory during the set-up, less that before it; pages of mapped files "
        f"count. {rounds}",
        f"Machine: {about['processor']}, {about['cores']} cores, {about['memory_gib']:.0f} GiB, {about['system']}.",
    ]
    return "\n\n".join(blocks) + "\n"


def main(words: Sequence[str] | None = None) -> int:
    """Measure and write the document; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hh", type=Path, metavar="FILE", help="preference pairs; without it a synthetic set")
    parser.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help=f"default: a BPE of {VOCABULARY} tokens of the pairs"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[ROWS], help=f"numbers of pairs (default: {ROWS})")
    parser.add_argument("--peer-rows", type=int, default=ROWS, help=f"run TRL up to this number (default: {ROWS})")
    parser.add_argument("--repeats", type=int, default=1, help="rounds (default: 1)")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks_data.md")
    parser.add_argument("--side", nargs=4, metavar=("SIDE", "MODEL", "FILE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.side:
        side, *places = options.side
        print(json.dumps(CHILDREN[side](*places)))
        return 0

    def benchmark() -> str:
        if options.tokenizer is not None and not options.tokenizer.is_dir():
            raise BadInput(f"--tokenizer {options.tokenizer}: no such folder; expected a tokenizer, or leave it out")
        if min([*options.rows, options.repeats]) < 1:
            raise BadInput("--rows, --repeats: found a number below 1; expected at least 1")
        with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
            runs = measure(options, Path(folder))
        text = document(options, runs)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(text, encoding="utf-8")
        return text

    return said(benchmark)


if __name__ == "__main__":
    sys.exit(main())
