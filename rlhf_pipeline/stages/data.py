"""The examples of a stage: the sources of its config, read once, with the same length limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.algorithms.preference import OBJECTIVES
from rlhf_pipeline.config.collect import SamplingConfig
from rlhf_pipeline.config.kto import UNPAIRED
from rlhf_pipeline.config.mentions import functions
from rlhf_pipeline.config.stages import DpoConfig, PpoConfig, SftConfig, TrainingConfig
from rlhf_pipeline.data import world
from rlhf_pipeline.data.encode import ADVICE
from rlhf_pipeline.data.examples import Example
from rlhf_pipeline.data.load import RecordSet, SourceReport, examples_of, load_mixture, read_records, rows_of
from rlhf_pipeline.data.overlap import keep_apart
from rlhf_pipeline.data.parsed import collector_at_rest
from rlhf_pipeline.data.records import plain
from rlhf_pipeline.data.render import REASONING, REWRITTEN
from rlhf_pipeline.data.samples import hold_out, lowest_examples
from rlhf_pipeline.data.splits import assign_splits
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.templates import apply_template_keys, template_of
from rlhf_pipeline.data.tokenizers import set_stop_token, train_byte_level_bpe
from rlhf_pipeline.errors import DataError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preference_kind(config: TrainingConfig) -> str:
    """The kind of example that a stage reads: pairs and rankings, TRL's trainers only pairs; KTO single responses."""
    if isinstance(config, DpoConfig) and config.loss_type in UNPAIRED:
        return "labelled"
    return "pair" if config.engine == "trl" else "preference"


def training_kind(config: TrainingConfig) -> str:
    """The kind of example that a stage trains on; of prompts alone, the stage makes the rest itself."""
    if isinstance(config, SftConfig):
        return "demonstration"
    if isinstance(config, PpoConfig) or (isinstance(config, DpoConfig) and config.population):
        return "prompt"
    if isinstance(config, DpoConfig) and any(
        name in OBJECTIVES and OBJECTIVES[name].listwise for name, _ in config.losses
    ):
        return "order"
    return preference_kind(config)


def trains_all_replies(config: TrainingConfig) -> bool:
    """Whether a stage trains on every turn of the assistant in a conversation."""
    return isinstance(config, SftConfig) and config.train_on == "all_assistant"


def prompts_by_split(
    found: RecordSet, config: SamplingConfig, tokenizer: PreTrainedTokenizerBase, style: Style
) -> tuple[list[tuple[Example, str]], tuple[SourceReport, ...]]:
    """Every distinct prompt with its split, in the style that the policy was trained in, and a report per split."""
    prompts: list[tuple[Example, str]] = []
    reports: tuple[SourceReport, ...] = ()
    for split in config.splits or sorted(set(assign_splits(found.records, config.split_fractions, found.source))):
        examples, report = examples_of(
            found,
            kind="prompt",
            split=split,
            tokenizer=tokenizer,
            lengths=config.lengths(),
            skip_bad_rows=config.skip_bad_rows,
            fractions=config.split_fractions,
            style=style,
        )
        prompts += [(example, split) for example in examples]
        reports += (report,)
    return prompts, reports


def stream_data(
    config: PpoConfig, home: Path, say: Callable[[str], None], tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Example], tuple[SourceReport, ...]]:
    """The examples of the pretraining stream beside a run's rollouts, and a report per source; none without a stream.

    Raises:
        DataError: rows have faults, or none can be used.
    """
    found = config.stream()
    if found is None:
        return [], ()
    examples, reports = StageData(found, home, say).training(tokenizer)
    each = f"{config.stream_batch_size} in each optimizer step, with weight {config.ptx_coef:g}"
    say(f"pretraining stream: {len(examples)} examples, {each}")
    return examples, tuple(replace(report, role="stream") for report in reports)


