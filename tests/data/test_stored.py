"""A large source, read from its store: the records, examples and reports are those of a source in memory."""

from __future__ import annotations

import errno
import json
import shutil
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_pipeline.data import encodings, parsed, stored
from rlhf_pipeline.data.examples import (
    Examples,
    all_whole,
    count_cut,
    count_pairs,
    first_lengths,
    part_sizes,
    parts_of,
    response_counts,
    texts_and_ranks,
    tree_lengths,
)
from rlhf_pipeline.data.load import examples_of, load_mixture, read_records, records_digest, rows_of
from rlhf_pipeline.data.overlap import leaks
from rlhf_pipeline.data.rows import Joined, Records
from rlhf_pipeline.data.samples import hold_out, lowest_examples
from rlhf_pipeline.data.splits import assign_splits
from rlhf_pipeline.data.styles import Style
from rlhf_pipeline.data.tokenizers import PAD, tokenizer_digest
from rlhf_pipeline.disk.storage import writing
from rlhf_pipeline.errors import DataError

TIGHT, WIDE = (SimpleNamespace(prompt=p, response=r, total=p + r) for p, r in ((4, 3), (99, 99)))
PROMPTS = ["a", "ab", "abc", "ba", "bcd", "cab", "dab", "d", "aabb", "abcd", "dcba", "c" * 7]


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]


SOURCES = {
    "pair": [
        {"prompt": prompt, "chosen": "ab"[: n % 2 + 1], "rejected": "cd" * (n % 3 + 1), "chosen_ended": n % 4 > 0}
        | ({"label_probability": n / 20} if n % 2 else {"margin": n / 3 - 1})
        | {"note": {"number": n, "text": "é\u2028"}}
        for n, prompt in enumerate([*PROMPTS, *PROMPTS[:5]])
    ],
    "ranking": [
        {"prompt": prompt, "completions": ["a", "b" * (n % 6 + 1), "cd"], "scores": [n % 3, 1, 0.5 * n]}
        for n, prompt in enumerate(PROMPTS)
    ],
    "ranks": [
        {"prompt": prompt, "completions": ["a", "b", "a"], "ranks": [1, 1 + n % 2, 1 + n % 3]}
        for n, prompt in enumerate(PROMPTS)
    ],
    "labelled": [
        {"prompt": prompt, "completion": "ab"[: n % 2 + 1], "label": n % 3 == 0} for n, prompt in enumerate(PROMPTS)
    ],
    "messages": [{"messages": turns("b", "a", prompt, "c" * (n % 5 + 1))} for n, prompt in enumerate(PROMPTS)],
    "splits": [
        {"prompt": prompt, "completion": "b" * (n % 3 + 1), "split": ("train", "test")[n % 3 == 0]}
        for n, prompt in enumerate(PROMPTS)
    ],
    "text": [{"text": prompt * 5} for prompt in PROMPTS],
    "tools": [
        {"messages": turns(prompt, "b"), "tools": [{"type": "f", "name": str(n), "a": 1}]}
        for n, prompt in enumerate(PROMPTS)
    ],
    "instruction": [{"instruction": prompt, "input": "", "output": "a"} for prompt in PROMPTS],
}
KINDS = {
    "pair": ("pair", "preference", "order", "demonstration", "prompt", "labelled"),
    "labelled": ("labelled", "prompt"),
    "ranking": ("pair", "preference", "order", "demonstration", "prompt"),
    "ranks": ("pair", "preference", "order", "demonstration", "prompt"),
    "messages": ("demonstration", "prompt"),
    "splits": ("demonstration", "prompt"),
    "text": ("demonstration",),
    "tools": ("demonstration", "prompt"),
    "instruction": ("demonstration", "prompt", "text"),
}


@pytest.fixture
def both(jsonl, tmp_path, monkeypatch):
    """Read a source from memory and from a store in a home directory."""

    def read(*rows, name="rows.jsonl", **options):
        source = jsonl(*rows, name=name)
        plain = read_records(source, home=tmp_path, skip_bad_rows=True, **options)
        with monkeypatch.context() as patch:
            patch.setattr(parsed, "STORED_BYTES", 0)
            from_store = read_records(source, home=tmp_path, skip_bad_rows=True, **options)
        assert isinstance(from_store.records, Records) and not isinstance(plain.records, Records)
        return plain, from_store

    return read


