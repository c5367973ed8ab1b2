"""People as the judge of collected data: sample responses, wait until they are labelled, and publish the labels.

`judge: people:NAME` adds the responses to the labelling project NAME as items. The first call samples and stops with
what to do. The same call goes on from there: it samples nothing again, and publishes once no item waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from pydantic import Field

from rlhf_pipeline.config.collect import CollectConfig, SamplingConfig
from rlhf_pipeline.config.dump import config_digest
from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.data.tokenizers import chat_template_digest, text_of, tokenizer_digest
from rlhf_pipeline.disk.storage import replace_text, writing
from rlhf_pipeline.errors import BadInput, DamagedFile
from rlhf_pipeline.labelling.export import export
from rlhf_pipeline.labelling.kinds import Item, Judgement, Part, Response
from rlhf_pipeline.labelling.origins import Origin
from rlhf_pipeline.labelling.store import LabelStore, database
from rlhf_pipeline.stages.collect import Collection, run_collect
from rlhf_pipeline.stages.result import StageResult

IDENTICAL = "identical_pair"


class Batch(Part):
    """What one collection has sampled for people. dropped: left out, by reason. cost: of sampling."""

    items: list[Item]
    dropped: dict[str, int]
    cost: dict[str, Any] = Field(default_factory=dict)


def collect(
    config: CollectConfig,
    home: Path,
    *,
    notes: Sequence[str] = (),
    quiet: bool = False,
    number: int | None = None,
    **options: Any,
) -> StageResult:
    """Collect data as `run_collect` does, also with people as the judge.

    Several labelers of an item count by their mean rank. Ties are no pairs, and items that labelers skipped are left
    out; both are counted.

    Raises:
        BadInput: what cannot be used; or items wait for labels. The message says how many, and what to do.
    """
    if config.project is None:
        return run_collect(config, home, notes=notes, quiet=quiet, number=number, **options)
    found = Collection.of(config, home, notes=notes, quiet=quiet)
    path, key = database(home, config.project), batch_key(found)
    file = path.parent / "batches" / f"{key}.json"
    if path.is_file():
        with LabelStore.open(path) as store:
            require_fitting(store, found)
    batch = _read(file) if file.is_file() else None
    if batch is None:
        batch = sample_batch(found)
        with writing(file, "the sampled responses"):
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_text(file, batch.model_dump_json())
    if not path.is_file():
        with suppress(BadInput):  # another process has just made it
            make_project(path, found)
    with LabelStore.open(path) as store:
        require_fitting(store, found)
        numbers = store.extend(batch.items, key)
        items, chosen = [store.item(n) for n in numbers], set(numbers)
        judged = [one for one in store.judgements() if one.item in chosen]
        waiting = waits(numbers, judged, len(store.labelers()), store.config.overlap)
    if waiting:
        items_wait = "1 item waits" if waiting == 1 else f"{waiting} items wait"
        raise BadInput(f"{items_wait} for labels: rlhf label serve {config.project}, then run this again")
    exported = export(items, judged, "pairs" if found.config.k == 2 else "rankings")
    # Of judgements `skipped` and `repeated` count; an item without a label is one that labelers skipped.
    left_out = {reason: n for reason, n in exported.left_out.items() if reason not in ("skipped", "repeated")}
    dropped = batch.dropped | {{"unlabelled": "skipped"}.get(reason, reason): n for reason, n in left_out.items()}
    if not exported.rows:
        raise BadInput(f"{config.project}: all {len(items)} items are tied or skipped; expected some pair to train on")
    labelers = len({one.labeler for one in judged})
    return found.publish(exported.rows, dropped, {}, number=number, cost=batch.cost, metrics={"labelers": labelers})


def batch_key(found: Collection) -> str:
    """What tells one collection from another: its config, the files of its policy, and its data."""
    policy = found.policy.digest or f"{found.policy.label} {found.policy.revision}"
    parts = [config_digest(found.config), policy, *(report.to_dict()["digest"] for report in found.reports)]
    return sha256("\n".join(parts).encode()).hexdigest()[:32]


def sample_batch(found: Collection) -> Batch:
    """Sample the responses of all items. Of identical responses to a prompt one is kept; an item needs two."""
    items: list[Item] = []
    dropped = Counter({IDENTICAL: 0})
    for splits, sampled in found.sample(found.generator()):
        for split, example in zip(splits, sampled, strict=True):
            item = _item(len(items), found, example, split)
            if item is None:
                dropped[IDENTICAL] += 1
            else:
                items.append(item)
    if not items:
        raise BadInput(f"{found.policy.label}: all responses to each prompt are identical; expected some that differ")
    return Batch(items=items, dropped=dict(dropped), cost=found.meter.report())


def _item(number: int, found: Collection, example: Example, split: str) -> Item | None:
    """The item of one prompt; None if all its responses are the same."""
    kept = {(tuple(ids), ended): ids for ids, ended in zip(example.completions, example.ended, strict=True)}
    if len(kept) < 2:
        return None
    responses = [
        Response(
            text=text_of(found.tokenizer, ids[: len(ids) - int(ended)]),
            source=found.policy.label,
            ids=list(ids),
            ended=bool(ended),
        )
        for (_, ended), ids in kept.items()
    ]
    prompt = example.prompt_text if example.messages is None else [dict(turn) for turn in example.messages]
    columns = {"prompt_ids": list(example.prompt_ids)}
    return Item(number=number, prompt=prompt, responses=responses, split=split, columns=columns)


def waits(numbers: Sequence[int], judged: Sequence[Judgement], labelers: int, overlap: int) -> int:
    """How many of these items wait for labels.

    An item is settled once `overlap` labelers have ranked it, or all labelers of the project have ranked or skipped it,
    at least one of them skipped it, and they are `overlap` or more.
    """
    ranked = Counter(one.item for one in judged if not one.skipped and not one.repeat)
    skipped = Counter(one.item for one in judged if one.skipped and not one.repeat)

    def settled(n: int) -> bool:
        seen_by_all = labelers >= overlap and ranked[n] + skipped[n] >= labelers
        return ranked[n] >= overlap or (skipped[n] > 0 and seen_by_all)

    return sum(not settled(n) for n in numbers)


def make_project(path: Path, found: Collection) -> None:
    """Make a labelling project without items, whose config says what this collection samples."""
    config = found.config
    shared = {name: getattr(config, name) for name in SamplingConfig.model_fields}
    own = {"name": config.project, "policies": (config.policy,), "prompts": config.prompts}
    project = LabelConfig.model_validate({**shared, **own, "k": config.k, "num": config.num})
    origin = Origin(
        parents={found.policy.label: found.policy.digest},
        tokenizer_digest=tokenizer_digest(found.tokenizer),
        chat_template_digest=chat_template_digest(found.tokenizer),
    )
    LabelStore.create(path, project, [], origin=origin).close()


def require_fitting(store: LabelStore, found: Collection) -> None:
    """Check that responses of this collection can be items of a project.

    Raises:
        BadInput: the project is an arena, or its responses are of another tokenizer.
    """
    what, theirs = f"judge {found.config.judge}", store.origin.tokenizer_digest
    if store.config.arena:
        raise BadInput(f"{what}: found an arena of this name; expected a project of rankings; give another name")
    if theirs != tokenizer_digest(found.tokenizer):
        found_ids = "no token ids" if theirs is None else "token ids of another tokenizer"
        raise BadInput(
            f"{what}: found responses with {found_ids} in this project; expected those of {found.policy.label}; give "
            "another name"
        )


def _read(file: Path) -> Batch:
    try:
        return Batch.model_validate_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{file}: cannot be read ({type(error).__name__}); remove it to sample again") from None
