"""Compute the figures of bench.py from its runs, and write docs/benchmarks.md."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import product
from typing import Any

from bench_probe import LORA_TARGETS

TITLES = {
    "dpo": "DPO, reference online",
    "reward": "reward model",
    "sft": "SFT, completion only",
    "ppo": "PPO, separate critic",
    "ppo_shared": "PPO, shared trunk",
}
STAGES = tuple(TITLES)
"""What is measured by default."""
METHODS = ("dpo", "kto", "simpo", "orpo", "ppo", "rloo", "grpo")
"""What is measured with --methods."""
TITLES |= {
    "kto": "KTO, labelled responses",
    "simpo": "SimPO",
    "orpo": "ORPO",
    "rloo": "RLOO, 8 responses a prompt",
    "grpo": "GRPO, 8 responses a prompt",
}
UNITS = {
    **dict.fromkeys(("dpo", "reward", "simpo", "orpo"), "pairs"),
    "sft": "examples",
    "kto": "responses",
    **dict.fromkeys(("ppo", "ppo_shared", "rloo", "grpo"), "episodes"),
}
# Ratio of our rate to the peer's in fp32: the required minimum, and the aim.
TARGETS = {"dpo": (5.75, 8.0), "reward": (3.76, 5.0), "sft": (3.62, 5.0), "ppo": (1.97, 3.0), "ppo_shared": (3.3, 5.0)}
TARGETS |= dict.fromkeys(("kto", "simpo", "orpo", "rloo", "grpo"), (4.5, 8.0))
PRETRAINED_TARGETS = {
    "dpo": (2.5, 4.0),
    "reward": (2.2, 3.5),
    "sft": (2.0, 3.0),
    "ppo": (2.0, 3.0),
    "ppo_shared": (2.0, 3.0),
}
PRETRAINED_TARGETS |= dict.fromkeys(("kto", "simpo", "orpo", "rloo", "grpo"), PRETRAINED_TARGETS["dpo"])
MEMORY_AIM = 0.6
"""The largest share of the peer's peak memory, with a pretrained model."""
BF16_AIM = 1.8
"""The least ratio of our rate in bf16 to our own in fp32."""
SETUP = {
    "GFLOP per example": ("gflop_per_example", ".2f"),
    "set-up, s, ours / TRL": ("setup_seconds", ".1f"),
    "warm-up, s": ("warmup_seconds", ".1f"),
    "optimizer steps": ("optimizer_steps", "d"),
    "mean loss": ("loss", ".5f"),
}
"""Columns of the second table: key of a side and format."""

Run = dict[str, Any]


def peer_stage(stage: str) -> str:
    """The peer's stage that a stage is compared with; it has no shared trunk, only a separate critic."""
    return "ppo" if stage == "ppo_shared" else stage


def rate(run: Run) -> float:
    """Examples (episodes) per second."""
    return run["examples"] / sum(run["seconds"])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def _pick(runs: Sequence[Run], side: str, stage: str, precision: str) -> list[Run]:
    found = [run for run in runs if (run["side"], run["stage"], run["precision"]) == (side, stage, precision)]
    return sorted(found, key=lambda run: run["round"])


def _work_flops(runs: Sequence[Run], stage: str) -> float | None:
    """FLOPs of one example by the formula of this package: the same value for both sides and precisions."""
    counted = [run["flops"] / run["examples"] for run in runs if run["stage"] == stage and run["flops"]]
    return statistics.median(counted) if counted else None


def summarise(runs: Sequence[Run], peak: dict[str, float], *, pretrained: bool = False) -> list[dict[str, Any]]:
    """One row for each stage and precision with the same rounds on both sides; each ratio is taken within one round.

    Args:
        runs: reports of both sides, each with its round. peak: FLOP/s of a matrix product, by precision.
        pretrained: whether the model is; it has other targets.
    """
    rows, targets = [], PRETRAINED_TARGETS if pretrained else TARGETS
    for precision, stage in product(("fp32", "bf16"), TITLES):
        ours = _pick(runs, "ours", stage, precision)
        peer = _pick(runs, "peer", peer_stage(stage), precision)
        if not peer or [run["round"] for run in ours] != [run["round"] for run in peer]:
            continue
        ratio = spread([rate(mine) / rate(theirs) for mine, theirs in zip(ours, peer)])
        row: dict[str, Any] = {"stage": stage, "precision": precision, "ratio": ratio}
        row["floor"], row["aim"] = targets[stage] if precision == "fp32" else (None, None)
        for side, found in (("ours", ours), ("peer", peer)):
            flops = _work_flops(runs, stage if side == "ours" else peer_stage(stage))
            rates = spread([rate(run) for run in found])
            row[side] = {
                "rate": rates,
                "gflop_per_example": None if flops is None else flops / 1e9,
                "share_of_peak": None if flops is None else flops * rates["median"] / peak[precision],
                "peak_bytes": max(run["peak_bytes"] for run in found),
                "training_bytes": max(
                    (run["training_peak_bytes"] - run["loaded_bytes"] for run in found if run["loaded_bytes"]),
                    default=None,
                ),
                "setup_seconds": statistics.median(run["setup_seconds"] for run in found),
                "warmup_seconds": statistics.median(run["warmup_seconds"] for run in found),
                "loss": found[0]["loss"],
                "optimizer_steps": found[0]["optimizer_steps"],
            }
        rows.append(row)
    return rows