def made(found, tokenizer, **options):
    """The examples and the report of a source, or the error."""
    options = {"split": "all", "skip_bad_rows": True, "lengths": WIDE, "tokenizer": tokenizer, **options}
    try:
        examples, report = examples_of(found, **options)
    except DataError as error:
        return str(error)
    return [asdict(example) for example in examples], report


@pytest.mark.parametrize("name", SOURCES)
def test_records_are_kept(both, name):
    plain, from_store = both(*SOURCES[name])
    assert list(from_store.records) == plain.records
    assert records_digest(from_store.records) == records_digest(plain.records)
    assert assign_splits(from_store.records) == assign_splits(plain.records)
    for field in ("source", "format", "rows", "faults", "skipped", "unread", "not_read", "against"):
        assert getattr(from_store, field) == getattr(plain, field), field
    assert from_store.notes("tools") == plain.notes("tools") and from_store.notes("") == plain.notes("")
    # The order of keys in what templates read is kept too.
    assert json.dumps([record.extra for record in from_store.records]) == json.dumps(
        [record.extra for record in plain.records]
    )


@pytest.mark.parametrize("name", SOURCES)
def test_examples_are_those_of_memory(both, chat, name):
    plain, from_store = both(*SOURCES[name])
    for kind in KINDS[name]:
        for options in (
            {},
            {"lengths": TIGHT},
            {"split": "train"},
            {"max_samples": 5},
            {"style": Style(chat=True), "lengths": TIGHT},
            *([{"all_replies": True}] if kind == "demonstration" else []),
        ):
            assert made(from_store, chat, kind=kind, **options) == made(plain, chat, kind=kind, **options), (
                kind,
                options,
            )


def test_faults_of_tokens_are_those_of_memory(both, letters, chat):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "", "chosen": "a", "rejected": "b"}]
    rows += [{"prompt": "a", "chosen": "\n", "rejected": "b"}, {"prompt": "a", "chosen": "zb", "rejected": "b"}]
    plain, from_store = both(*rows, "{", {"prompt": "a"})
    for kind in KINDS["pair"]:
        for skip in (True, False):
            options = {"kind": kind, "skip_bad_rows": skip}
            assert made(from_store, letters, **options) == made(plain, letters, **options), options
    chat.chat_template = (
        "{% if messages[-1].content == 'no' %}{{ raise_exception('no') }}{% endif %}" + chat.chat_template
    )
    plain, from_store = both(
        *(
            {"prompt": turns(p), "chosen": turns("", r)[1:], "rejected": turns("", "d")[1:]}
            for p, r in ("ab", ("b", "no"))
        )
    )
    for kind in ("pair", "demonstration", "prompt"):
        assert made(from_store, chat, kind=kind) == made(plain, chat, kind=kind), kind


def test_a_second_reader_encodes_nothing(both, letters, monkeypatch):
    _, from_store = both(*SOURCES["pair"])
    first = made(from_store, letters, kind="pair")
    monkeypatch.setattr("rlhf_pipeline.data.encodings._fill", lambda *_: pytest.fail("encoded again"))
    assert made(from_store, letters, kind="pair") == first
    assert isinstance(made(from_store, letters, kind="prompt", lengths=TIGHT), tuple)  # another kind, other lengths


def test_a_changed_source_and_another_tokenizer_have_stores_of_their_own(both, letters, chat, tmp_path):
    def stores() -> int:
        return len(list(Path(tmp_path, "cache", "tokens").glob("*/table.json")))

    _, from_store = both(*SOURCES["pair"])
    made(from_store, letters, kind="pair")
    assert stores() == 2
    _, changed = both(*SOURCES["pair"][1:])
    assert len(changed.records) == len(from_store.records) - 1 and stores() == 3
    letters.chat_template = None
    made(from_store, letters, kind="pair")
    assert stores() == 4


SEPARATED = "{{ sep_token }}{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("change", "prompt"),
    [
        (lambda one: one.add_special_tokens({"pad_token": PAD}), f"a{PAD}b"),
        (lambda one: setattr(one, "sep_token", "b"), turns("a")),
        (lambda one: setattr(one, "split_special_tokens", True), "a<eos>b"),
    ],
    ids=["PAD", "what a template reads", "special tokens in a text"],
)
def test_tokenizers_of_one_digest_that_differ_have_stores_of_their_own(both, change, prompt):
    """The digest leaves out a PAD, and what no text without special tokens needs."""
    completion = "c" if isinstance(prompt, str) else turns("", "c")[1:]
    plain, from_store = both({"prompt": prompt, "completion": completion})
    one, other = bytewise(), bytewise()
    change(other)
    assert tokenizer_digest(one) == tokenizer_digest(other)
    found = [made(from_store, tokenizer, kind="demonstration")[0] for tokenizer in (one, other)]
    assert found == [made(plain, tokenizer, kind="demonstration")[0] for tokenizer in (one, other)]
    assert found[0] != found[1]


