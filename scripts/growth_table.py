"""From the rows of growth.py to docs/growth.md."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from bench_table import machine_line
from growth_words import (
    MIB,
    TOLERANCE,
    Row,
    fits,
    flatness,
    line,
    mib,
    milliseconds,
    own_seconds,
    per_unit,
    pick,
    rate,
    ratio,
    setup_seconds,
    step_seconds,
    table,
    times,
    values_of,
    work_and_rate,
)

MEMORY_TARGET = 1.3
"""Peak memory of a step at the largest vocabulary over that at the smallest: what it should stay within."""
FP32_COPIES = 16
"""Bytes of a parameter with its gradient and AdamW's two moments."""


def length(rows: Sequence[Row]) -> list[str]:
    cached, online = pick(rows, "length", "cached"), pick(rows, "length", "online")
    head = ["tokens of a pair", "pairs a step", "reference cached: ms a pair", "µs a token", "GFLOP a pair", "GFLOP/s"]
    head += ["attention's share of FLOPs", "peak memory, MiB", "KiB a token"]
    head += ["reference in each step: ms a pair", "over cached", "peak memory, MiB"]
    body = []
    for row, other in zip(cached, online):
        beyond = row["beyond_bytes"]
        body.append(
            (
                f"{row['value']:,}",
                f"{row['units']}",
                milliseconds(row, row["units"]),
                f"{1e6 * step_seconds(row) / row['tokens']:.1f}",
                f"{row['flops'] / row['units'] / 1e9:.2f}",
                f"{rate(row):.0f}",
                f"{row['shares']['attention']:.0%}",
                mib(beyond),
                "-" if beyond is None else f"{beyond / row['tokens'] / 1024:.0f}",
                milliseconds(other, other["units"]),
                f"{step_seconds(other) / step_seconds(row):.2f}",
                mib(other["beyond_bytes"]),
            )
        )
    first, last, values = cached[0], cached[-1], values_of(cached)
    shares = [f"{row['shares']['attention']:.0%}" for row in (first, last)]
    words = [
        flatness("Time per token (reference cached)", values, [step_seconds(row) / row["tokens"] for row in cached]),
        work_and_rate(cached, "token", lambda row: row["tokens"]),
        f"A token of a longer pair attends to more others: attention has {shares[0]} of the FLOPs at first and "
        f"{shares[1]} in the end.",
    ]
    if all(row["beyond_bytes"] for row in cached):
        words.append(flatness("Peak memory per token", values, [row["beyond_bytes"] / row["tokens"] for row in cached]))
    if fewer := [f"{row['units']} at {row['value']:,}" for row in cached if row["units"] != first["units"]]:
        words.append(f"A step has {first['units']} pairs, only {', '.join(fewer)}, so that the run stays short.")
    return [*table(head, body), "", " ".join(words)]


def data(rows: Sequence[Row]) -> list[str]:
    found = pick(rows, "data")
    first, last, values = found[0], found[-1], values_of(found)
    parts = list(first["setup"])
    head = ["examples", "ms a step", "set-up, s", *(f"{part}, s" for part in parts)]
    head += ["garbage collector, s", "set-up, µs an example", "without the collector", "resident after a step, MiB"]
    body = [
        (
            f"{row['value']:,}",
            milliseconds(row),
            f"{setup_seconds(row):.2f}",
            *(f"{row['setup'][part]:.3f}" for part in parts),
            f"{row['collector_seconds']:.3f}",
            f"{1e6 * setup_seconds(row) / row['value']:.0f}",
            f"{1e6 * own_seconds(row) / row['value']:.0f}",
            mib(row["resident_bytes"]),
        )
        for row in found
    ]
    collected = [f"{row['collector_seconds'] / setup_seconds(row):.0%}" for row in (first, last)]
    largest = max(parts, key=lambda part: last["setup"][part])
    words = [
        flatness("Time of a step", values, [step_seconds(row) for row in found], "it does not grow", "it grows"),
        flatness("Set-up per example", values, [setup_seconds(row) / row["value"] for row in found]),
        f"At {last['value']:,} {last['setup'][largest] / setup_seconds(last):.0%} of it is {largest}. Python's garbage "
        f"collector, which looks again and again at all that is kept, takes {collected[0]} of it at {first['value']:,} "
        f"and {collected[1]} at {last['value']:,}.",
        flatness("Without it, set-up per example", values, [own_seconds(row) / row["value"] for row in found]),
    ]
    if first["resident_bytes"] and last is not first:
        kept = (last["resident_bytes"] - first["resident_bytes"]) / (last["value"] - first["value"])
        words.append(f"An example, its record and texts included, keeps {kept / 1024:.1f} KiB in memory.")
    words.append(
        f"A step has {first['units']} pairs of about {first['tokens'] / first['units']:.0f} tokens. The reference's "
        "log-probabilities are stand-ins here: computing them costs a forward pass for each pair, once."
    )
    return [*table(head, body), "", " ".join(words)]