def verdict(row: dict[str, Any]) -> str:
    """Compare the median ratio with minimum and aim."""
    if row["floor"] is None:
        return ""
    ratio = row["ratio"]["median"]
    if ratio >= row["aim"]:
        return "aim reached"
    return "above the floor" if ratio >= row["floor"] else "below the floor"


def _range(values: dict[str, float]) -> str:
    return f"{values['median']:.1f} ({values['low']:.1f}-{values['high']:.1f})"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _mib(count: float | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.0f}"


def rate_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rates, ratios, shares of the peak and memory, as lines of Markdown."""
    lines = [
        "| stage | ours, per second | TRL, per second | ratio | floor / aim | | share of the peak, ours / TRL "
        "| peak memory, ours / TRL, MiB | for training |",
        "| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        ours, peer = row["ours"], row["peer"]
        target = "-" if row["floor"] is None else f"{row['floor']:g} / {row['aim']:g}"
        cells = (
            TITLES[row["stage"]],
            f"{_range(ours['rate'])} {UNITS[row['stage']]}",
            _range(peer["rate"]),
            f"**{row['ratio']['median']:.2f}** ({row['ratio']['low']:.2f}-{row['ratio']['high']:.2f})",
            target,
            verdict(row),
            f"{_share(ours['share_of_peak'])} / {_share(peer['share_of_peak'])}",
            f"{_mib(ours['peak_bytes'])} / {_mib(peer['peak_bytes'])}",
            f"{_mib(ours['training_bytes'])} / {_mib(peer['training_bytes'])}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def memory_shares(rows: Sequence[dict[str, Any]]) -> str:
    """Our peak memory as a share of the peer's, against the aim."""
    shares = [
        f"{TITLES[row['stage']]} ({row['precision']}) {row['ours']['peak_bytes'] / row['peer']['peak_bytes']:.2f}"
        for row in rows
    ]
    return f"Peak memory, our share of TRL's (aim {MEMORY_AIM:g} at most): {', '.join(shares)}."


def bf16_table(runs: Sequence[Run]) -> list[str]:
    """Our rate in bf16 over our own in fp32, each ratio within one round, and peak memory, as lines of Markdown."""
    lines = [
        f"| stage | bf16 / fp32, ours | aim {BF16_AIM:g} | peak memory, MiB: ours in fp32 / in bf16 / TRL's in bf16 |",
        "| --- | ---: | --- | ---: |",
    ]
    for stage in TITLES:
        plain, half = (_pick(runs, "ours", stage, precision) for precision in ("fp32", "bf16"))
        if not half or [run["round"] for run in plain] != [run["round"] for run in half]:
            continue
        ratio = spread([rate(mine) / rate(other) for mine, other in zip(half, plain)])
        sides = (plain, half, _pick(runs, "peer", peer_stage(stage), "bf16"))
        peaks = (_mib(max((run["peak_bytes"] for run in side), default=None)) for side in sides)
        reached = "reached" if ratio["median"] >= BF16_AIM else "not reached"
        cells = (TITLES[stage], f"**{ratio['median']:.2f}** ({ratio['low']:.2f}-{ratio['high']:.2f})", reached)
        lines.append("| " + " | ".join((*cells, " / ".join(peaks))) + " |")
    return lines