class StageData:
    """The data of one config (`dataset_name` or a mixture), by split and kind.

    Args:
        config: a training config. home: the folder of collected data. say: writes a line to the log.
    """

    def __init__(self, config: TrainingConfig, home: Path, say: Callable[[str], None]):
        self.config, self.home, self.say = config, home, say
        self._read: list[RecordSet] = []

    def sources(self, kind: str, tokenizer: PreTrainedTokenizerBase | None = None) -> list[RecordSet]:
        """All records of each source.

        Raises:
            DataError, UnknownReference: a source cannot be read.
        """
        if not self._read:
            config = self.config
            splits = {config.dataset_train_split, config.dataset_test_split}
            options: dict[str, Any] = {"skip_bad_rows": config.skip_bad_rows, "kind": kind, "tokenizer": tokenizer}
            options["say"] = self.say
            with collector_at_rest():
                self._read = [
                    keep_apart(read_records(*data, home=self.home, splits=splits, **options), config)
                    for data in config.sources()
                ]
            for found in self._read:
                read: dict[str, Any] = {"functions": any(functions(config)), "text_as_chat": config.text_as_chat}
                read["use_margin"] = getattr(config, "use_margin", None)
                for note in found.notes(template_of(tokenizer), **read):
                    self.say(f"data: {found.source}: {note}")
        return self._read

    def split(
        self,
        kind: str,
        split: str,
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int | None = None,
        required: bool = True,
        all_replies: bool = False,
    ) -> tuple[Sequence[Example], tuple[SourceReport, ...]]:
        """Examples of one split, and a report per source.

        Raises:
            DataError: rows have faults, or a `required` split has no examples.
        """
        config = self.config
        trains = split == config.dataset_train_split
        divided = config.test_split_size if trains or split == config.dataset_test_split else None
        options: dict[str, Any] = {
            "kind": kind,
            "split": split if divided is None else config.dataset_train_split,
            "tokenizer": tokenizer,
            "lengths": config.lengths(),
            "skip_bad_rows": config.skip_bad_rows,
            "fractions": config.split_fractions,
            "style": Style.of(config.model_dump(include={"instruction_style", "text_as_chat"})),
            "all_replies": all_replies,
            "processes": config.dataset_num_proc or 1,
        }
        most = limit if divided is None else None
        try:
            with collector_at_rest():
                found = self.sources(kind, tokenizer)
                if config.datasets:
                    entries = config.datasets
                    if not trains and divided is None:  # a fraction is of the training examples
                        entries = tuple(entry.model_copy(update={"fraction": None}) for entry in entries)
                    examples, reports = load_mixture(found, entries, max_samples=most, **options)
                else:
                    examples, report = examples_of(found[0], max_samples=most, **options)
                    reports = (report,)
                if divided is not None:
                    parts = hold_out(examples, divided)
                    self.say(f"test_split_size: {len(parts[0])} examples to train on, {len(parts[1])} held out")
                    examples = lowest_examples(parts[0] if trains else parts[1], limit)
        except DataError as error:
            if required:
                raise
            self.say(f"no examples in the split {split!r}: {first_line(error)}")
            return [], ()
        for report in reports:
            self.say("data: " + report.summary())
        for reason in (REASONING, REWRITTEN):
            if any(report.truncated.get(reason) for report in reports):
                self.say(f"note: {ADVICE[reason]}")
        return examples, reports

    def training(self, tokenizer: PreTrainedTokenizerBase) -> tuple[Sequence[Example], tuple[SourceReport, ...]]:
        """What the stage trains on (its prompts, if it samples the rest), and a report per source.

        Raises:
            DataError: rows have faults, or none can be used.
        """
        config = self.config
        kind, split, limit = training_kind(config), config.dataset_train_split, config.max_train_samples
        return self.split(kind, split, tokenizer, limit=limit, all_replies=trains_all_replies(config))

    def new_tokenizer(self, settings: Mapping[str, Any]) -> PreTrainedTokenizerBase:
        """Return the tokenizer of a `tokenizer_init`: the world's, or byte-level BPE trained on the training split."""
        if settings["type"] == "world":
            tokenizer = world.tokenizer()
        else:
            texts = self.texts(self.config.dataset_train_split)
            tokenizer = train_byte_level_bpe(texts, settings["vocab_size"])
            self.say(f"tokenizer: byte-level BPE of {len(tokenizer)} tokens, trained on {len(texts)} texts")
        set_stop_token(tokenizer, self.config.stop_token)
        return apply_template_keys(tokenizer, self.config)

    def held_out(
        self, kind: str, tokenizer: PreTrainedTokenizerBase
    ) -> tuple[Sequence[Example], tuple[SourceReport, ...]]:
        """Examples to evaluate on, at most `max_eval_samples`; none if the test split has none."""
        config = self.config
        options: dict[str, Any] = {"limit": config.max_eval_samples, "all_replies": trains_all_replies(config)}
        return self.split(kind, config.dataset_test_split, tokenizer, required=False, **options)

    def texts(self, split: str) -> list[str]:
        """All texts of a split, for training a tokenizer."""
        config = self.config
        texts: list[str] = []
        for found in self.sources("text"):
            for record in rows_of(found, split, config.split_fractions):
                pieces = [*([record.prompt] if record.prompt is not None else []), *record.completions]
                texts.extend(plain(piece) for piece in pieces)
        return texts
