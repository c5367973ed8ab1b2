"""How far an experiment is, and how long it takes: by hand."""

from __future__ import annotations

import pytest

from rlhf_pipeline.experiment.progress import progress_line, spoken, time_left


def test_the_time_that_is_left_is_the_mean_of_each_stage() -> None:
    known = {"ppo": [20.0, 30.0], "dpo": [10.0]}
    assert time_left(["ppo", "dpo", "ppo"], known) == 25 + 10 + 25
    assert time_left(["ppo", "reward"], known) is None
    assert time_left([], {}) == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 s"),
        (40.4, "40 s"),
        (90, "2 min"),
        (719, "12 min"),
        (5399, "90 min"),
        (5400, "1.5 h"),
        (36000, "10.0 h"),
    ],
)
def test_durations_in_words(seconds, text) -> None:
    assert spoken(seconds) == text


def test_progress_says_nothing_of_time_until_every_stage_was_seen() -> None:
    # The runs sft, ppo, ppo, dpo, ppo, of which the first and the last are known to be done.
    ended = [("sft", True, 5.0)]
    assert progress_line(["ppo", "ppo", "dpo"], ended) == "ran 0, skipped 1"
    ended.append(("ppo", False, 100.0))
    assert progress_line(["ppo", "dpo"], ended) == "ran 1, skipped 1"  # how long dpo takes is not known
    ended += [("ppo", False, 140.0), ("dpo", False, 60.0), ("ppo", True, 120.0)]
    assert progress_line([], ended) == "ran 3, skipped 2; about 1 s left"
    # Of three runs the last is done already: two of ppo at a mean of 120 s.
    assert progress_line(["ppo", "ppo"], [("ppo", False, 120.0)]) == "ran 1, skipped 0; about 4 min left"
    assert progress_line(["ppo"], [("ppo", False, 120.0), ("ppo", False, None)]) == "ran 2, skipped 0; about 2 min left"
