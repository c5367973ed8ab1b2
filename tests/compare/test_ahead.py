"""Measurements of a comparison that another process has made are read, and known by all that they depend on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.ahead import measure_ahead
from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.compare.run import compared
from rlhf_pipeline.disk.kept import claimed
from rlhf_pipeline.measure import evaluate, exact
from tests.faults import children

GIVEN = {"arms": ["ppo", "dpo"], "baseline": "sft", "samples": 2, "max_new_tokens": 2, "exact": True, "name": "ahead"}


@pytest.fixture(scope="module")
def arms(tiny, tmp_path_factory):
    """A laboratory with a PPO and a DPO model."""
    lab = tiny.copy(tmp_path_factory.mktemp("arms") / "home")
    lab.run("ppo", max_steps=2)
    lab.run("dpo", max_steps=2)
    return lab


@pytest.fixture
def lab(arms, tmp_path):
    return arms.copy(tmp_path / "home")


def compare(lab, **changes):
    return compared(lab.config("compare", **{**GIVEN, **changes}), lab.home, quiet=True)


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """What is measured from now on, instead of read: the models that are sampled, then `exactly` what is enumerated."""
    names: list[str] = []
    measure, row = evaluate.measure, exact.policy_row

    def sampled(bench, policy, scorer=None):
        names.append("samples")
        return measure(bench, policy, scorer)

    def enumerated(bench, model, beta):
        names.append(f"{model.label} exactly")
        return row(bench, model, beta)

    monkeypatch.setattr(evaluate, "measure", sampled)
    monkeypatch.setattr(exact, "policy_row", enumerated)
    return names


EXACTLY = ["sft@v1 exactly", "ppo@v1 exactly", "dpo@v1 exactly"]


@pytest.mark.check
def test_the_comparison_reads_what_was_measured_ahead(lab, arms, tmp_path, measured):
    beside = arms.copy(tmp_path / "beside")
    expected = compare(beside)
    assert measured == ["samples"] * 3 + EXACTLY
    measured.clear()
    measure_ahead(lab.config("compare", **GIVEN), lab.home)
    assert measured == EXACTLY[::-1] + ["samples"] * 3
    measured.clear()
    found = compare(lab)
    assert measured == []
    assert found.text().replace(str(lab.home), str(beside.home)) == expected.text()


@pytest.mark.check
def test_what_is_measured_ahead_of_the_last_model_is_used(lab, measured):
    """Without the points of DPO: another first model, another set of models, but the same measurements."""
    points = [Point("ppo", 0, {}, "ppo@v1"), Point("dpo", 0, {}, "dpo@v1")]
    measure_ahead(lab.config("compare", **GIVEN), lab.home, points[:1])
    assert measured == ["ppo@v1 exactly", "sft@v1 exactly", "samples", "samples"]
    measured.clear()
    config = lab.config("compare", **GIVEN)
    compared(config, lab.home, quiet=True, points=points)
    assert measured == ["samples", "dpo@v1 exactly"]


@pytest.mark.check
def test_a_measurement_is_known_by_all_that_it_depends_on(lab, measured, monkeypatch):
    compare(lab)
    for change in ({"seed": 1}, {"samples": 3}, {"temperature": 0.5}, {"max_prompts": 3}, {"reward_model": "world"}):
        measured.clear()
        compare(lab, exact=False, **change)
        assert measured == ["samples"] * 3, change
    # Not by the name of the report, nor by the other arms.
    measured.clear()
    compare(lab, name="again", arms=["dpo"], reward_model="reward@v1")
    assert measured == []
    monkeypatch.setattr("rlhf_pipeline.measure.kept._code", lambda: "another release")
    measured.clear()
    compare(lab, arms=["ppo"], exact=False)
    assert measured == ["samples"] * 2


@pytest.mark.check
def test_a_function_may_change_so_its_scores_are_not_kept(lab, measured, tmp_path, monkeypatch):
    (tmp_path / "judged.py").write_text("def zero(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        measured.clear()
        compare(lab, exact=False, judge="judged:zero")
        assert measured == ["samples"] * 3
    measured.clear()
    measure_ahead(lab.config("compare", **{**GIVEN, "exact": False, "judge": "judged:zero"}), lab.home)
    assert measured == []


@pytest.mark.check
def test_a_measurement_of_another_process_is_passed_over(lab, measured):
    compare(lab, exact=False)
    (one, *_others) = sorted((lab.home / "cache").glob("measured-*"))
    one.write_text("")
    measured.clear()
    config = lab.config("compare", **{**GIVEN, "exact": False})
    with claimed(one):
        measure_ahead(config, lab.home)
    assert measured == []
    measure_ahead(config, lab.home)
    assert measured == ["samples"]


@pytest.mark.check
def test_the_command_with_two_processes(arms, tmp_path, capfd, monkeypatch):
    """The results are those of one process, and no process is left."""
    homes = [arms.copy(tmp_path / f"home-{jobs}").home for jobs in (1, 2)]
    monkeypatch.setenv("AHEAD_TEST", str(tmp_path))
    words = ["compare", "ppo", "dpo", "--baseline", "sft", "--samples", "2", "--max-new-tokens", "2", "use_cpu=true"]
    results = []
    for jobs, home in enumerate(homes, start=1):
        assert main([*words, "num_threads=1", "--name", "two", "--home", str(home), "--jobs", str(jobs)]) == 0
        results.append(json.loads((home / "reports/two/results.json").read_text()))
    one, two = (json.dumps({**found, "command": None}) for found in results)
    assert two.replace(str(homes[1]), str(homes[0])) == one
    assert Path(homes[1], "logs/two/compare.txt").exists() and not Path(homes[0], "logs").exists()
    assert children.gone("AHEAD_TEST", str(tmp_path), 0)