def memory_verdict(found: Sequence[Row]) -> str:
    """Memory of a step at the largest vocabulary, and where it is most, set against the target."""
    first, last = found[0], found[-1]

    def grown(row: Row, key: str) -> float:
        return row[key] / first[key]

    def judge(key: str) -> str:
        value = grown(last, key)
        most = max(found, key=lambda row: row[key])
        verdict = f"{times(value)}, {'within' if value <= MEMORY_TARGET else 'ABOVE'} the target of {MEMORY_TARGET:g}"
        return verdict + ("" if most is last else f" (most: {times(grown(most, key))} at {most['value']:,})")

    logits = 4 * last["value"] * last["predicted"] / MIB
    return (
        f"Memory of a step beyond weights, gradients and optimizer state, at {last['value']:,} over "
        f"{first['value']:,}: tensors {judge('tensor_bytes')}; resident {judge('beyond_bytes')}. "
        "What is resident above the tensors is freed memory that the allocator keeps. The logits of all "
        f"{last['predicted']:,} predicted tokens at once would be {logits:,.0f} MiB a copy."
    )


def vocabulary(rows: Sequence[Row]) -> list[str]:
    found = pick(rows, "vocabulary")
    first, last, values = found[0], found[-1], values_of(found)
    head = ["vocabulary", "ms a pair", "over the first", "GFLOP a pair", "GFLOP/s", "the head's share of FLOPs"]
    head += ["parameters, M", "weights, gradients, AdamW, MiB", "beyond them: tensors, MiB", "over the first"]
    head += ["resident, MiB", "over the first"]
    body = [
        (
            f"{row['value']:,}",
            milliseconds(row, row["units"]),
            ratio(per_unit(row), per_unit(first)),
            f"{row['flops'] / row['units'] / 1e9:.2f}",
            f"{rate(row):.0f}",
            f"{row['shares']['head']:.0%}",
            f"{row['parameters'] / 1e6:.2f}",
            mib(FP32_COPIES * row["parameters"]),
            mib(row["tensor_bytes"]),
            ratio(row["tensor_bytes"], first["tensor_bytes"]),
            mib(row["beyond_bytes"]),
            ratio(row["beyond_bytes"], first["beyond_bytes"]),
        )
        for row in found
    ]
    words = []
    if last is not first:
        fixed, slope, worst = line(values, [per_unit(row) for row in found])
        words.append(
            f"A straight line through the first and the last point has {1e3 * fixed:.1f} ms a pair and "
            f"{1e6 * slope:.1f} ms for each 1,000 entries; {fits(worst)} in the vocabulary on top of a fixed part."
        )
        if fixed > 0 and slope > 0:
            words.append(f"The head takes as long as all the rest at a vocabulary of about {fixed / slope:,.0f}.")
        words.append(work_and_rate(found, "pair", lambda row: row["units"]))
        if first["beyond_bytes"]:
            words.append(memory_verdict(found))
    return [*table(head, body), "", " ".join(words)]


def completions(rows: Sequence[Row]) -> list[str]:
    tree, pairs = pick(rows, "completions", "tree"), pick(rows, "completions", "pairs")
    head = ["completions of a prompt, K", "prompts a step", "one tree: ms a completion", "tokens read a completion"]
    head += ["GFLOP/s", "split into pairs: ms a completion", "tokens read a completion", "GFLOP/s", "over one tree"]
    body = [
        (
            f"{row['value']}",
            f"{row['units'] // row['value']}",
            milliseconds(row, row["units"]),
            f"{row['tokens'] / row['units']:.0f}",
            f"{rate(row):.0f}",
            milliseconds(other, other["units"]),
            f"{other['tokens'] / other['units']:.0f}",
            f"{rate(other):.0f}",
            ratio(per_unit(other), per_unit(row)),
        )
        for row, other in zip(tree, pairs)
    ]
    first, last = pairs[0], pairs[-1]
    words = [
        flatness("In one tree, time per completion", values_of(tree), [per_unit(row) for row in tree]),
        work_and_rate(tree, "completion", lambda row: row["units"]) + " More of them share their prompt.",
    ]
    if last is not first:
        shares = times((last["value"] - 1) / (first["value"] - 1))
        words.append(
            "`rlhf train-rm` takes a ranking as one tree. Split into K (K - 1) / 2 pairs, as `engine: trl` takes it, "
            "every completion is read K - 1 times, each time with half a prompt: "
            f"{shares} as often at K = {last['value']} as at {first['value']}. The time per completion becomes "
            f"{times(per_unit(last) / per_unit(first))} what it was: a prompt's cost grows with the square of K."
        )
    return [*table(head, body), "", " ".join(words)]


