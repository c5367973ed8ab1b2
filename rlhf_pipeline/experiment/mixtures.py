"""The rows of a run some of whose sources do not exist yet, chosen and mixed as the run will do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_pipeline.config.collect import CollectConfig
from rlhf_pipeline.config.training import TrainingConfig
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.data.load import mix, read_records
from rlhf_pipeline.data.samples import hold_out, lowest_examples
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.stages.data import StageData, prompts_by_split, trains_all_replies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Source = Callable[[int, str], Sequence[Example]]
"""The rows of a source, by its number, in a split."""


def rows_to_come(
    config: TrainingConfig, split: str, kind: str, limit: int | None, rows_of: Source
) -> Sequence[Example]:
    """The rows of a split; none if the mixture has none.

    Args:
        rows_of: the rows of each source. kind, limit: as for `StageData.split`, which does the same with what exists.
    """
    trains = split == config.dataset_train_split
    divided = config.test_split_size if trains or split == config.dataset_test_split else None
    read = split if divided is None else config.dataset_train_split
    entries = config.datasets
    if entries is None:
        found = rows_of(0, read)
    else:
        if not trains and divided is None:  # a fraction is of the training examples
            entries = tuple(entry.model_copy(update={"fraction": None}) for entry in entries)
        sets = [lowest_examples(rows_of(number, read), one.max_samples) for number, one in enumerate(entries)]
        found, _ = mix(sets, entries, max_samples=limit if divided is None else None, kind=kind)
    if divided is not None and found:
        found = hold_out(found, divided)[0 if trains else 1]
    return lowest_examples(found, limit)


def as_rows(rows: list[Example], kind: str) -> list[Example]:
    """The records of a `collect` run, with the responses that it samples, as examples of a kind."""
    if kind == "labelled":
        rows = [replace(one, completions=[ids], ended=[True]) for one in rows for ids in one.completions]
    if kind in ("demonstration", "prompt"):
        rows = [replace(one, completions=one.completions[:1], ended=[True]) for one in rows]
    if kind == "prompt":
        rows = list({one.prompt_key: one for one in rows}.values())
    return rows


def prompts_to_sample(
    config: CollectConfig, tokenizer: PreTrainedTokenizerBase, style: Style, home: Path
) -> list[tuple[Example, str]]:
    """The prompts of a `collect` run with their splits, in its order."""
    (data,) = config.sources()
    found = read_records(*data, home=home, skip_bad_rows=config.skip_bad_rows, splits=config.splits)
    prompts, _ = prompts_by_split(found, config, tokenizer, style)
    return [prompts[(config.first_record + n) % len(prompts)] for n in range(config.num)]


def rows_that_exist(
    config: TrainingConfig, kind: str, number: int, split: str, tokenizer: PreTrainedTokenizerBase, home: Path
) -> Sequence[Example]:
    """All rows of a split of one source of a mixture; none if it has no such split."""
    assert config.datasets is not None
    whole = config.datasets[number].model_copy(update={"fraction": 1.0, "max_samples": None})
    alone = config.model_copy(update={"datasets": (whole,), "test_split_size": None})
    every = trains_all_replies(config)
    return StageData(alone, home, lambda _: None).split(kind, split, tokenizer, required=False, all_replies=every)[0]
