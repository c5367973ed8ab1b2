"""`rlhf data ...`: sources, collected preference data, the built-in world."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rlhf_pipeline.cli.libraries import load_libraries
from rlhf_pipeline.cli.options import Common, OverridesArgument, Settings, command
from rlhf_pipeline.cli.output import emit, emit_json, emit_lines, emit_plan, emit_table, flat_metrics, number
from rlhf_pipeline.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

app = typer.Typer(no_args_is_help=True, help="Check, preview, fetch, collect, list and export data.")

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="Hub id, directory of files, .jsonl[.gz], .json, .csv, .parquet, world:verdicts or collected:NAME.",
        show_default=False,
    ),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--chat-template", help="Chat template for --tokenizer: a name or Jinja text, as in a config."),
]
TemplatePathOption = Annotated[
    str | None, typer.Option("--chat-template-path", help="File or tokenizer with that chat template.")
]
TemplateValuesOption = Annotated[
    str | None, typer.Option("--chat-template-kwargs", help="Values for the chat template, as a JSON object.")
]
EosOption = Annotated[str | None, typer.Option("--eos-token", help="Token that ends a response, as in a config.")]
PartOption = Annotated[str | None, typer.Option("--dataset-config", help="Configuration of the source.")]
ColumnsOption = Annotated[
    list[str] | None,
    typer.Option("--column-mapping", metavar="OURS=THEIRS", help="A column to rename; may be repeated."),
]


def _columns(given: list[str] | None) -> tuple[tuple[str, str], ...]:
    """The pairs of --column-mapping.

    Raises:
        BadInput: an option is not OURS=THEIRS.
    """
    from rlhf_pipeline.errors import BadInput

    pairs = [(word, *word.partition("=")) for word in given or ()]
    for word, ours, _, theirs in pairs:
        if not ours or not theirs:
            raise BadInput(f"--column-mapping {word}: expected OURS=THEIRS, for example prompt=question")
    return tuple((ours, theirs) for _, ours, _, theirs in pairs)


@command(app, "check")
def check(
    common: Common,
    source: SourceArgument,
    dataset_config: PartOption = None,
    column_mapping: ColumnsOption = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Model whose tokenizer measures lengths (default: characters).")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", help="Length limit for the check, tokens; needs --tokenizer.", min=1)
    ] = None,
    max_prompt_length: Annotated[int | None, typer.Option("--max-prompt-length", help="As in a config.", min=1)] = None,
    response_length: Annotated[int | None, typer.Option("--response-length", help="As in a config.", min=1)] = None,
    chat_template: TemplateOption = None,
    chat_template_path: TemplatePathOption = None,
    chat_template_kwargs: TemplateValuesOption = None,
    eos_token: EosOption = None,
) -> None:
    """Faults, splits, duplicates, leakage, label noise and lengths of a source; exit 2 if a stage would refuse it."""
    from rlhf_pipeline.config.lengths import resolve_lengths
    from rlhf_pipeline.data.check import describe
    from rlhf_pipeline.data.load import read_records
    from rlhf_pipeline.evaluation.data_quality import findings, label_noise

    given = (max_prompt_length, response_length, max_length)
    limits = None if given == (None, None, None) else resolve_lengths(*given)
    if limits is not None and tokenizer is None:
        raise BadInput("--max-length: lengths are in tokens; expected --tokenizer MODEL beside it")
    keys = (chat_template, chat_template_path, chat_template_kwargs, eos_token)
    reader = _tokenizer(common, tokenizer, *keys)
    columns = _columns(column_mapping)
    found = read_records(source, dataset_config, columns=columns, home=common.home_path, skip_bad_rows=True)
    found.records = list(found.records)  # every figure reads all of them
    result = describe(found, tokenizer=reader, limits=limits) | {"label_noise": label_noise(found.records)}
    result["findings"] = findings(result)
    if common.json:
        emit_json(result)
    else:
        emit_lines(result["findings"])
        emit_table(result["source"], ("what", "value"), flat_metrics(result))
        trip = result.get("round_trip", {"first": [], "different": 0, "white_space_only": 0})
        for lines, count in (
            (result["fault_list"], sum(result["faults"].values())),
            (result["leak_list"], result["leaked_rows"]),
            (trip["first"], trip["different"] - trip["white_space_only"]),
        ):
            more = count - len(lines)
            emit_lines([*lines, *([f"... and {more} more"] if more > 0 else [])])
    if result["faulty_rows"] or result["leaked_rows"]:
        raise typer.Exit(2)


@command(app, "preview")
def preview(
    common: Common,
    source: SourceArgument,
    rows: Annotated[int, typer.Option("--rows", "-n", help="Number of rows.", min=1)] = 3,
    dataset_config: PartOption = None,
    column_mapping: ColumnsOption = None,
    tokenizer: Annotated[
        str | None, typer.Option("--tokenizer", help="Model whose tokenizer shows token ids, borders, trained tokens.")
    ] = None,
    train_on: Annotated[
        Literal["all_assistant", "last", "all"],
        typer.Option("--train-on", help="Trained tokens of a conversation, as in `rlhf sft`."),
    ] = "all_assistant",
    chat_template: TemplateOption = None,
    chat_template_path: TemplatePathOption = None,
    chat_template_kwargs: TemplateValuesOption = None,
    eos_token: EosOption = None,
) -> None:
    """The first rows, as the data reader parses them, and as a tokenizer reads them."""
    from rlhf_pipeline.data.check import preview as first_rows

    keys = (chat_template, chat_template_path, chat_template_kwargs, eos_token)
    reader = _tokenizer(common, tokenizer, *keys)
    reading: dict[str, Any] = {"config": dataset_config, "columns": _columns(column_mapping), "home": common.home_path}
    found = first_rows(source, rows, **reading, tokenizer=reader, train_on=train_on)
    if common.json:
        emit_json({"source": source, "rows": found})
        return
    for row in found:
        lines = [f"{row['where']}  {row['kind']}" + (f"  split {row['split']}" if row["split"] else "")]
        if row["prompt"] is not None:
            lines.append(f"  prompt      {row['prompt']!r}")
        for completion, ended in zip(row["completions"], row["ended"], strict=True):
            lines.append(f"  completion  {completion!r}{'' if ended else '  (cut)'}")
        emit_lines([*lines, *_token_lines(row.get("tokens"))])


def _tokenizer(
    common: Common, reference: str | None, template: str | None, path: str | None, values: str | None, eos: str | None
) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a model with the given chat template and EOS; None without a reference."""
    from rlhf_pipeline.config.compare import EvaluateConfig
    from rlhf_pipeline.config.load import load_config

    given = {"chat_template": template, "chat_template_path": path, "eos_token": eos}
    if reference is None:
        if any((*given.values(), values)):
            raise BadInput("--chat-template, --eos-token: they belong to a tokenizer; expected --tokenizer MODEL too")
        return None
    words = [] if values is None else [f"chat_template_kwargs={values}"]
    keys = {key: value for key, value in given.items() if value is not None}
    config = load_config("evaluate", None, words, extra=keys).of(EvaluateConfig)
    from rlhf_pipeline.data.templates import apply_template_keys
    from rlhf_pipeline.data.tokenizers import load_tokenizer

    resolved = common.registry.resolve(reference)
    return apply_template_keys(load_tokenizer(resolved.location, resolved.revision, eos_token=eos), config)