def batch(rows: Sequence[Row]) -> list[str]:
    found = pick(rows, "batch")
    first, values, best = found[0], values_of(found), min(map(per_unit, found))
    head = ["pairs of a micro-batch", "micro-batches a step", "ms a pair", "over the lowest", "GFLOP/s"]
    head += ["peak memory, MiB"]
    body = [
        (
            f"{row['value']}",
            f"{row['units'] // row['value']}",
            milliseconds(row, row["units"]),
            ratio(per_unit(row), best),
            f"{rate(row):.0f}",
            mib(row["beyond_bytes"]),
        )
        for row in found
    ]
    words = [flatness("Time per pair", values, list(map(per_unit, found)))]
    if len(found) > 1:
        counts = [row["units"] / row["value"] for row in found]
        fixed, each, worst = line(counts, list(map(step_seconds, found)))
        if each > 0 and fixed > 0:
            share = each * counts[0] / step_seconds(first)
            words.append(
                f"In the number of micro-batches a straight line has {1e3 * each:.1f} ms for each on top of "
                f"{1e3 * fixed / first['units']:.2f} ms a pair, {share:.0%} of the time with micro-batches of "
                f"{first['value']}; {fits(worst)}."
            )
    tokens = first["tokens"] / first["units"]
    words.append(f"Every step takes the same {first['units']} pairs of {tokens:.0f} tokens.")
    return [*table(head, body), "", " ".join(words)]


SECTIONS: dict[str, tuple[str, Callable[[Sequence[Row]], list[str]]]] = {
    "length": ("Length: DPO", length),
    "data": ("Data set: DPO on short pairs", data),
    "vocabulary": ("Vocabulary: DPO, narrow model, reference cached", vocabulary),
    "completions": ("Completions of a prompt: reward model", completions),
    "batch": ("Micro-batch: DPO on short pairs, reference cached", batch),
}


def describe_model(model: dict[str, Any]) -> str:
    return (
        f"hidden {model['hidden_size']}, MLP {model['intermediate_size']}, {model['num_hidden_layers']} layers, "
        f"{model['num_attention_heads']} heads"
    )


def document(found: dict[str, Any]) -> str:
    """docs/growth.md. found: what growth.py writes as JSON."""
    rows, sizes = found["rows"], found["sizes"]
    loads = [load for row in rows for load in row["load"]]
    lines = [
        "# How the cost grows",
        "",
        f"Made by `{found['command']}` on {found['date']}, in {found['minutes']:.1f} minutes.",
    ]
    if found["quick"]:
        lines += ["", "A smoke test on a tiny model and a few steps: these figures say nothing about speed."]
    lines += [
        "",
        f"Llama with random weights, fp32, {describe_model(found['model'])}, tied embeddings, vocabulary "
        f"{sizes['vocab_size']:,}; for the vocabulary {describe_model(found['small'])}. Made-up tokens; prompt : "
        "chosen : rejected = 2 : 1 : 1. "
        f"{'One process for all' if found['quick'] else 'Each point is a process of its own'}: {1 + sizes['warmup']} "
        f"steps of warm-up, then at least {sizes['least']}, or as many as {sizes['seconds']:g} seconds take, up to "
        f"{sizes['most']}; medians (smallest-largest), packing and the optimizer's step included, without a run around "
        "them (no log, no evaluation, no saving). FLOPs by our formula. Peak memory: resident, above that after the "
        "first step, when weights, gradients and AdamW's state are in memory and freed memory has been returned. A "
        f"cost counts as linear while it is within {TOLERANCE:.0%} of the lowest per unit.",
    ]
    for name, (title, section) in SECTIONS.items():
        if any(row["series"] == name for row in rows):
            lines += ["", f"## {title}", "", *section(rows)]
    names = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines += [
        "",
        "## The machine",
        "",
        machine_line(found, loads),
        "",
        f"{names}.",
    ]
    return "\n".join(lines) + "\n"
