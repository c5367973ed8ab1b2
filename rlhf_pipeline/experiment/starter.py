"""`rlhf init`: an experiment file for the user's own preference pairs, with lengths and sizes from the data."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_pipeline.config.names import is_name
from rlhf_pipeline.data.check import describe
from rlhf_pipeline.data.load import blank_prompts, read_records
from rlhf_pipeline.data.overlap import evaluation_splits, leaks
from rlhf_pipeline.data.records import Record, plain
from rlhf_pipeline.data.samples import lowest_hashes
from rlhf_pipeline.data.sources import local_path
from rlhf_pipeline.data.splits import FRACTIONS, assign_splits, carries_splits
from rlhf_pipeline.data.templates import BUILT_IN
from rlhf_pipeline.data.tokenizers import load_tokenizer, train_byte_level_bpe
from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.evaluation.data_quality import FEW_JUDGE_PAIRS, FEW_TEST_PROMPTS
from rlhf_pipeline.experiment.starter_file import POSITIONS, TEMPLATE, VOCABULARY, Quick, Starter
from rlhf_pipeline.registry.lengths import positions_of
from rlhf_pipeline.registry.references import Resolved, Version
from rlhf_pipeline.registry.roles import check_role
from rlhf_pipeline.registry.store import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MEASURED = 5000
"""Number of records whose lengths are measured."""
FEW = 1500
"""With fewer pairs, the default shares leave too few for the judge and the test split."""
SHARES_OF_FEW = {"train": 0.6, "judge": 0.2, "validation": 0.05, "test": 0.15}


def _lengths(prompt: int, response: int, positions: int | None) -> tuple[int, int, list[str]]:
    """Length limits that cover 99 % of the data, reduced to the positions of the model, and warnings."""
    prompt, response = (max(8, -(-length // 8) * 8) for length in (prompt, response + 1))  # multiples of 8; its EOS
    if positions is None or prompt + response <= positions:
        return prompt, response, []
    # A prompt can be cut, a response cannot: a response may take up to three quarters of the positions.
    least = min(prompt, positions // 4)
    fits = min(response, positions - least)
    told = (
        f"the model has {positions} positions, prompts of {prompt} and responses of {response} tokens (99 % have less) "
    )
    told += "do not fit: longer prompts are cut" + ("" if fits == response else ", longer responses left out")
    return positions - fits, fits, [told]


def _warnings(splits: dict[str, int], prompts: int, faulty: int, rows: int) -> list[str]:
    """Warnings on rows that are left out and on splits that are too small."""
    said = [f"{faulty} of {rows} rows are faulty and left out: rlhf data check lists them"] if faulty else []
    if splits.get("judge", 0) < FEW_JUDGE_PAIRS:
        said.append(
            f"{splits.get('judge', 0)} pairs for the judge: it may be no better than 'the longer response wins'; "
            "then its scores decide nothing"
        )
    if prompts < FEW_TEST_PROMPTS:
        width = 100 * 1.96 * 0.5 / math.sqrt(max(prompts, 1))
        said.append(f"{prompts} test prompts: the 95 % interval of a win rate is about ±{width:.0f} percentage points")
    return said


def plan_starter(
    source: str,
    *,
    model: str | None,
    seeds: int,
    folder: Path,
    home: Path,
    lora: bool = False,
    quick: bool = False,
) -> Starter:
    """Read the pairs and choose lengths, splits and sizes.

    Args:
        source: preference pairs or rankings. model: the model to start from; None trains one from scratch.
        folder: where the file will be written. lora: train adapters on the model.
        quick: plan a first look, with one seed and shorter lengths; `fitted` reduces it further.

    Raises:
        BadInput: the source has no preferences, or the model does not exist; adapters without a model.
    """
    if lora and model is None:
        raise BadInput("--lora: found no --model; expected the model whose weights the adapters leave frozen")
    found = read_records(source, home=home, skip_bad_rows=True)
    records = [record for record in found.records if record.kind in ("pair", "ranking")]
    if not records:
        kinds = ", ".join(sorted({record.kind for record in found.records})) or "nothing"
        raise BadInput(f"{source}: found {kinds}, expected pairs or rankings: which of two responses is better")
    carried = carries_splits(records, source)
    shares = SHARES_OF_FEW if not carried and len(records) < FEW else None
    assigned = assign_splits(records, shares or FRACTIONS, source)
    splits = dict(Counter(assigned))
    train, test = (_split(source, splits, part, carried) for part in ("train", "test"))
    learned = [record for record, split in zip(records, assigned, strict=True) if split == train]
    leaked = leaks(records, assigned, train, {test, *evaluation_splits(train)}) if carried else []
    held_out = {
        record.where: record.prompt_key for record, split in zip(records, assigned, strict=True) if split == test
    }
    tested = len({held_out[where] for where in held_out.keys() - {item.fault.where for item in leaked}})
    blank = blank_prompts(found)

    resolved = None if model is None else Registry(home).resolve(model)
    tokenizer, positions = _tokenizer(learned, resolved)
    templated = not tokenizer.chat_template and any(record.conversational for record in records)
    if templated:
        tokenizer.chat_template = BUILT_IN[TEMPLATE]
    described = describe(replace(found, records=lowest_hashes(records, MEASURED)), tokenizer=tokenizer)
    measured = described["lengths"]
    if not {"prompt", "chosen"} <= measured.keys():
        why = "all are ties" if described["ties"] else f"no pair has a prompt that {model or 'a tokenizer'} can read"
        raise BadInput(f"{source}: found no pair to learn from ({why}); see rlhf data check")
    share = "p95" if quick else "p99"
    longest = max(measured[name][share] for name in ("chosen", "rejected"))
    prompt, response, told = _lengths(measured["prompt"][share], longest, positions)
    faulty = max(len({item.fault.where for item in [*found.faults, *blank]}), described["faulty_rows"])
    faulty += len({item.fault.where for item in leaked})
    path = local_path(source)
    stem = "pairs" if path is None else path.name.partition(".")[0]
    return Starter(
        name=stem if is_name(stem) else "pairs",
        dataset=source if path is None else _path(path, folder),
        model=_model(resolved, model, folder),
        seeds=1 if quick else seeds,
        pairs=len(records),
        faulty=faulty,
        splits=splits,
        train=train,
        test=test,
        shares=shares,
        max_prompt_length=prompt,
        response_length=response,
        cut=bool(told),
        templated=templated,
        tested=tested,
        lora=lora,
        quick=Quick(rows=min(Quick.rows, len(learned))) if quick else None,
        warnings=told + _warnings(splits, tested, faulty, found.rows),
    )


FIRST_LOOK_SECONDS = 3600.0
"""The longest time that a first look is estimated to take."""
FEWEST, SHORTEST = Quick(rows=64, episodes=32, prompts=16), 64
"""The least sizes of a first look, and the least length, in tokens, that it shortens prompts and responses to."""


def fitted(plan: Starter, seconds_of: Callable[[Starter], float | None]) -> tuple[Starter, float | None]:
    """Reduce a first look until its estimated time is at most FIRST_LOOK_SECONDS; return it with its time.

    First rows, episodes and prompts are reduced together, to a quarter at least; then the lengths are halved; then the
    sizes again. A plan whose least sizes take longer, or whose time is not known, says so in its warnings.
    """
    seconds = seconds_of(plan)
    while seconds is not None and seconds > FIRST_LOOK_SECONDS and (less := _reduced(plan, seconds)) != plan:
        plan, seconds = less, seconds_of(less)
    if seconds is not None and seconds <= FIRST_LOOK_SECONDS:
        return plan, seconds
    told = "its time is not known" if seconds is None else "the least first look takes longer than an hour here"
    return replace(plan, warnings=[*plan.warnings, told]), seconds


def _reduced(plan: Starter, seconds: float) -> Starter:
    """A smaller first look; the same one if it has the least sizes."""
    assert plan.quick is not None
    quick, share = plan.quick, max(0.25, 0.95 * FIRST_LOOK_SECONDS / seconds)
    limits = (plan.max_prompt_length, plan.response_length)
    shorter = tuple(min(length, max(SHORTEST, length // 2)) for length in limits)
    whole = Quick()
    least = Quick(whole.rows // 4, whole.episodes // 4, whole.prompts // 4) if shorter != limits else FEWEST
    smaller = Quick(
        min(quick.rows, max(least.rows, int(quick.rows * share) // 16 * 16)),
        min(quick.episodes, max(least.episodes, int(quick.episodes * share) // 32 * 32)),
        min(quick.prompts, max(least.prompts, int(quick.prompts * share))),
    )
    if smaller != quick or shorter == limits:
        return replace(plan, quick=smaller)
    return replace(plan, max_prompt_length=shorter[0], response_length=shorter[1])


def _split(source: str, splits: Mapping[str, int], part: str, carried: bool) -> str:
    """The split for a part (train, test, ...): the split of that name, else the only one whose name begins with it.

    Of several, the one for preferences is taken: train_prefs, as UltraFeedback has beside train_sft and train_gen.
    """
    found = [part] if part in splits else [name for name in splits if name.startswith(part)]
    if f"{part}_prefs" in found:
        found = [f"{part}_prefs"]
    if len(found) != 1:
        there = ", ".join(f"{name} ({count})" for name, count in splits.items())
        if not carried:
            raise BadInput(
                f"{source}: too few different prompts: the hash puts them into {there}; expected some in {part!r}"
            )
        raise BadInput(
            f"{source}: found the splits {there}; expected rows in a split whose name begins with {part!r}: add "
            "rows or rename the splits, or write the experiment by hand (docs/experiments.md)"
        )
    return found[0]


def _tokenizer(learned: Sequence[Record], resolved: Resolved | None) -> tuple[PreTrainedTokenizerBase, int | None]:
    """The tokenizer that measures lengths, and the positions of the model; without a model, those that `sft` trains."""
    if resolved is None:
        texts = (plain(text) for record in learned for text in (record.prompt or "", *record.completions))
        return train_byte_level_bpe(texts, VOCABULARY), POSITIONS
    check_role(resolved, "policy")
    tokenizer = load_tokenizer(resolved.location, revision=resolved.revision)
    return tokenizer, positions_of(resolved)


def _model(resolved: Resolved | None, model: str | None, folder: Path) -> str | None:
    """The name of a model in the file: its present version, a directory, or a hub id."""
    if resolved is None or isinstance(resolved, Version):
        return None if resolved is None else resolved.label
    return model if resolved.path is None else _path(resolved.path, folder)


def _path(path: Path, folder: Path) -> str:
    """A path in the file: absolute, but relative if the file is in the working directory, so that both can be moved."""
    text = os.path.join(".", os.path.relpath(path, folder)) if folder == Path.cwd() else str(path.absolute())
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadInput(f"{text!r}: its name is not UTF-8; rename it") from None
    return text
