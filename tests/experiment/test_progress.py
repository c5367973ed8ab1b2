"""How far an experiment is, and how long it takes: by hand."""

from __future__ import annotations

import pytest

from rlhf_pipeline.experiment.progress import Progress, spoken, time_left


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
    progress = Progress(["sft", "ppo", "ppo", "dpo", "ppo"], [True, False, False, False, True])
    progress.ended(0, True, 5.0)
    assert progress.told(1) == "ran 0, skipped 1"
    progress.ended(1, False, 100.0)
    assert progress.told(2) == "ran 1, skipped 1"  # how long dpo takes is not known
    progress.ended(2, False, 140.0)
    progress.ended(3, False, 60.0)
    progress.ended(4, True, 120.0)
    assert (progress.ran, progress.skipped) == (3, 2)
    # Of three runs the last is done already: two of ppo at a mean of 120 s.
    later = Progress(["ppo", "ppo", "ppo", "ppo"], [False, False, False, True])
    later.ended(0, False, 120.0)
    assert later.told(1) == "ran 1, skipped 0; about 4 min left"
