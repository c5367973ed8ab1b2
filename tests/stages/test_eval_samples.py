"""max_eval_samples: how many rows of the test split are evaluated, in every stage that evaluates."""

from __future__ import annotations

import pytest

COUNTED = {"sft": "eval_examples", "train-rm": "pairs", "dpo": "eval_pairs"}


@pytest.mark.check
@pytest.mark.parametrize("stage", COUNTED)
def test_at_most_so_many_rows_are_evaluated(lab, stage) -> None:
    data = {} if stage == "sft" else {"dataset_test_split": "all"}
    data |= {"dataset_name": "world:verdicts"} if stage == "sft" else {}
    options = {"max_steps": 1, "reward_centering": "none"} if stage == "train-rm" else {"max_steps": 1}
    some = lab.run(stage, **data, **options, max_eval_samples=7).metrics[COUNTED[stage]]
    assert some == 7
    every = lab.run(stage, **data, **options, max_eval_samples=10**6).metrics[COUNTED[stage]]
    assert every > 100
    assert lab.config(stage).max_eval_samples == 2000 and lab.config(stage, max_eval_samples=9).max_eval_samples == 9


def test_ppo_evaluates_nothing(lab) -> None:
    from rlhf_pipeline.errors import ConfigError

    with pytest.raises(ConfigError, match="max_eval_samples: ppo makes no evaluation"):
        lab.config("ppo", max_eval_samples=7)
