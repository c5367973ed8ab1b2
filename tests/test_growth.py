"""`make growth`: the work of each point, the memory it measures, what is made of its figures. No time is asserted."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

MODULES = ("bench", *(f"growth{name}" for name in ("", "_points", "_sizes", "_table", "_words", "_work")))
MIB = 2**20


@pytest.fixture(scope="module")
def scripts():
    """The scripts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "scripts"))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})


@pytest.fixture(scope="module")
def quick(scripts, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The figures and the document of `--quick`."""
    folder = tmp_path_factory.mktemp("growth")
    words = ["--quick", "--threads", "1", "--output", str(folder / "growth.md")]
    gc.freeze()  # every point collects garbage: not from all that the tests have imported
    try:
        assert scripts.growth.main(words) == 0
    finally:
        gc.unfreeze()
    return json.loads((folder / "growth.json").read_text()), (folder / "growth.md").read_text()


def rows_of(quick, series: str, variant: str | None = None) -> list[dict[str, Any]]:
    return [row for row in quick[0]["rows"] if row["series"] == series and row.get("variant") == variant]


def test_every_point_is_measured_with_enough_steps(scripts, quick) -> None:
    sizes = scripts.growth_sizes.QUICK
    for series, variants in (("length", 2), ("data", 1), ("vocabulary", 1), ("completions", 2), ("batch", 1)):
        found = [row["value"] for row in quick[0]["rows"] if row["series"] == series]
        assert found == [value for value in sizes.points(series) for _ in range(variants)]
    assert {len(row["seconds"]) for row in quick[0]["rows"]} == {sizes.least}
    assert {row["threads"] for row in quick[0]["rows"]} == {1}
    full = scripts.growth_sizes.Sizes()
    assert full.least >= 5 and max(full.length) == 2048 and max(full.vocabulary) == 131_072
    assert full.batch[-1] == full.step_pairs and all(full.step_pairs % value == 0 for value in full.batch)
    assert all(full.step_completions % value == 0 for value in full.completions)


def test_the_flops_of_a_step_by_hand(quick) -> None:
    # Hidden 16, MLP 32, one layer, vocabulary 300; 4 pairs, each with a prompt of 8 and completions of 4 and 4. A
    # frozen reference adds a forward pass to one with its backward pass, which counts as three.
    cached, online = rows_of(quick, "length", "cached")[0], rows_of(quick, "length", "online")[0]
    assert online["flops"] == pytest.approx(cached["flops"] * 4 / 3)
    attention, head = (3 * 4 * flops for flops in (4 * 16 * (36 + 2 * (4 * 8 + 10)), 2 * 300 * 16 * 8))
    weights = 3 * 4 * 2 * (4 * 16 * 16 + 3 * 16 * 32) * 16  # less where a position's state is not read
    for found in (cached, online):
        assert found["shares"]["attention"] * cached["flops"] == pytest.approx(attention)
        assert found["shares"]["head"] * cached["flops"] == pytest.approx(head)
    assert attention + head < cached["flops"] <= attention + head + weights


def test_a_step_has_the_work_that_its_row_says(quick) -> None:
    keys = ("value", "units", "tokens", "predicted")
    lengths = [tuple(row[key] for key in keys) for row in rows_of(quick, "length", "cached")]
    assert lengths == [(16, 4, 64, 32), (128, 2, 256, 128)]  # the longest come half as many to a step
    assert [(row["units"], row["tokens"]) for row in rows_of(quick, "batch")] == [(4, 64), (4, 64)]
    # K completions of 4 on a prompt of 8, 6 completions a step: 3 prompts with one pair each, 2 with three.
    assert [(row["units"], row["tokens"]) for row in rows_of(quick, "completions", "tree")] == [(6, 48), (6, 40)]
    assert [(row["units"], row["tokens"]) for row in rows_of(quick, "completions", "pairs")] == [(6, 48), (6, 96)]
    assert [(row["kept"], row["units"]) for row in rows_of(quick, "data")] == [(40, 8), (80, 8)]
    assert all(0 <= row["collector_seconds"] <= sum(row["setup"].values()) for row in rows_of(quick, "data"))
    parts = ["digest of ids", "digest of records", "order of an epoch", "reading", "tokenising"]
    assert all(sorted(row["setup"]) == parts and min(row["setup"].values()) > 0 for row in rows_of(quick, "data"))
    # Hidden 8, MLP 16, one layer and three norms; tied embeddings.
    assert [row["parameters"] for row in rows_of(quick, "vocabulary")] == [
        8 * size + 4 * 8 * 8 + 3 * 8 * 16 + 3 * 8 for size in (64, 128)
    ]


def test_the_document_of_a_smoke_test_says_so(quick) -> None:
    found, text = quick
    wanted = ("smoke test", "--quick --threads 1`", "| 128 | 2 |", found["machine"]["processor"], "target of 1.3")
    assert [part for part in wanted if part not in text] == []
    assert text.count("\n## ") == 6


@pytest.mark.slow
@pytest.mark.check
def test_a_point_in_a_process_of_its_own(scripts, tmp_path) -> None:
    environment = scripts.bench.child_environment(1, tmp_path)
    words = ["batch", "2", "--threads", "1", "--quick"]
    (row,) = scripts.bench.call(sys.executable, "growth_points.py", *words, environment=environment)
    assert (row["series"], row["value"], row["units"], row["threads"]) == ("batch", 2, 4, 1)


def test_peak_memory_is_that_of_the_steps_alone(scripts) -> None:
    import torch

    torch.set_num_threads(1)
    work, sizes = scripts.growth_work, scripts.growth_sizes.QUICK
    examples = work.draw_pairs(4, 16, sizes.vocab_size)

    def step(model, micro_batch, *, meter, shape, extra: int):
        scratch = torch.ones(extra * MIB // 4)
        meter.train(shape, micro_batch.batch)
        return work.Loss({"sum": (model(micro_batch.batch).logprobs.sum() + 0.0 * scratch[0], "pairs", 1.0)})

    found = {}
    for extra in (96, 1):  # the larger one first: what it has freed must not count for the other
        torch.ones(200 * MIB // 4)  # nor must what was freed before both
        policy = work.make_policy(sizes.model, sizes.vocab_size, 16)
        own = functools.partial(step, extra=extra)
        found[extra] = work.timed(sizes, policy, examples, own, units=4, micro_batch=4, tensors=True)
    tensors, resident = ([found[extra][key] for extra in (1, 96)] for key in ("tensor_bytes", "beyond_bytes"))
    assert MIB <= tensors[0] < 2 * MIB and tensors[1] - tensors[0] == pytest.approx(95 * MIB, abs=MIB / 4)
    if None not in resident:  # where the system says it
        assert resident[0] < 16 * MIB and resident[1] == pytest.approx(96 * MIB, abs=16 * MIB)


def test_the_peak_of_tensors_by_hand(scripts) -> None:
    import torch

    def run() -> None:
        first = torch.ones(8 * MIB // 4)
        second = first[: MIB // 2] + 1  # 2 MiB beside 8
        del first, second
        torch.ones(9 * MIB // 4)

    assert scripts.growth_work.tensor_peak(run) == pytest.approx(10 * MIB, abs=1024)


@pytest.mark.parametrize("count", [2, 4])
def test_a_ranking_in_one_tree_has_the_loss_of_its_pairs(scripts, count) -> None:
    import torch

    from rlhf_pipeline.data.batch import pack
    from rlhf_pipeline.data.comparisons import compare
    from rlhf_pipeline.stages.reward import reward_step
    from rlhf_pipeline.training.cost import CostMeter, ModelShape
    from rlhf_pipeline.training.windows import ExampleBatch

    torch.set_num_threads(1)
    work, sizes = scripts.growth_work, scripts.growth_sizes.QUICK
    model = work.make_reward_model(sizes.model, sizes.vocab_size, 16).double()
    rankings = work.draw_examples(2, 5, [3] * count, sizes.vocab_size)
    pairs = [pair for ranking in rankings for pair in scripts.growth_points.all_pairs(ranking)]
    options = {"meter": CostMeter(), "shape": ModelShape.of(model.model, head=False)}

    def batch(examples) -> ExampleBatch:
        packed = pack(examples, 0, layout=model.reader.layout)
        return ExampleBatch(packed, list(range(len(examples))), compared=compare(examples))

    (ranked, name, _), (split, _, _) = (
        reward_step(model, batch(examples), **options).terms["bradley_terry"] for examples in (rankings, pairs)
    )
    assert name == "prompts" and len(pairs) == 2 * math.comb(count, 2)
    assert ranked.item() == pytest.approx(split.item() / math.comb(count, 2), rel=1e-9)


def test_rankings_are_measured_by_the_steps_of_the_stage(scripts, monkeypatch) -> None:
    """One tree per prompt with all its comparisons, and no step of the script's own."""
    from rlhf_pipeline.stages.reward import reward_step

    points, sizes = scripts.growth_points, scripts.growth_sizes.QUICK
    seen = []

    def timed(_sizes, _model, examples, step, **options):
        seen.append((step, [(len(e.completions), len(e.untied())) for e in examples], options))
        return {}

    monkeypatch.setattr(points, "timed", timed)
    points.completions(sizes, 3)
    # 6 completions a step: 2 prompts of 3 in one micro-batch, or 6 pairs in micro-batches of gcd(6, 4) = 2.
    (tree, rankings, ranked), (split, pairs, cut) = seen
    assert tree is split is reward_step
    assert rankings == [(3, 3)] * 4 and pairs == [(2, 1)] * 12
    assert (ranked["micro_batch"], cut["micro_batch"], cut["accumulation"]) == (2, 2, 3)
    assert ranked["units"] == cut["units"] == 6


def test_where_a_cost_stops_being_linear(scripts) -> None:
    flatness = scripts.growth_words.flatness
    assert (
        flatness("Time", [1, 2, 4], [1.0, 1.1, 1.15])
        == "Time is within 15% of its lowest from 1 to 4: linear throughout."
    )
    assert flatness("Time", [1, 2, 1024, 2048], [3.0, 2.0, 2.2, 26.0]) == (
        "Time is lowest at 2 and more than 15% higher elsewhere: 1.50 times that at 1, 13 times that at 2,048; "
        "not linear there."
    )


def test_a_line_through_the_ends(scripts) -> None:
    # y = 2 + 3 x, and 20 instead of 17 at 5.
    assert scripts.growth_words.line([1, 5, 10], [5.0, 17.0, 32.0]) == pytest.approx((2.0, 3.0, 0.0), abs=1e-12)
    fixed, slope, worst = scripts.growth_words.line([10, 5, 1], [32.0, 20.0, 5.0])
    assert (fixed, slope, worst) == pytest.approx((2.0, 3.0, 3 / 17))
    assert scripts.growth_words.fits(worst).endswith("18%: not linear")


def row(series: str, value: int, seconds: float, variant: str | None = None, **changes: Any) -> dict[str, Any]:
    """A row made by hand: 8 pairs of 100 tokens, 16 GFLOP, 100 MiB."""
    values = {"series": series, "value": value, "seconds": [seconds, 2 * seconds, seconds / 2], "load": [0.1, 1.9]}
    values |= {"units": 8, "tokens": 800, "predicted": 512, "flops": 16e9, "shares": {"attention": 0.2, "head": 0.3}}
    values |= {"parameters": MIB, "resident_bytes": 300 * MIB, "beyond_bytes": 100 * MIB, "tensor_bytes": 50 * MIB}
    return values | ({} if variant is None else {"variant": variant}) | changes


def test_memory_at_a_large_vocabulary_against_its_target(scripts) -> None:
    rows = [row("vocabulary", 1024, 1.0), row("vocabulary", 2**15, 2.9, beyond_bytes=150 * MIB)]
    rows += [row("vocabulary", 2**17, 9.0, beyond_bytes=131 * MIB, tensor_bytes=65 * MIB)]
    text = "\n".join(scripts.growth_table.vocabulary(rows))
    assert "at 131,072 over 1,024: tensors 1.30 times, within the target of 1.3; resident 1.31 times, ABOVE the" in text
    assert "target of 1.3 (most: 1.50 times at 32,768)." in text and "would be 256 MiB a copy" in text  # 4 x 512 x 2^17
    # 8 / (2^17 - 2^10) s for 8 pairs: 7.69 ms for 1,000 entries of a pair, and 117.1 ms at none.
    assert "has 117.1 ms a pair and 7.7 ms for each 1,000 entries; the points between are off by at most 2%" in text
    assert "as long as all the rest at a vocabulary of about 15,232." in text


def test_a_line_of_the_table_of_lengths(scripts) -> None:
    rows = [row("length", 100, 1.0, "cached"), row("length", 100, 1.5, "online", beyond_bytes=112 * MIB)]
    found = scripts.growth_table.length(rows)
    assert found[2] == (
        "| 100 | 8 | 125.0 (62.5-250.0) | 1250.0 | 2.00 | 16 | 20% | 100 | 128 | 187.5 (93.8-375.0) | 1.50 | 112 |"
    )


def test_the_garbage_collector_is_told_from_the_set_up(scripts) -> None:
    # 2 ms an example at 100 and 4 at 1,000, where the collector takes half; without it 2 and 2.
    parts = ({"reading": 0.05, "tokenising": 0.15}, {"reading": 1.0, "tokenising": 3.0})
    rows = [row("data", 100, 1.0, setup=parts[0], collector_seconds=0.0)]
    rows += [row("data", 1000, 1.1, setup=parts[1], collector_seconds=2.0, resident_bytes=318 * MIB)]
    text = "\n".join(scripts.growth_table.data(rows))
    assert "Set-up per example is lowest at 100 and more than 15% higher elsewhere: 2.00 times that at 1,000;" in text
    assert "At 1,000 75% of it is tokenising." in text and "takes 0% of it at 100 and 50% at 1,000." in text
    assert "Without it, set-up per example is within 15%" in text
    assert "Time of a step is within 15% of its lowest from 100 to 1,000: it does not grow." in text
    assert "keeps 20.5 KiB" in text  # 18 MiB for 900 examples


def test_collections_are_clocked_while_asked_for(scripts) -> None:
    callbacks = list(gc.callbacks)
    with scripts.growth_points.clocked_collections() as spent:
        gc.collect()
    assert spent and min(spent) > 0 and gc.callbacks == callbacks


def test_flops_and_rate_explain_the_time(scripts) -> None:
    # Per token twice the FLOPs and five times the time: 16 GFLOP/s and 6.4.
    rows = [row("length", 100, 1.0), row("length", 200, 10.0, tokens=1600, flops=64e9)]
    text = scripts.growth_words.work_and_rate(rows, "token", lambda found: found["tokens"])
    assert "the FLOPs per token become 2.00 times" in text and "time per token 5.00 times" in text
    assert text.endswith("16 GFLOP/s at first and 6 in the end.")


def test_memory_that_is_not_known_is_left_open(scripts) -> None:
    rows = [row("length", 100, 1.0, variant, beyond_bytes=None) for variant in ("cached", "online")]
    rows += [row("vocabulary", value, 1.0, beyond_bytes=None) for value in (1024, 2048)]
    text = "\n".join([*scripts.growth_table.length(rows), *scripts.growth_table.vocabulary(rows)])
    assert "| - |" in text and "Peak memory per token" not in text and "target" not in text


def test_each_point_gets_a_process_with_its_threads(scripts, tmp_path, monkeypatch) -> None:
    calls = []

    def call(python: str, script: str, *words: str, environment: dict[str, str]) -> list[dict[str, Any]]:
        calls.append((script, *words, environment["OMP_NUM_THREADS"]))
        return [row("batch", int(words[1]), 8.0 / int(words[1]), units=64, versions={"torch": "2"})]

    monkeypatch.setattr(scripts.growth, "call", call)
    words = ["--series", "batch", "--threads", "3", "--output", str(tmp_path / "docs" / "growth.md")]
    assert scripts.growth.main(words) == 0
    values = [str(value) for value in scripts.growth_sizes.Sizes().batch]
    assert calls == [("growth_points.py", "batch", value, "--threads", "3", "3") for value in values]
    found = json.loads((tmp_path / "docs" / "growth.json").read_text())
    assert found["command"] == "python scripts/growth.py --series batch --threads 3" and not found["quick"]
    text = (tmp_path / "docs" / "growth.md").read_text()
    assert "Each point is a process of its own" in text and "## Length" not in text
    assert "lowest at 64 and more than 15% higher elsewhere: 64 times that at 1, 32 times that at 2," in text


def test_what_a_micro_batch_costs(scripts) -> None:
    # 64 pairs: 0.64 s of their own and 0.01 s for each micro-batch, of which there are 64, 4 and 1.
    rows = [row("batch", value, 0.64 + 0.01 * 64 / value, units=64) for value in (1, 16, 64)]
    text = "\n".join(scripts.growth_table.batch(rows))
    assert "has 10.0 ms for each on top of 10.00 ms a pair, 50% of the time with micro-batches of 1;" in text
    assert "off by at most 0%: linear." in text and "| 16 | 4 | 10.6 (5.3-21.2) | 1.05 | 24 | 100 |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--series", "length,depth"], "--series: found depth; expected some of length,data,vocabulary,"),
        (["--series", ","], "--series: found none; expected some of length,"),
        (["--threads", "0"], "--threads: found 0; expected at least 1"),
    ],
)
def test_a_wrong_option_exits_with_2_and_one_line(scripts, capsys, arguments, message) -> None:
    assert scripts.growth.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
