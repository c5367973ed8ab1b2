"""Exported rows train without conversion: a reward model, DPO and KTO, as `collected:` data and from files."""

from __future__ import annotations

import json
import random

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.labelling.export import export, publish_rows, write_rows
from rlhf_pipeline.labelling.kinds import Item, Judgement, Response
from tests.conftest import word_rankings

pytestmark = pytest.mark.check

STAGES = {
    "rankings": [("train-rm", {}), ("dpo", {"loss_type": "plackett_luce"})],
    "pairs": [("train-rm", {}), ("dpo", {})],
    "ratings": [("train-rm", {}), ("dpo", {})],
    "labels": [("dpo", {"loss_type": "kto"})],
}
"""What trains on which rows."""


def project(count: int = 40) -> tuple[list[Item], list[Judgement]]:
    """Items in words of the built-in world, each judged by two labelers; the second is contrary on some of them."""
    draw = random.Random(0)
    items, judgements = [], []
    for number, row in enumerate(word_rankings(count, ties=False)):
        texts = zip(row["completions"], row["ended"], strict=True)
        responses = [Response(text=text, ended=ended) for text, ended in texts]
        split = "test" if number % 5 == 0 else "train"
        items.append(Item(number=number, prompt=row["prompt"], responses=responses, split=split))
        for labeler in (0, 1):
            turn = labeler == 1 and draw.random() < 0.2
            ranks = [len(responses) + 1 - rank if turn else rank for rank in row["ranks"]]
            judgement = Judgement(
                labeler=labeler,
                item=number,
                repeat=0,
                shown=list(range(len(ranks))),
                ranks=ranks,
                ratings=[8 - rank for rank in ranks],
                flags=[{"hallucination": rank > 1} for rank in ranks],
                seconds=1.0,
                at=0.0,
            )
            judgements.append(judgement)
    return items, judgements


@pytest.mark.parametrize("kind", STAGES)
def test_a_dry_run_reads_them(kind, lab, tmp_path, capsys):
    """No row is left out but rankings with ties, which plackett_luce refuses."""
    found = export(*project(), kind)
    published = publish_rows(lab.registry, "people", found, project="mine")
    write_rows(tmp_path / "rows.jsonl", found.rows)
    common = {"model_name_or_path": "sft", "max_prompt_length": 6, "response_length": 4, "use_cpu": True}
    for source in (f"collected:{published.label}", str(tmp_path / "rows.jsonl")):
        for stage, changes in STAGES[kind]:
            values = {**common, **changes, "dataset_name": source, "output_name": "made", "skip_bad_rows": True}
            words = [f"{name}={json.dumps(value)}" for name, value in values.items()]
            assert main([stage, *words, "--home", str(lab.home), "--dry-run", "--json"]) == 0
            (data,) = json.loads(capsys.readouterr().out)["data"][:1]
            assert "dropped" not in data, data


def test_a_reward_model_dpo_and_kto_train_on_them(lab):
    """One tiny run of each: the losses fall, and the manifests name the labelled data."""
    items, judgements = project()
    for kind in ("rankings", "pairs", "labels"):
        publish_rows(lab.registry, f"people-{kind}", export(items, judgements, kind), project="mine")
    options = {"max_steps": 30, "learning_rate": 2e-2, "dataset_test_split": "test"}
    runs = (
        ("train-rm", "rankings", {"reward_centering_samples": None}),
        ("dpo", "pairs", {}),
        ("dpo", "labels", {"loss_type": "kto"}),
    )
    for stage, source, changes in runs:
        result = lab.run(stage, dataset_name=f"collected:people-{source}", output_name=source, **options, **changes)
        name = "loss/bradley_terry" if stage == "train-rm" else "loss/dpo"
        losses = [row[name] for row in lab.rows(result.run) if name in row]
        assert sum(losses[-5:]) < sum(losses[:5]), (stage, losses)
        (data,) = lab.registry.resolve(result.model).manifest.data[:1]
        assert data.source == f"collected:people-{source}@v1" and data.split == "train" and data.rows > 20
