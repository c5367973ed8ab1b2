"""An arm of KTO: it has another optimum, an implicit reward on held-out pairs, and no training loss of pairs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_pipeline.compare.aim import aim_of
from rlhf_pipeline.compare.run import run_compare
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.experiment.estimate import estimate_stage
from rlhf_pipeline.experiment.outlook import Outlook


@pytest.mark.check
@pytest.mark.usefixtures("undrawn")
def test_kto_is_compared_as_trained_and_on_held_out_pairs(lab):
    for name, changes in (("dpo", {}), ("kto", {"loss_type": "kto"})):
        lab.run("dpo", output_name=name, max_steps=1, **changes)
    given = {"arms": ["kto", "dpo"], "baseline": "sft", "name": "labelled", "allow_other_optimum": True}
    result = run_compare(lab.config("compare", **given, samples=1, max_prompts=2), lab.home, quiet=True)
    assert aim_of(lab.registry, lab.registry.resolve("kto")).optimum == "other"
    assert {entry.at for entry in result.contrasts} == {"as trained, with a different optimum for kto@v1"}
    assert {"kto@v1", "dpo@v1"} <= set(result.preferences.scorers)


def test_a_plan_counts_the_responses_of_pairs(lab):
    pairs = estimate_stage(lab.config("dpo", max_steps=-1), lab.home)
    responses = estimate_stage(lab.config("dpo", max_steps=-1, loss_type="kto"), lab.home)
    assert responses["rows"] == 2 * pairs["rows"]
    pair = Example([1], [[2], [3, 4]], [True, True], "key", "")
    plan = SimpleNamespace(nodes=[None], draws=lambda _: [(pair, "train"), (pair, "test")])
    made = Outlook.collected(plan, 0, "labelled", "train")
    assert [one.completions for one in made] == [[[2]], [[3, 4]]]