def setup_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Quantities outside the rates, and those that must agree on both sides, as lines of Markdown."""
    lines = ["| stage | | " + " | ".join(SETUP) + " |", "| --- | --- |" + " ---: |" * len(SETUP)]
    for row in rows:
        cells = [TITLES[row["stage"]], row["precision"]]
        for key, form in SETUP.values():
            found = (row[side][key] for side in ("ours", "peer"))
            cells.append(" / ".join("-" if value is None else format(value, form) for value in found))
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def describe_work(work: dict[str, Any], repeats: int) -> list[str]:
    """A description of the work, as paragraphs."""
    sizes, lengths = work["sizes"], work["lengths"]
    model, lora = sizes["model"], sizes["lora"]
    if work["model"] is None:
        described = (
            f"Byte-level BPE of {sizes['vocab_size']:,} tokens trained on them; {model['model_type']}, hidden "
            f"{model['hidden_size']}, MLP {model['intermediate_size']}, {model['num_hidden_layers']} layers, "
            f"{model['num_attention_heads']} heads, tied embeddings: {work['parameters'] / 1e6:.1f} M random weights, "
            "identical on both sides."
        )
    else:
        trained = f"adapters of rank {lora} on {' and '.join(LORA_TARGETS)}" if lora else "all weights"
        described = (
            f"`{work['model']}` and its tokenizer, {work['parameters'] / 1e6:.1f} M pretrained weights; {trained} are "
            "trained. Both sides read the same files."
        )
    random = "A model with random weights rarely ends a response early."
    ends = random if work["model"] is None else "Each side samples its own responses, and their lengths differ."
    listed = ", ".join(f"{name} {found['median']:g} ({found['p95']:g})" for name, found in lengths.items())
    if work["source"] == "synthetic":
        source = "Synthetic transcripts with lengths from log-normal distributions fitted to HH's"
    else:
        source = f"Preference pairs of `{work['source']}`"
    return [
        f"{source}: the first {sizes['examples']:,} after {sizes['warmup'] * sizes['batch']} of warm-up, with at most "
        f"{sizes['max_length']} tokens in the prompt and the longer response. "
        f"Tokens, median (95th percentile): {listed}.",
        f"{described} Batch {sizes['batch']}, AdamW, linear schedule.",
        f"PPO: {sizes['episodes']} episodes after {sizes['warmup_updates'] * sizes['rollout']} of warm-up, prompts up "
        f"to {sizes['prompt_length']} tokens, {sizes['new_tokens']} new tokens, rollouts of {sizes['rollout']}, "
        f"{sizes['ppo_epochs']} epochs of {sizes['minibatches']} minibatches, the same prompts in every rollout. "
        f"RLOO and GRPO: the same, with {sizes['group']} responses to each prompt. {ends}",
        f"{repeats} rounds. In each round both sides run once, each in its own process, in alternating order. The "
        "tables show medians (smallest-largest); each ratio is taken within one round. The benchmark checks that both "
        "sides take the same examples in every step. Evaluation, logging and saving are off or not timed. TRL's "
        "gradient checkpointing, on by default, is off because it would slow TRL down. TRL's SFT pads, because its "
        "packing needs flash attention.",
    ]


def outside_the_rates(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is not in the rates, as paragraphs."""
    return [
        "## Not included in the rates",
        "\n".join(setup_table(rows)),
        "Set-up: imports, loading models, tokenising. Losses are means over all steps and agree if both sides computed "
        "the same. Where each side samples its own responses there is no loss here, nor for ORPO, in which TRL takes "
        "the SFT loss over prompt and response. TRL's PPO has no shared trunk, so both PPO rows are compared with its "
        "separate critic. TRL's PPO does not clip gradients; ours does.",
    ]


def document(found: dict[str, Any]) -> str:
    """The text of docs/benchmarks.md. found: the JSON that bench.py writes."""
    rows, peaks = found["rows"], found["peaks"]
    plain = [row for row in rows if row["precision"] == "fp32"]
    bf16 = [row for row in rows if row["precision"] == "bf16"]
    start, end = ({name: value / 1e9 for name, value in peaks[place].items()} for place in (0, -1))
    best = {name: max(start[name], end[name]) for name in start}
    machine, loads = found["machine"], [load for run in found["runs"] for load in run["load"]]
    beside = "All targets, and why some are not reached: [targets.md](targets.md)."
    described = describe_work(found["work"], found["repeats"])
    blocks = ["# Benchmarks", f"Made by `{found['command']}` on {found['date']}. {beside}"]
    if found["quick"]:
        blocks.append("A smoke test on a tiny model and a few examples: its figures do not measure speed.")
    if plain:
        blocks.append("\n".join(rate_table(plain)))
    if found["work"]["model"] is not None and rows:
        blocks.append(memory_shares(rows))
    if bf16:
        but = " (TRL's PPO still samples and scores in fp32)" if any("ppo" in row["stage"] for row in bf16) else ""
        blocks += [f"bf16 autocast on both sides{but}:", "\n".join(rate_table(bf16))]
    if len(own := bf16_table(found["runs"])) > 2:
        blocks += ["Our own bf16 autocast beside fp32, in the same rounds:", "\n".join(own)]
    sides = found["versions"].values()
    versions = ["| | " + " | ".join(found["versions"]) + " |", "| --- |" + " --- |" * len(sides)]
    for name in dict.fromkeys(name for side in sides for name in side):
        versions.append(f"| {name} | " + " | ".join(side.get(name, "-") for side in sides) + " |")
    blocks += [
        "Share of the peak: the rate in FLOP/s divided by the rate of a matrix product. FLOPs follow the package's "
        "formula (a pair's prompt counts once, no padding). The matrix product is that of two "
        f"{found['product']} x {found['product']} matrices on {found['threads']} threads of this machine: "
        f"{best['fp32']:.0f} GFLOP/s in fp32, {best['bf16']:.0f} in bf16 (at the start {start['fp32']:.0f} and "
        f"{start['bf16']:.0f}, at the end {end['fp32']:.0f} and {end['bf16']:.0f}).\n"
        "Peak memory: of the whole process, the largest of all rounds. For training: the part above the memory in use "
        "when the first step began.",
        "## The work",
        *(described if rows else [*described[:-1], f"{found['repeats']} rounds; each run is a process of its own."]),
        *(outside_the_rates(rows) if rows else ()),
        "## The machine",
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, {machine['system']}; "
        f"{found['threads']} threads pinned; the one-minute load average was {min(loads):.1f} to "
        f"{max(loads):.1f} during the run.",
        "\n".join(versions),
    ]
    return "\n\n".join(blocks) + "\n"
