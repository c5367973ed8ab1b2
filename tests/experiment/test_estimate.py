"""A dry run counts what the run counts: rows that are dropped, mixtures, steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.config.ppo import PpoConfig
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.errors import ConfigError, DataError
from rlhf_pipeline.experiment.estimate import estimate_stage
from rlhf_pipeline.experiment.weights import training_memory

TOTAL = {"max_prompt_length": None, "response_length": None, "max_length": 14}


def words(count: int, number: int = 0) -> str:
    """A text of so many tokens of the world's vocabulary, different for each number."""
    from rlhf_pipeline.data.world.vocabulary import ADJECTIVES

    return " ".join(ADJECTIVES[(number // len(ADJECTIVES) ** place) % len(ADJECTIVES)] for place in range(count))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int, longest: int, *, start: int = 0) -> list[dict[str, Any]]:
    """Pairs with prompts of 3 tokens; every third chosen response has the longest length, without its end token."""
    return [
        {
            "prompt": words(3, start + number),
            "chosen": " " + words(longest if number % 3 == 0 else 2, number),
            "rejected": " " + words(1, number),
            "split": "train",
        }
        for number in range(count)
    ]


def test_a_total_alone_keeps_what_fits_and_the_dry_run_says_so(lab, tmp_path):
    rows = [*pairs(12, 10), {**pairs(13, 14)[12], "chosen": " " + words(14)}]  # the last one alone is too long
    rows.append({**pairs(1, 2, start=20)[0], "split": "test"})
    changes = {**TOTAL, "dataset_name": write(tmp_path / "pairs.jsonl", rows), "max_steps": -1, "learning_rate": 1e-9}
    for stage, more in (("sft", {}), ("train-rm", {"reward_centering": "none"}), ("dpo", {})):
        told = estimate_stage(lab.config(stage, **changes, **more), lab.home)
        assert (told["rows"], told["optimizer_steps"]) == (12, 2)  # batches of 8
        assert told["lengths"] == {"prompt": 13, "response": 13, "total": 14}
        assert any("dropped: completion_too_long 1" in line for line in told["data"])
        made = lab.run(stage, **changes, **more)
        assert made.cost["optimizer_steps"] == 2
        (entry,) = lab.registry.resolve(made.model).manifest.data
        assert (entry.model_dump()["kept"], entry.dropped) == (12, {"completion_too_long": 1})


def test_a_mixture_is_counted_as_it_is_trained_on(lab, tmp_path):
    files = [write(tmp_path / f"{name}.jsonl", rows) for name, rows in MIXED]
    changes = {"dataset_name": None, "datasets": [{"dataset_name": file} for file in files], "max_steps": -1}
    told = estimate_stage(lab.config("dpo", **changes), lab.home)
    assert (told["rows"], told["optimizer_steps"]) == (12, 2)
    assert any("6 examples of 30 rows; dropped: beyond_its_share 24" in line for line in told["data"])
    made = lab.run("dpo", **changes)
    assert made.cost["optimizer_steps"] == 2
    assert [entry.model_dump()["kept"] for entry in lab.registry.resolve(made.model).manifest.data] == [6, 6]


TESTED = [{**row, "split": "test"} for row in pairs(2, 2, start=500)]
MIXED = (("many", pairs(30, 2) + TESTED), ("few", pairs(6, 2, start=100) + TESTED))


def test_a_dry_run_refuses_what_the_run_refuses(lab, tmp_path):
    labelled = [{"prompt": words(2, n), "completion": " " + words(2, n), "label": n % 2 == 0} for n in range(40)]
    config = lab.config("sft", dataset_name=write(tmp_path / "kto.jsonl", labelled))
    with pytest.raises(DataError, match="kind labelled"):
        estimate_stage(config, lab.home)
    unknown = [{"prompt": "zyx", "chosen": words(1), "rejected": words(2), "split": split} for split in ("train", "x")]
    config = lab.config("dpo", dataset_name=write(tmp_path / "unknown.jsonl", unknown))
    with pytest.raises(DataError, match="unknown_token"):
        estimate_stage(config, lab.home)


def test_columns_and_a_test_file_of_the_users_own(lab, tmp_path):
    def renamed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        names = {"prompt": "q", "chosen": "good", "rejected": "bad"}
        return [{names[key]: row[key] for key in names} | {"margin": 1} for row in rows]

    changes = {
        "dataset_name": write(tmp_path / "mine.jsonl", renamed(pairs(16, 2))),
        "dataset_test_name": write(tmp_path / "held_out.jsonl", renamed(pairs(5, 2, start=50))),
        "column_mapping": {"prompt": "q", "chosen": "good", "rejected": "bad"},
        "max_steps": -1,
    }
    told = estimate_stage(lab.config("dpo", **changes), lab.home)
    assert told["rows"] == 16
    assert any(line.endswith("not read: margin") for line in told["data"])
    made = lab.run("dpo", **changes)
    assert made.metrics["eval_pairs"] == 5
    manifest = lab.registry.resolve(made.model).manifest
    assert [(entry.rows, entry.split) for entry in manifest.data] == [(16, "train")]


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo"])
def test_a_run_without_a_learning_rate_is_refused_before_anything_is_sampled_or_scored(lab, stage, monkeypatch):
    from rlhf_pipeline.stages import preference_pairs, reward

    def too_early(*args, **options):
        pytest.fail("the reference was read first")

    monkeypatch.setattr(reward, "sample_for_prompts", too_early)
    monkeypatch.setattr(preference_pairs, "cached_logprobs", too_early)
    changes = {"max_steps": 1, "warmup_steps": 0.1, "lr_scheduler_type": "cosine"}
    for what in (lambda: lab.run(stage, **changes), lambda: estimate_stage(lab.config(stage, **changes), lab.home)):
        with pytest.raises(ConfigError, match=r"warmup_steps: found 0.1 in a run of one step"):
            what()


def test_a_dry_run_of_ppo_refuses_a_schedule_that_transformers_refuses(lab):
    changes = {"lr_scheduler_type": "warmup_stable_decay", "max_steps": 4}
    config = lab.config("ppo", **changes, lr_scheduler_kwargs={"num_decay_steps": 1, "decay_type": "steep"})
    with pytest.raises(ConfigError, match=r"lr_scheduler_kwargs: transformers refuses .*steep"):
        estimate_stage(config, lab.home)


def test_the_state_of_an_8_bit_optimizer_has_no_type_of_the_weights():
    """By hand, 1000 weights of 2 bytes: weights and gradients 4000 bytes, and AdamW's averages of 8 bits 2100."""
    keys: dict[str, Any] = {"output_name": "m", "learning_rate": 1e-5, "dtype": "bfloat16"}
    assert training_memory(1000, None, SftConfig(**keys, optim="adamw_8bit")) == 6100
    assert training_memory(1000, None, SftConfig(**keys)) == 8000


def test_ppo_with_divided_weights_holds_the_whole_actor_while_it_samples():
    """By hand, 1000 weights of 4 bytes, 16 bytes each with gradient and AdamW's averages, on two processes.

    Actor and critic 32,000 and reference and reward model 8,000 are halved, and the actor of 4,000 comes on top. With
    adapters of 10 weights, the bases of actor, critic, reference and reward model are four times 4,000.
    """
    keys: dict[str, Any] = {"output_name": "m", "model_name_or_path": "sft", "reward_model_path": "rm"}
    whole = PpoConfig(**keys, value_init="reward_model")
    assert training_memory(1000, None, whole, parts=2) == 40_000 / 2 + 4_000
    assert training_memory(1000, None, PpoConfig(**keys, value_init="shared"), parts=2) == 24_000 / 2 + 4_000
    judged = PpoConfig(**keys, value_init="reward_model", judge="other")
    assert training_memory(1000, None, judged, parts=2) == 40_000 / 2 + 8_000
    adapted = PpoConfig(**keys, value_init="reward_model", use_peft=True)
    assert training_memory(1000, 10, adapted, parts=2) == (2 * 160 + 16_000) / 2 + 4_000
