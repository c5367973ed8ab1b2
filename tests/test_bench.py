"""`make bench`: both sides get the same work, and what becomes of their figures. No time is asserted."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_pipeline.errors import RlhfError

MODULES = ("bench", "bench_data", "bench_ours", "bench_peer", "bench_probe", "bench_table", "bench_work")


@pytest.fixture(scope="module")
def bench():
    """The scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


@pytest.fixture(scope="module")
def work(bench, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The work of `--quick`, on the synthetic set."""
    import torch

    torch.set_num_threads(1)
    return bench.bench_work.prepare(tmp_path_factory.mktemp("bench") / "work", None, bench.bench_work.QUICK, 1)


@pytest.fixture(scope="module")
def adapted(bench, work, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same examples for adapters on a model that is there already."""
    sizes = replace(bench.bench_work.QUICK, lora=2)
    folder = tmp_path_factory.mktemp("adapted") / "work"
    return bench.bench_work.prepare(folder, None, sizes, 1, Path(work["policy"]))


@pytest.fixture(scope="module")
def steps(bench, work) -> dict[str, list[list[list[list[int]]]]]:
    """By stage, the examples of each step: the texts of the peer's rows, in its order, tokenised here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work["policy"])
    rows = bench.bench_peer.read_rows(work["pairs"], work["order"])
    prompts = bench.bench_peer.read_rows(work["prompts"], work["prompt_order"])

    def ids(row: dict[str, str], *names: str) -> list[list[int]]:
        return [tokenizer(row["prompt"] + row[name] + tokenizer.eos_token)["input_ids"] for name in names]

    pairs = [ids(row, "chosen", "rejected") for row in rows]
    found = {
        "sft": [ids(row, "chosen") for row in rows],
        "reward": pairs,
        "dpo": pairs,
        "ppo": [[tokenizer(row["prompt"])["input_ids"]] for row in prompts],
    }
    return {stage: [all_[i : i + 8] for i in range(0, len(all_), 8)] for stage, all_ in found.items()}


def test_the_work_is_what_its_sizes_say(bench, work, steps) -> None:
    sizes = bench.bench_work.QUICK
    assert work["sizes"] == asdict(sizes)
    assert sorted(work["order"]) == list(range(24)) and work["order"] != list(range(24))
    assert [len(step) for step in steps["dpo"]] == [8, 8, 8]
    assert max(len(ids) for step in steps["dpo"] for example in step for ids in example) <= sizes.max_length
    assert max(len(ids) for step in steps["ppo"] for (ids,) in step) <= sizes.prompt_length


@pytest.mark.parametrize("stage", ["dpo", "reward", "sft"])
def test_our_side_takes_the_examples_of_the_peers_rows(bench, work, steps, stage) -> None:
    report = bench.bench_ours.measure(stage, work).report("ours", stage, False)
    assert report["digests"] == [bench.bench_probe.digest(step) for step in steps[stage]]
    assert (report["steps"], report["examples"], report["optimizer_steps"]) == (2, 16, 3)
    assert report["flops"] > 0 and report["loss"] > 0 and report["peak_bytes"] >= report["loaded_bytes"] > 0


@pytest.mark.parametrize("stage", ["ppo", "ppo_shared"])
def test_our_side_of_ppo(bench, work, steps, stage) -> None:
    report = bench.bench_ours.measure(stage, work).report("ours", stage, False)
    assert report["digests"] == [bench.bench_probe.digest(step) for step in steps["ppo"]]
    assert (report["steps"], report["examples"]) == (1, 8)
    assert report["optimizer_steps"] == 2 * 2 * 4  # updates x epochs x minibatches


@pytest.mark.slow
@pytest.mark.check
@pytest.mark.parametrize("stage", ["dpo", "reward", "sft"])
def test_the_peers_side_takes_them_too_and_finds_the_same_loss(bench, work, stage, monkeypatch) -> None:
    monkeypatch.setenv("CI", "1")  # TRL then sends no telemetry
    theirs = bench.bench_peer.measure(stage, work).report("peer", stage, False)
    ours = bench.bench_ours.measure(stage, work).report("ours", stage, False)
    assert theirs["digests"] == ours["digests"]
    assert (theirs["steps"], theirs["optimizer_steps"]) == (ours["steps"], ours["optimizer_steps"])
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=2e-6)


@pytest.mark.slow
@pytest.mark.check
@pytest.mark.parametrize("stage", ["kto", "simpo", "orpo", "rloo", "grpo"])
def test_the_further_methods_take_the_same_examples_on_both_sides(bench, work, stage, monkeypatch) -> None:
    monkeypatch.setenv("CI", "1")
    theirs = bench.bench_peer.measure(stage, work).report("peer", stage, False)
    ours = bench.bench_ours.measure(stage, work).report("ours", stage, False)
    assert theirs["digests"] == ours["digests"]
    for figure in ("steps", "examples", "optimizer_steps"):
        assert theirs[figure] == ours[figure]
    if stage in ("kto", "simpo"):
        assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-5)


@pytest.mark.check
@pytest.mark.parametrize("stage", ["dpo", "reward", "sft"])
def test_both_sides_train_adapters_on_the_same_examples(bench, adapted, stage, monkeypatch) -> None:
    """Every adapter starts at zero, so at this learning rate the losses are almost those of the model."""
    monkeypatch.setenv("CI", "1")
    theirs = bench.bench_peer.measure(stage, adapted).report("peer", stage, False)
    ours = bench.bench_ours.measure(stage, adapted).report("ours", stage, False)
    assert theirs["digests"] == ours["digests"] and theirs["optimizer_steps"] == ours["optimizer_steps"]
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=1e-4)


def test_the_order_within_a_step_does_not_matter_and_the_step_does(bench) -> None:
    digest = bench.bench_probe.digest
    assert digest([[[1, 2]], [[3]]]) == digest([[[3]], [[1, 2]]]) != digest([[[3]], [[2, 1]]])


def test_synthetic_lengths_follow_hh(bench) -> None:
    rows = bench.bench_work.synthetic_pairs(2000)
    for name, (median, high) in bench.bench_work.HH_LENGTHS.items():
        words = sorted(len(row[name].split()) for row in rows)
        frame = 6 if name == "prompt" else 1  # tokens that are no words: ends of paragraphs, colons, the end token
        assert words[1000] + frame == pytest.approx(median, rel=0.1)
        assert words[1900] + frame == pytest.approx(high, rel=0.15)


def run(side: str, stage: str, number: int, seconds: float, **changes: Any) -> dict[str, Any]:
    """A report of 10 examples in two steps, made by hand."""
    values = {
        "side": side,
        "stage": stage,
        "round": number,
        "precision": "fp32",
        "steps": 2,
        "examples": 10,
        "seconds": [seconds / 4, 3 * seconds / 4],
        "warmup_seconds": 1.0,
        "setup_seconds": 5.0,
        "peak_bytes": 300 * 2**20,
        "loaded_bytes": 200 * 2**20,
        "training_peak_bytes": 290 * 2**20,
        "flops": 4e10 if side == "ours" else None,
        "loss": 0.5,
        "optimizer_steps": 3,
        "digests": ["a", "b", "c"],
        "threads": 2,
        "load": [0.1, 1.9],
        "versions": {"torch": "2"},
    }
    return values | changes


def test_ratios_are_of_one_round_and_shares_of_the_peak(bench) -> None:
    # Ours 10, 5 and 20 examples a second, the peer's 2, 2.5 and 2.5: ratios 5, 2 and 8.
    runs = [run("ours", "dpo", n, s) for n, s in ((1, 1.0), (2, 2.0), (3, 0.5))]
    runs += [run("peer", "dpo", n, s) for n, s in ((1, 5.0), (2, 4.0), (3, 4.0))]
    (row,) = bench.bench_table.summarise(runs, {"fp32": 1e11, "bf16": 4e11})
    assert row["ratio"] == {"median": 5.0, "low": 2.0, "high": 8.0}
    assert row["ours"]["rate"] == {"median": 10.0, "low": 5.0, "high": 20.0}
    assert row["ours"]["gflop_per_example"] == row["peer"]["gflop_per_example"] == 4.0
    assert row["ours"]["share_of_peak"] == pytest.approx(0.4)
    assert row["peer"]["share_of_peak"] == pytest.approx(0.1)
    assert row["ours"]["training_bytes"] == 90 * 2**20
    assert bench.bench_table.verdict(row) == "below the floor"
    (line,) = bench.bench_table.rate_table([row])[2:]
    assert line == (
        "| DPO, reference online | 10.0 (5.0-20.0) pairs | 2.5 (2.0-2.5) | **5.00** (2.00-8.00) | 5.75 / 8 "
        "| below the floor | 40% / 10% | 300 / 300 | 90 / 90 |"
    )


def test_a_pretrained_model_has_targets_of_its_own(bench) -> None:
    runs = [run("ours", "dpo", 1, 1.0, peak_bytes=3 * 2**30), run("peer", "dpo", 1, 3.0, peak_bytes=4 * 2**30)]
    (row,) = bench.bench_table.summarise(runs, {"fp32": 1e11}, pretrained=True)
    assert (row["floor"], row["aim"]) == (2.5, 4.0) and bench.bench_table.verdict(row) == "above the floor"
    said = "Peak memory, our share of TRL's (aim 0.6 at most): DPO, reference online (fp32) 0.75."
    assert bench.bench_table.memory_shares([row]) == said


def test_a_model_of_the_user_and_its_tokenizer_are_the_work(bench, adapted, work) -> None:
    text = " ".join(bench.bench_table.describe_work(adapted, 3))
    assert "`policy` and its tokenizer, 0.0 M pretrained weights; adapters of rank 2 on q_proj and v_proj" in text
    assert adapted["parameters"] == work["parameters"] and adapted["lengths"] == work["lengths"]


def test_the_shared_trunk_is_set_beside_the_peers_separate_critic(bench) -> None:
    runs = [
        run("ours", "ppo", 1, 1.0),
        run("ours", "ppo_shared", 1, 0.5, flops=2e10),
        run("peer", "ppo", 1, 2.0),
        run("ours", "ppo", 1, 0.5, precision="bf16"),  # no peer: no row
    ]
    rows = bench.bench_table.summarise(runs, {"fp32": 1e11, "bf16": 4e11})
    assert [(row["stage"], row["ratio"]["median"]) for row in rows] == [("ppo", 2.0), ("ppo_shared", 4.0)]
    assert rows[1]["ours"]["gflop_per_example"] == 2.0 and rows[1]["peer"]["gflop_per_example"] == 4.0
    assert bench.bench.turns(["ppo", "ppo_shared"], 2) == [("peer", "ppo"), ("ours", "ppo"), ("ours", "ppo_shared")]


def test_the_document_has_the_machine_the_versions_and_the_command(bench, work) -> None:
    runs = [run(side, "sft", 1, seconds) for side, seconds in (("ours", 1.0), ("peer", 4.0))]
    peak = {"fp32": 2e11, "bf16": 9e11}
    found = {
        "command": "python scripts/bench.py",
        "quick": False,
        "date": "2026-01-31",
        "machine": {"processor": "A processor", "cores": 2, "memory_gib": 8.0, "system": "Linux x86_64"},
        "threads": 2,
        "repeats": 1,
        "versions": {"ours": {"torch": "2.13.0", "trl": "1.16.0"}, "TRL's PPO": {"torch": "2.13.0"}},
        "product": 1024,
        "peaks": [peak, peak],
        "work": work,
        "rows": bench.bench_table.summarise(runs, peak),
        "runs": runs,
    }
    assert json.loads(bench.bench.dump(found)) == json.loads(json.dumps(found))
    text = bench.bench_table.document(json.loads(json.dumps(found)))
    wanted = ("`python scripts/bench.py`", "A processor", "| trl | 1.16.0 | - |", "200 GFLOP/s", "**4.00** ", "reached")
    assert [part for part in wanted if part not in text] == []
    assert "bf16 autocast" not in text and "smoke test" not in text and str(Path(work["policy"]).parent) not in text


def test_bf16_is_set_beside_our_own_fp32_of_the_same_round(bench) -> None:
    # In bf16 20, 10 and 40 examples a second, in fp32 10, 10 and 10: ratios 2, 1 and 4.
    runs = [run("ours", "dpo", n, 1.0) for n in (1, 2, 3)]
    runs += [
        run("ours", "dpo", n, s, precision="bf16", peak_bytes=n * 2**30) for n, s in ((1, 0.5), (2, 1.0), (3, 0.25))
    ]
    line = "| DPO, reference online | **2.00** (1.00-4.00) | reached | 300 / 3,072 / {} |"
    assert bench.bench_table.bf16_table(runs)[2:] == [line.format("-")]
    runs += [run("peer", "dpo", 1, 1.0, precision="bf16"), run("ours", "sft", 1, 1.0, precision="bf16")]
    assert bench.bench_table.bf16_table(runs)[2:] == [line.format("300")]
    assert len(bench.bench_table.bf16_table(runs[:3])) == 2


def test_other_examples_on_one_side_are_an_error(bench) -> None:
    runs = [run("ours", "dpo", 1, 1.0), run("peer", "dpo", 1, 2.0)]
    bench.bench.require_same_work(runs)
    runs[1]["digests"] = ["a", "x", "c"]
    with pytest.raises(RlhfError, match="dpo, round 1: step 2: the two sides took other examples"):
        bench.bench.require_same_work(runs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hh", "absent.jsonl"], "--hh absent.jsonl: no such file"),
        (["--stages", "dpo,kto"], "--stages: found kto; expected some of dpo,reward,sft,ppo,ppo_shared"),
        (["--repeats", "2"], "--repeats: found 2; expected at least 3"),
        (["--threads", "0"], "--threads: found 0; expected at least 1"),
        (["--model", "absent"], "--model absent: no config.json; expected the folder of a model"),
        (["--ours"], "--ours: found no --bf16"),
        (["--lora", "4"], "--lora: found 4; expected a rank above 0, together with --model"),
    ],
)
def test_a_wrong_option_exits_with_2_and_one_line(bench, capsys, arguments, message) -> None:
    assert bench.bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_pairs_are_repeated_with_a_word_more_in_each_text(bench) -> None:
    pairs = [
        ("\n\nHuman: one two\n\nAssistant:", " yes yes", " no"),
        ("\n\nHuman: three\n\nAssistant:", " maybe", " or"),
    ]
    rows = list(bench.bench_data.variants(pairs, 6))
    assert [(row["chosen"], row["rejected"]) for row in rows[:2]] == [(p + c, p + r) for p, c, r in pairs]
    for number, row in enumerate(rows[2:], 2):
        prompt, *replies = pairs[number % 2]
        for text, reply in zip(row.values(), replies):
            begun, mark, rest = text.partition("\n\nAssistant:")
            assert mark and len(begun.split()) == len(prompt.split())  # without its mark, with a word more
            assert len(rest.split()) == len(reply.split()) + 1
        assert row["chosen"].partition("\n\nAssistant:")[0] == row["rejected"].partition("\n\nAssistant:")[0]
    assert rows == list(bench.bench_data.variants(pairs, 6))


def test_the_aims_of_the_data_are_those_of_the_medians(bench, tmp_path) -> None:
    def run(side: str, cpu: float, wall: float, memory: float, rows: int = 160_000) -> dict[str, Any]:
        figures = {"cpu_seconds": cpu, "wall_seconds": wall, "memory_mb": memory, "examples": [rows]}
        return {"rows": rows, "file_mb": 1.0, "side": side, **figures, **({"trl": "9.9"} if side == "trl" else {})}

    runs = [run("first", cpu, 99, 300) for cpu in (20, 30, 70)] + [run("second", 1, wall, 410) for wall in (1, 2, 9)]
    runs += [run("trl", cpu, 99, 900) for cpu in (90, 100, 300)] + [run("first", 200, 99, 999, rows=1_000_000)]
    assert [found[1:3] for found in bench.bench_data.targets(runs, 160_000)] == [(0.3, 0.35), (2, 3.0), (410, 400)]
    assert [found[1:3] for found in bench.bench_data.targets(runs, 1_000_000)] == [(999, 1000)]
    options = SimpleNamespace(hh=Path("/x/hh.jsonl"), tokenizer=None, rows=[160_000], peer_rows=160_000, repeats=3)
    text = bench.bench_data.document(options, runs)
    assert "`python scripts/bench_data.py --hh hh.jsonl --repeats 3`" in text and "TRL 9.9" in text
    assert "| 160,000 | nothing stored: CPU seconds / TRL's | 0.30 | 0.35 | reached |" in text
    assert "| 160,000 | resident memory above that after imports, MB | 410 | 400 | **not reached** |" in text


@pytest.mark.slow
@pytest.mark.check
def test_both_sides_of_the_data_are_measured(bench, tmp_path, capsys) -> None:
    assert bench.bench_data.main(["--rows", "50", "--output", str(tmp_path / "data.md")]) == 0
    rows = [
        line.split("|")[1:-1] for line in (tmp_path / "data.md").read_text().splitlines() if line.startswith("| 50 ")
    ]
    assert [row[1].strip() for row in rows[:3]] == list(bench.bench_data.SIDES.values())
    assert rows[0][-1] == rows[1][-1] and len(rows) == 6 and rows[2][-1].strip() == "50"