def bytewise():
    """A tokenizer whose tokens are bytes, with a chat template that begins with `sep_token`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<eos>",
        sep_token="a",
        chat_template=SEPARATED,
        clean_up_tokenization_spaces=False,
    )


def test_a_template_that_writes_the_date_has_a_store_for_each_day(both, chat, tmp_path, monkeypatch):
    """A prompt is trained as it is sampled on that day."""
    _, from_store = both(*SOURCES["messages"])
    found = []
    for template in (chat.chat_template, "{{ strftime_now('%d') }}" + chat.chat_template):
        chat.chat_template = template
        for day in ("2026-11-30", "2026-12-01"):
            monkeypatch.setattr(stored, "date", SimpleNamespace(today=lambda day=day: day))
            made(from_store, chat, kind="prompt")
            found.append(len(list(Path(tmp_path, "cache", "tokens").glob("*/table.json"))))
    assert found == [2, 2, 3, 4]


def test_code_that_reads_json_is_a_part_of_the_name(monkeypatch):
    before, read = stored._code.__wrapped__(), Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "decoding.py"))
    assert stored._code.__wrapped__() != before


@pytest.mark.parametrize("then", ["the same size", "longer"])
def test_a_file_that_changes_while_it_is_read_is_not_stored_under_its_old_content(tmp_path, monkeypatch, then):
    """Else another reader of the old content would get the new one."""
    old, new = (
        f'{{"prompt": "a", "completion": "{reply}"}}\n' for reply in ("b", "c" if then == "the same size" else "cc")
    )
    path = tmp_path / "rows.jsonl"
    path.write_text(old)
    monkeypatch.setattr(parsed, "STORED_BYTES", 0)
    read = parsed.read_source

    def changed(*words, **options):
        path.write_text(new)
        return read(*words, **options)

    with monkeypatch.context() as patch:
        patch.setattr(parsed, "read_source", changed)
        (record,) = read_records(str(path), home=tmp_path).records
        assert record.completions == (json.loads(new)["completion"],)
    path.write_text(old)
    (record,) = read_records(str(path), home=tmp_path).records
    assert record.completions == ("b",)
    assert isinstance(read_records(str(path), home=tmp_path).records, Records)


def test_a_home_that_may_not_be_written_is_no_obstacle(both, letters, monkeypatch):
    """Records and ids are kept in memory, with a line; ids of such records are not stored later either."""

    @contextmanager
    def refused(folder):
        with writing(folder, "its lock"):
            raise PermissionError(errno.EROFS, "Read-only file system", str(folder))
        yield

    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr("rlhf_pipeline.disk.arrays.locked", refused)
        sources = [both(*SOURCES["pair"][first:], say=said.append) for first in (0, 1)]
    assert len(said) == 2 and "kept in memory ([Errno 30] Read-only file system" in said[0]
    for plain, in_memory in sources:
        assert made(in_memory, letters, kind="pair") == made(plain, letters, kind="pair")


def require_figures(examples: Examples, kind: str) -> None:
    """Check that the figures of stored examples are those of a list of them."""
    for figure in (response_counts, tree_lengths, first_lengths, count_cut, count_pairs):
        assert figure(examples) == figure(list(examples)), figure
    assert list(texts_and_ranks(examples)) == list(texts_and_ranks(list(examples)))
    if kind == "demonstration":
        assert list(all_whole(examples)) == all_whole(list(examples))
        assert first_lengths(all_whole(examples)) == first_lengths(all_whole(list(examples)))
    for part, known in zip(hold_out(examples, 3), hold_out(list(examples), 3)):
        assert list(part) == known
    assert list(lowest_examples(examples, 4)) == lowest_examples(list(examples), 4)
    assert list(examples[2:5]) == list(examples)[2:5] and examples[-1] == list(examples)[-1]


def test_figures_of_examples_are_those_of_a_list(both, chat):
    for name in ("pair", "ranking", "messages"):
        sources = both(*SOURCES[name])
        kind = "demonstration" if name == "messages" else "preference"
        for source in sources:
            examples, _ = examples_of(source, kind=kind, split="all", tokenizer=chat, lengths=WIDE)
            assert isinstance(examples, Examples)
            require_figures(examples, kind)
            kept = examples[0] is examples[0]  # as its record; a stored one may be one of very many
            assert kept != isinstance(source.records, Records) and examples[0] == examples[0]


def test_a_mixture_of_stores_is_that_of_lists(both, letters):
    from rlhf_pipeline.config.training import DatasetEntry

    first, second = both(*SOURCES["pair"], name="a.jsonl"), both(*SOURCES["ranking"], name="b.jsonl")
    for entries in ([{"weight": 3}, {"weight": 1}], [{"fraction": 0.5}, {}]):
        named = [DatasetEntry(dataset_name="x", **entry) for entry in entries]
        for kind in ("preference", "prompt"):
            options = {"kind": kind, "split": "all", "tokenizer": letters, "lengths": WIDE, "max_samples": 9}
            lists, mixed = (load_mixture(sources, named, **options) for sources in zip(first, second))
            assert (list(mixed[0]), mixed[1]) == (list(lists[0]), lists[1])


def test_rows_that_no_store_can_hold_are_kept_in_memory(tmp_path, monkeypatch):
    import datetime

    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"prompt": ["a"], "completion": ["b"], "when": [datetime.datetime(2026, 1, 1)]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    monkeypatch.setattr(parsed, "STORED_BYTES", 0)
    (record,) = read_records(str(tmp_path / "rows.parquet"), home=tmp_path).records
    assert record.columns == {"when": datetime.datetime(2026, 1, 1)}


@pytest.mark.parametrize("sizes", [(0, 0), (0, 1 << 30), (1 << 30, 0)], ids=["both", "first", "second"])
@pytest.mark.parametrize("own", [False, True], ids=["hashed", "own_splits"])
def test_a_test_source_is_that_of_memory(jsonl, chat, tmp_path, monkeypatch, sizes, own):
    """Whichever of the two sources has a store."""
    rows = SOURCES["splits"] if own else SOURCES["messages"]
    others = [{**row, "split": split} for row in rows[::2] for split in ("test", "judge")] if own else rows[::3]
    first, second = jsonl(*rows, "{", name="first.jsonl"), jsonl(*others, "[", name="second.jsonl")
    options = {"test": second, "home": tmp_path, "skip_bad_rows": True}
    plain = read_records(first, **options)
    original = parsed.parsed_once

    def by_size(source, *rest):
        monkeypatch.setattr(parsed, "STORED_BYTES", sizes[source == second])
        return original(source, *rest)

    monkeypatch.setattr("rlhf_pipeline.data.load.parsed_once", by_size)
    found = read_records(first, **options)
    assert isinstance(found.records, (Records, Joined)) and list(found.records) == list(plain.records)
    assert found.records[-1] == plain.records[-1] and found.records[2:5] == plain.records[2:5]
    for field in ("source", "format", "rows", "faults", "skipped", "not_read"):
        assert getattr(found, field) == getattr(plain, field), field
    assert found.notes("") == plain.notes("")
    assert assign_splits(found.records) == assign_splits(plain.records)
    for split in ("train", "test", "all", *(["judge"] if own else [])):
        for kind in ("demonstration", "prompt"):
            assert made(found, chat, kind=kind, split=split) == made(plain, chat, kind=kind, split=split), (split, kind)
    assert isinstance(rows_of(found, "train", {}), Records) == (sizes[0] == 0)
    leaked = leaks(plain.records, assign_splits(plain.records), "train", {"test"})
    assert leaked and leaks(found.records, assign_splits(found.records), "train", {"test"}) == leaked
    assert list(found.without(leaked).records) == list(plain.without(leaked).records)


@pytest.mark.check
@pytest.mark.parametrize("splits", [("train",), ("train", "test")])
def test_a_data_set_of_the_hub_is_stored_by_its_content(chat, jsonl, tmp_path, monkeypatch, splits):
    import datasets

    load = datasets.load_dataset

    def publish(shift: int) -> None:
        files = {split: jsonl(*SOURCES["pair"][shift:], name=f"{split}{shift}.jsonl") for split in splits}
        loaded = load("json", data_files=files, cache_dir=str(tmp_path / f"hub{shift}"))
        monkeypatch.setattr(datasets, "load_dataset", lambda name, config: loaded)

    publish(0)
    plain = read_records("org/pairs", home=tmp_path)
    assert not isinstance(plain.records, Records)
    monkeypatch.setattr(parsed, "STORED_BYTES", 1)
    found = read_records("org/pairs", home=tmp_path)
    assert isinstance(found.records, Records) and list(found.records) == list(plain.records)
    assert made(found, chat, kind="pair") == made(plain, chat, kind="pair")
    with monkeypatch.context() as patch:
        patch.setattr(parsed, "_parsing", lambda *_: pytest.fail("parsed again"))
        assert list(read_records("org/pairs", home=tmp_path).records) == list(plain.records)
    publish(1)
    assert len(read_records("org/pairs", home=tmp_path).records) == len(plain.records) - len(splits)


def written(folder: Path) -> dict[str, bytes]:
    """The files of all stores."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*")) if path.is_file()}


