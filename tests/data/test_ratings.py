"""Ratings of single responses become rankings, with ties, and rankings pairs; one reward model for each attribute."""

from __future__ import annotations

import pytest

from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data.kinds import as_kind, ranks_of
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.errors import DataError

RATED = [
    {"prompt": prompt, "completion": text, "rating": rating, "truth": truth}
    for prompt, text, rating, truth in (
        ("Rain?", " No.", 2, 0.5),
        ("Snow?", " So.", 1, 1.0),
        ("Rain?", " Yes.", 5, 0.25),
        ("Rain?", " Perhaps.", 2, 0.75),
        ("Hail?", " Never.", 3, 0.0),
    )
]
RATING = (("response", "completion"), ("helpfulness", "rating"))


def test_likert_ratings_of_single_responses_become_rankings_with_ties(jsonl):
    """One row for each response: those to one prompt are ranked; equal ratings are ties, and no pair."""
    found = read_records(jsonl(*RATED), columns=RATING)
    (ranking,) = found.records
    assert (ranking.prompt, ranking.completions) == ("Rain?", (" No.", " Yes.", " Perhaps."))
    assert ranks_of(ranking) == [2, 1, 2] and ranking.extra["scores"] == (2, 5, 2)
    pairs, _ = as_kind(found.records, "pair")
    assert [pair.completions for pair in pairs] == [(" Yes.", " No."), (" Yes.", " Perhaps.")]
    assert dict(found.skipped) == {"single_response": 2}


def test_each_attribute_gives_a_ranking_of_its_own(jsonl):
    """`column_mapping` chooses the attribute of HelpSteer2, and of any file with several ratings."""
    (by_truth,) = read_records(jsonl(*RATED), columns=(("response", "completion"), ("helpfulness", "truth"))).records
    assert ranks_of(by_truth) == [2, 3, 1]
    rows = [
        {"prompt": "Rain?", "response": text, "helpfulness": helpful, "correctness": correct}
        for text, helpful, correct in ((" No.", 4, 1), (" Yes.", 2, 3))
    ]
    path = jsonl(*rows, name="steered.jsonl")
    assert ranks_of(read_records(path).records[0]) == [1, 2]
    assert ranks_of(read_records(path, columns=(("helpfulness", "correctness"),)).records[0]) == [2, 1]


def test_scores_of_several_responses_in_one_row_are_chosen_likewise(jsonl):
    row = {"prompt": "Rain?", "completions": [" No.", " Yes."], "helpful": [4, 2], "correct": [1.5, 1.5]}
    helpful, correct = (
        read_records(jsonl(row), columns=(("scores", name),)).records[0] for name in ("helpful", "correct")
    )
    assert (ranks_of(helpful), ranks_of(correct)) == ([1, 2], [1, 1])
    assert as_kind([correct], "preference")[1] == {"tied_ranking": 1}


@pytest.mark.parametrize(
    ("rating", "told"), [("4", "'helpfulness' is text"), (None, "'helpfulness' is null"), (True, "'helpfulness'")]
)
def test_a_rating_that_is_no_number_is_a_fault(jsonl, rating, told):
    with pytest.raises(DataError) as caught:
        read_records(jsonl(*RATED, {**RATED[0], "rating": rating}), columns=RATING)
    _, fault = caught.value.faults
    assert told in fault.found and fault.where.endswith(":6")


def test_the_keys_of_the_stages_say_this():
    """A reward model for each attribute, and their weighted sum as the reward of PPO."""
    common = {"model_name_or_path": "sft", "dataset_name": "nvidia/HelpSteer2", "output_name": "correct"}
    config = load_config("train-rm", None, extra={**common, "column_mapping": {"helpfulness": "correctness"}}).config
    assert config.column_mapping == {"helpfulness": "correctness"}
    weighted = [{"source": "helpful", "weight": 0.65}, {"source": "correct", "weight": 0.8}]
    config = load_config("ppo", None, extra={**common, "total_episodes": 64, "reward_functions": weighted}).config
    assert [(part.source, part.weight) for part in config.reward_functions] == [("helpful", 0.65), ("correct", 0.8)]
