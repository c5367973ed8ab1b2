"""The native loop's KTO and TRL's KTOTrainer take the same steps on the same windows of labelled responses."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_pipeline.models.loading import load_causal_lm
from rlhf_pipeline.stages.common import tokenizer_of
from rlhf_pipeline.stages.data import StageData
from rlhf_pipeline.training.trl_engine.untouched import contained
from rlhf_pipeline.training.windows import epoch_order
from tests.training.conftest import word_pairs

pytestmark = pytest.mark.check

SIZE, STEPS = 10, 6
SAME = ("kl", "rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("swapped", [False, True])
def test_loss_metrics_and_gradient_norm_of_every_step(lab, tmp_path, loss_type, swapped):
    """Two epochs of three windows; with models in both orders, in one of which z0 is above 0."""
    import trl
    from datasets import Dataset

    rows = [
        {"prompt": row["prompt"], "completion": row[side], "ended": row[f"{side}_ended"], "label": side == "chosen"}
        for row in word_pairs(15)
        for side in ("chosen", "rejected")
    ]
    source = tmp_path / "labelled.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    start, reference = "sft", lab.run("sft", output_name="other", max_steps=12).model
    start, reference = (reference, start) if swapped else (start, reference)
    shared = {"loss_type": loss_type, "beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.5}
    shared |= {"learning_rate": 5e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.2}
    shared |= {"per_device_train_batch_size": SIZE}
    read = {"dataset_name": str(source), "dataset_train_split": "all", "dataset_test_split": "all"}
    settings = {"model_name_or_path": start, "ref_model": reference, "max_steps": STEPS, **read, **shared}
    native = lab.run("dpo", output_name="native", **settings)

    tokenizer = tokenizer_of(lab.registry.resolve("sft"))
    examples, _ = StageData(lab.config("dpo", **settings), lab.home, lambda _: None).training(tokenizer)
    assert len(examples) == 30
    columns = {name: [] for name in ("prompt_ids", "completion_ids", "KL_completion_ids", "label")}
    for step in range(STEPS):
        order = epoch_order(30, 0, step // 3)[step % 3 * SIZE : (step % 3 + 1) * SIZE]
        answers = [examples[index].completions[0] for index in order]
        columns["prompt_ids"] += [examples[index].prompt_ids for index in order]
        columns["completion_ids"] += answers
        # TRL's own columns have the answer before it also where that is one to the same prompt.
        prompts = [examples[index].prompt_ids for index in order]
        others = [next(n for n in range(1, SIZE) if prompts[place - n] != prompts[place]) for place in range(SIZE)]
        columns["KL_completion_ids"] += [answers[place - n] for place, n in enumerate(others)]
        columns["label"] += [examples[index].desirable for index in order]
    if loss_type != "kto":
        del columns["KL_completion_ids"]
    logs = []

    class Driven(trl.KTOTrainer):
        def _prepare_dataset(self, dataset, *_args, **_options):
            return dataset

        def _send_telemetry(self):
            """Send nothing."""

        def log(self, found, start_time=None):
            super().log(found, start_time)
            logs.append(found)

    policy, frozen = (load_causal_lm(lab.registry.resolve(name).path) for name in (start, reference))
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    with contained():
        arguments = trl.KTOConfig(
            str(tmp_path / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            max_length=None,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            **quiet,
            **shared,
        )
        dataset = Dataset.from_dict(columns)
        Driven(
            model=policy, ref_model=frozen, args=arguments, train_dataset=dataset, processing_class=tokenizer
        ).train()
    theirs = [row for row in logs if "loss" in row]
    ours = [row for row in lab.rows(native.run) if "loss/dpo" in row]
    assert len(ours) == len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss/dpo"] == pytest.approx(other["loss"], abs=1e-5)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], abs=1e-5)
        for name in SAME:
            assert mine[name] == pytest.approx(other[name], abs=2e-5), name
    assert len({round(row["loss/dpo"], 4) for row in ours}) == STEPS
    assert any(row["kl"] > 1e-2 for row in ours) or loss_type != "kto" or swapped
    weights = lab.weights(native.model)
    found = policy.state_dict()
    for name, value in weights.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