@pytest.mark.parametrize("name", ["pair", "messages", "tools", "text"])
def test_several_processes_write_the_same_store(both, chat, tmp_path, monkeypatch, name):
    for module in ("encode", "encodings"):
        monkeypatch.setattr(f"rlhf_pipeline.data.{module}.BATCH", 3)
    monkeypatch.setattr(stored, "usable_cores", lambda: 4)
    _, found = both(*SOURCES[name])
    options = {"kind": "demonstration", "all_replies": name == "messages"}
    folder = tmp_path / "cache" / "tokens"
    first = made(found, chat, **options)
    alone = written(folder)
    for table in folder.glob("*/ids.bin"):
        shutil.rmtree(table.parent)
    turns: list[int] = []
    original = encodings.taken_in_turns
    monkeypatch.setattr(encodings, "taken_in_turns", lambda work, n: turns.append(n) or original(work, n))
    assert made(found, chat, processes=4, **options) == first
    assert written(folder) == alone and turns == [4]


def test_no_more_processes_encode_than_there_are_parts(both, chat, monkeypatch):
    monkeypatch.setattr(stored, "usable_cores", lambda: 4)
    monkeypatch.setattr(encodings, "taken_in_turns", lambda *_: pytest.fail("one part needs one process"))
    _, found = both(*SOURCES["pair"])
    assert isinstance(made(found, chat, kind="pair", processes=4), tuple)