def _token_lines(tokens: dict[str, Any] | None) -> Iterator[str]:
    """Yield the lines on a row's tokens: ids of the prompt, of each completion, and the text of the trained ones."""
    if tokens is None:
        return
    if "left_out" in tokens:
        yield f"  left out    {tokens['left_out']}"
        return
    yield f"  prompt      {len(tokens['prompt_ids'])} tokens {tokens['prompt_ids']}"
    for ids, flags, texts in zip(tokens["completion_ids"], tokens["trained"], tokens["trained_text"], strict=True):
        yield f"  completion  {len(ids)} tokens {ids}"
        yield f"  trained     {sum(flags)} tokens {', '.join(map(repr, texts))}"
    for reason, count in tokens["cut"].items():
        yield f"  cut         {reason} {count}"


@command(app, "fetch")
def fetch(
    common: Common,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Hub id.", show_default=False)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new directory.", show_default=False)],
    rows: Annotated[int, typer.Option("--rows", "-n", help="Rows of each split, from its first one on.", min=1)],
    dataset_config: PartOption = None,
) -> None:
    """Write the first rows of a hub data set into a directory, which is then a source; the rest is not fetched."""
    from rlhf_pipeline.data.fetch import fetch as fetch_rows

    counts = fetch_rows(source, directory, rows, dataset_config)
    said = ", ".join(f"{count:,} rows of {split}" for split, count in counts.items())
    emit({"path": str(directory), "rows": counts}, [f"wrote {said} to {directory}"], json=common.json)


@command(app, "list")
def list_data(common: Common) -> None:
    """Collected data sets and the built-in world."""
    entries: list[dict[str, Any]] = []
    for item in common.registry.data.all():
        made = item.manifest
        parents = {role: parent.ref for role, parent in made.parents.items()} if made else {}
        entries.append(
            {
                "data": f"collected:{item.label}",
                "records": made.metrics.get("records") if made else None,
                "judge": made.metrics.get("judge") if made else "damaged",
                "policy": parents.get("policy"),
                "created": made.created if made else None,
                "digest": item.digest,
                "path": str(item.path),
            }
        )
    if common.json:
        emit_json({"home": str(common.home_path), "built_in": ["world:verdicts"], "data": entries})
        return
    rows = [("world:verdicts", "-", "-", "-", "built in", "-")]
    for entry in entries:
        records, digest = number(entry["records"]), (entry["digest"] or "-")[:12]
        created = entry["created"] or "-"
        rows.append((entry["data"], records, entry["judge"] or "-", entry["policy"] or "-", created, digest))
    emit_table(str(common.home_path), ("data", "records", "judge", "policy", "created", "digest"), rows)


@command(app, "export-world")
def export_world(
    common: Common,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty directory.", show_default=False)],
) -> None:
    """Write the built-in world as JSONL files (demonstrations, prompts) and its tokenizer."""
    from rlhf_pipeline.data import world

    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise BadInput(f"{directory}: exists and is not empty; expected a new or empty directory")
    directory.mkdir(parents=True, exist_ok=True)
    counts = {}
    for part in world.CONFIGS:
        records = world.records(part)
        counts[part] = len(records)
        with (directory / f"{part}.jsonl").open("w", encoding="utf-8") as file:
            for record in records:
                # Token ids are written beside the text: a response that is only the end token has no text.
                row: dict[str, Any] = {"prompt": record.prompt, "prompt_ids": record.prompt_ids, "split": record.split}
                if record.completions and record.completion_ids:
                    row |= {"completion": record.completions[0], "completion_ids": record.completion_ids[0]}
                    row["ended"] = record.ended[0]
                file.write(json.dumps(row) + "\n")
    world.tokenizer().save_pretrained(directory / "tokenizer")
    emit({"path": str(directory), **counts}, [f"wrote {counts} and the tokenizer to {directory}"], json=common.json)


@command(app, "collect", dry_run=True, config="collect", keys=("prompts", "k", "judge", "num", "name"))
def collect(
    common: Common,
    settings: Settings,
    policy: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="Policy that responds.", show_default=False)
    ] = None,
    overrides: OverridesArgument = None,
) -> None:
    """Sample K responses per prompt from a policy, label them with a judge, and publish the pairs."""
    words = list(overrides or [])
    if policy is not None and "=" in policy:
        words, policy = [policy, *words], None
    from rlhf_pipeline.config.collect import CollectConfig

    loaded = settings.load(words, policy=policy)
    config = loaded.of(CollectConfig)
    if common.dry_run:
        from rlhf_pipeline.experiment.estimate import estimate_stage

        plan = estimate_stage(config, common.home_path)
        emit_plan(plan, "nothing was collected", json=common.json)
        return
    load_libraries()
    from rlhf_pipeline.labelling.people import collect as collect_data

    result = collect_data(config, common.home_path, notes=loaded.notes)
    if common.json:
        emit_json(result.as_dict())
        return
    emit_table(f"collected:{result.model}", ("what", "value"), flat_metrics(result.metrics))
    emit_lines([f"data   collected:{result.model}", f"path   {result.path}"])