@pytest.mark.parametrize("name", ["pair", "ranking", "messages", "text"])
@pytest.mark.parametrize("lengths", [TIGHT, WIDE], ids=["tight", "wide"])
def test_the_parts_of_examples_are_their_prompts_and_completions(both, letters, chat, name, lengths, monkeypatch):
    _, from_store = both(*SOURCES[name])
    options = {"kind": KINDS[name][0], "split": "all", "skip_bad_rows": True, "lengths": lengths}
    examples, _ = examples_of(from_store, tokenizer=(chat if name == "messages" else letters), **options)
    expected = []
    for example in examples:
        parts = [example.prompt_ids, *example.completions]
        expected.append(([len(part) for part in parts], [one for part in parts for one in part]))
    monkeypatch.setattr("rlhf_pipeline.data.examples.BLOCK", 5)
    assert [(sizes, ids.tolist()) for sizes, ids in parts_of(list(examples))] == expected
    assert list(part_sizes(list(examples))) == [sizes for sizes, _ in expected]
    if name in ("pair", "ranking"):  # the others are shortened, or whole sequences
        monkeypatch.setattr("rlhf_pipeline.data.examples.View.example", None)  # no example is made
    assert [(sizes, ids.tolist()) for sizes, ids in parts_of(examples)] == expected
    assert list(part_sizes(examples)) == [sizes for sizes, _ in expected]


def test_an_example_without_columns_reads_no_record(both, letters, monkeypatch):
    plain, from_store = both(*SOURCES["ranking"])
    options = {"kind": "preference", "split": "all", "skip_bad_rows": True, "lengths": WIDE, "tokenizer": letters}
    expected, _ = examples_of(plain, **options)
    examples, _ = examples_of(from_store, **options)
    monkeypatch.setattr(Records, "__getitem__", None)
    assert [asdict(example) for example in examples] == [asdict(example) for example in expected]


@pytest.mark.parametrize("name", ["pair", "text"])
def test_only_examples_of_few_records_in_memory_are_kept(both, letters, name, monkeypatch):
    options = {"kind": KINDS[name][0], "split": "all", "skip_bad_rows": True, "lengths": WIDE, "tokenizer": letters}

    def kept(found):
        examples, _ = examples_of(found, **options)
        return examples[0] is examples[0]

    plain, from_store = both(*SOURCES[name])
    assert kept(plain) == (name == "pair")  # parts of a text are read once
    assert not kept(from_store)
    monkeypatch.setattr("rlhf_pipeline.data.examples.KEPT_IDS", 10)
    assert not kept(plain)
