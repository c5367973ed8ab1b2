from __future__ import annotations

from hashlib import sha256
from types import SimpleNamespace

import pytest

from rlhf_pipeline.config.training import DatasetEntry
from rlhf_pipeline.data.load import examples_of, load_mixture, read_records
from rlhf_pipeline.data.samples import hold_out
from rlhf_pipeline.data.splits import split_of
from rlhf_pipeline.errors import DataError

LENGTHS = SimpleNamespace(prompt=8, response=4, total=12)
GOOD = {"prompt": "abc", "chosen": "a", "rejected": "b"}  # in train by the hash of its prompt


def load(source: str, tokenizer, kind="pair", split="all", **options):
    reading = {name: value for name, value in options.items() if name in ("config", "skip_bad_rows")}
    choosing = {name: value for name, value in options.items() if name != "config"}
    found = read_records(source, kind=kind, tokenizer=tokenizer, **reading)
    return examples_of(found, kind=kind, split=split, tokenizer=tokenizer, lengths=LENGTHS, **choosing)


def test_all_faults_are_raised_at_once_and_counted(jsonl):
    source = jsonl(GOOD, {**GOOD, "chosen": None}, "{", {**GOOD, "chosen": "b"}, {**GOOD, "rejected": None})
    with pytest.raises(DataError) as caught:
        read_records(source)
    summary, *faults = caught.value.faults
    assert "4 of 5 rows cannot be used (bad_json 1, identical_pair 1, null 2)" in str(summary)
    assert "skip_bad_rows" in str(summary)
    assert sorted(fault.where.rpartition(":")[2] for fault in faults) == ["2", "3", "4", "5"]


def test_bad_rows_are_skipped_and_counted_on_request(jsonl, letters):
    source = jsonl(GOOD, {**GOOD, "chosen": None}, "{", {**GOOD, "prompt": "d", "chosen": "aaaaa"})
    report = load(source, letters, skip_bad_rows=True)[1]
    assert (report.source_rows, report.rows, report.kept, report.format) == (4, 2, 1, "pair")
    assert report.dropped == {"bad_json": 1, "completion_too_long": 1, "null": 1}
    assert "1 examples of 2 rows; dropped: bad_json 1" in report.summary()


def test_ties_are_counted_or_refused_as_the_loss_needs(jsonl, letters):
    whole = {"prompt": "abc", "completions": ["a", "b", "c"], "ranks": [2, 1, 3]}
    source = jsonl(whole, {**whole, "ranks": [1, 1, 2]}, {**whole, "ranks": [1, 1, 1]})
    examples, report = load(source, letters, kind="preference")
    assert [example.ranks for example in examples] == [(1, 2, 3), (1, 1, 2)]
    assert report.dropped == {"tied_ranking": 1}
    with pytest.raises(DataError) as caught:
        load(source, letters, kind="order")
    summary, *faults = caught.value.faults
    assert "2 of 3 rows cannot be used (tied_ranking 2)" in str(summary) and "skip_bad_rows" in str(summary)
    assert [fault.where.rpartition(":")[2] for fault in faults] == ["2", "3"]
    examples, report = load(source, letters, kind="order", skip_bad_rows=True)
    assert (report.kept, report.dropped) == (1, {"tied_ranking": 2})


def test_no_rows_left_is_an_error_also_when_skipping(jsonl, letters):
    with pytest.raises(DataError, match=r"no rows left of 2 \(identical_pair 2\)"):
        read_records(jsonl(*[{**GOOD, "chosen": "b"}] * 2), skip_bad_rows=True)
    with pytest.raises(DataError, match=r"no example left of 1 rows \(completion_too_long 1\).*at most 4 tokens"):
        load(jsonl({**GOOD, "chosen": "aaaaa"}), letters)
    with pytest.raises(DataError, match="no row can be read"):
        read_records(jsonl("{"), skip_bad_rows=True)


@pytest.mark.parametrize(
    ("changes", "reason", "said"),
    [
        ({"prompt": "xylophone"}, "unknown_token 2", "text within the tokenizer's vocabulary"),
        ({"chosen": " dull" * 9}, "completion_too_long 2", "responses of at most 4 tokens"),
    ],
)
def test_what_is_advised_is_about_what_the_rows_were_dropped_for(jsonl, changes, reason, said):
    from rlhf_pipeline.data.world import tokenizer

    row = {"prompt": "the plot", "chosen": " dull", "rejected": " fine", **changes}
    with pytest.raises(DataError, match=rf"no example left of 2 rows \({reason}\); expected {said}"):
        load(jsonl(row, {**row, "rejected": " slow"}), tokenizer(), skip_bad_rows=True)


def test_faults_of_tokenisation_are_raised_or_counted(jsonl, letters):
    source = jsonl(GOOD, {**GOOD, "prompt": ""})
    with pytest.raises(DataError, match=r"1 of 2 rows cannot be used \(empty_prompt 1\)"):
        load(source, letters)
    assert load(source, letters, skip_bad_rows=True)[1].dropped == {"empty_prompt": 1}


def test_rows_that_the_chat_template_refuses_are_raised_together_or_counted(jsonl, chat):
    chat.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + (
        chat.chat_template
    )
    talk = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]
    refused = [{"role": "system", "content": "c"}, *talk]
    source = jsonl(*[{"messages": refused if i in (4, 8) else talk} for i in range(1, 10)])
    with pytest.raises(DataError) as caught:
        load(source, chat, kind="demonstration")
    summary, *rows = map(str, caught.value.faults)
    assert "2 of 9 rows cannot be used (refused_by_template 2)" in summary
    assert [row.partition(": ")[0].rpartition(":")[2] for row in rows] == ["4", "8"]
    assert all("no system turn" in row for row in rows)
    examples, report = load(source, chat, kind="demonstration", skip_bad_rows=True)
    assert len(examples) == 7 and report.dropped == {"refused_by_template": 2}


def test_the_digest_names_the_content_of_the_split_and_not_the_file(jsonl, letters):
    other = {**GOOD, "prompt": "a"}
    first = load(jsonl(GOOD, other, name="a.jsonl"), letters)[1].digest
    assert load(jsonl(GOOD, other, name="b.jsonl.gz"), letters, kind="prompt")[1].digest == first
    assert load(jsonl(other, GOOD), letters)[1].digest != first
    assert load(jsonl(GOOD), letters)[1].digest != first
    assert load(jsonl(GOOD, {**other, "chosen_ended": False}), letters)[1].digest != first


def test_a_sample_is_the_same_whatever_the_order_of_the_rows(jsonl, letters):
    prompts = ["a", "b", "c", "d", "aa", "ab", "ac", "ad"]
    rows = [{"prompt": prompt} for prompt in prompts]
    chosen = load(jsonl(*rows), letters, kind="prompt", max_samples=3)[0]
    again = load(jsonl(*reversed(rows)), letters, kind="prompt", max_samples=3)[0]
    assert len(chosen) == 3
    assert [example.prompt_text for example in again] == [example.prompt_text for example in reversed(chosen)]
    larger = load(jsonl(*rows), letters, kind="prompt", max_samples=5)[0]
    assert {example.prompt_text for example in chosen} < {example.prompt_text for example in larger}


def test_a_mixture_keeps_the_proportion_of_its_weights(jsonl, letters):
    letters_of = [a + b for a in "abcd" for b in "abcd"]
    many = jsonl(*({"prompt": prompt} for prompt in letters_of), name="many.jsonl")
    few = jsonl({"prompt": "d"}, {"prompt": "a"}, name="few.jsonl")
    sources = [read_records(many), read_records(few)]
    options = {"kind": "prompt", "split": "all", "tokenizer": letters, "lengths": LENGTHS}
    weighted = [DatasetEntry(dataset_name=name, weight=weight) for name, weight in (("many", 3), ("few", 1))]
    examples, reports = load_mixture(sources, weighted, **options)
    assert [len(example.prompt_text) for example in examples] == [2] * 6 + [1] * 2
    assert [report.kept for report in reports] == [6, 2]
    assert [report.dropped for report in reports] == [{"beyond_its_share": 10}, {}]
    assert len(load_mixture(sources, weighted, max_samples=4, **options)[0]) == 4


def test_a_mixture_of_fractions_joins_a_share_of_each_source(jsonl, letters):
    many = jsonl(*({"prompt": a + b} for a in "abcd" for b in "abcd"), name="many.jsonl")
    few = jsonl({"prompt": "d"}, {"prompt": "a"}, name="few.jsonl")
    sources = [read_records(many, split="all"), read_records(few, split="all")]
    options = {"kind": "prompt", "split": "train", "tokenizer": letters, "lengths": LENGTHS}

    def lengths(*entries, **more):
        named = [DatasetEntry(dataset_name="x", **entry) for entry in entries]
        return [len(example.prompt_text) for example in load_mixture(sources, named, **more, **options)[0]]

    # int(16 * .25) = 4 and both: the splits by hash are not used for sources that are read whole.
    assert lengths({"fraction": 0.25}, {}) == [2] * 4 + [1] * 2
    assert lengths({"fraction": 1.0, "max_samples": 5}, {"fraction": 0.5}) == [2] * 5 + [1]
    assert len(lengths({"fraction": 1.0}, {"fraction": 1.0}, max_samples=7)) == 7


def test_held_out_examples_are_whole_prompts_by_hash(jsonl, letters):
    rows = [{"prompt": prompt, "completion": end} for prompt in ("a", "b", "c", "d") for end in "ab"]
    examples, _ = load(jsonl(*rows), letters, kind="demonstration")
    keys = sorted({example.prompt_key for example in examples}, key=lambda k: sha256(f"held out {k}".encode()).digest())
    for size, prompts in ((1, 1), (2, 1), (3, 2), (0.25, 1), (0.3, 2)):  # each prompt has two of the eight examples
        train, held = hold_out(examples, size)
        assert {example.prompt_key for example in held} == set(keys[:prompts])
        parts = [[(example.where, example.completions) for example in part] for part in (examples, [*train, *held])]
        assert sorted(parts[0]) == sorted(parts[1])
    with pytest.raises(DataError, match="test_split_size: 7 leaves none of 8 examples of 4 prompts"):
        hold_out(examples, 7)


def test_a_split_of_a_file_is_read_whole(jsonl):
    source = jsonl(*({"prompt": letter, "split": name} for letter, name in zip("abcd", ("dev", "new", "new", "test"))))
    found = read_records(source, split="new")
    assert [record.prompt for record in found.records] == ["b", "c"] and found.whole == "new"
    assert len(read_records(source, split="all").records) == 4
    with pytest.raises(DataError, match="no split 'neu'; expected one of dev, new, test, or all; did you mean 'new'"):
        read_records(source, split="neu")
    with pytest.raises(DataError, match="expected `split: all`: the source has no splits"):
        read_records("world:verdicts", split="train")


def test_the_world_is_loaded_by_its_own_ids():
    from rlhf_pipeline.data import world

    tokenizer = world.tokenizer()
    examples, report = load("world:verdicts", tokenizer, kind="prompt", split="train", config="prompts")
    assert report.kept == sum(split == "train" for split in world.SPLITS.values())
    example = examples[0]
    assert example.prompt_ids == world.encode(example.prompt_text)


def test_the_faults_of_the_hh_file_are_named_and_counted(hh_file):
    with pytest.raises(DataError) as caught:
        read_records(hh_file)
    assert "53 of 2312 rows cannot be used (empty_completion 4, no_assistant_turn 48, prompts_differ 5)" in str(
        caught.value.faults[0]
    )


def test_the_hh_file_is_loaded_and_tokenised(hh_file):
    from rlhf_pipeline.data.load import examples_of
    from rlhf_pipeline.data.tokenizers import train_byte_level_bpe

    found = read_records(hh_file, skip_bad_rows=True)
    assert (found.format, found.rows, len(found.records)) == ("pair, HH transcripts", 2312, 2259)
    texts = [record.prompt + completion for record in found.records for completion in record.completions]
    tokenizer = train_byte_level_bpe(texts, 4096)
    lengths = SimpleNamespace(prompt=256, response=256, total=512)
    options = {"split": "all", "tokenizer": tokenizer, "lengths": lengths, "skip_bad_rows": True}
    pairs, report = examples_of(found, kind="pair", **options)
    assert report.kept + report.dropped.get("completion_too_long", 0) == 2259
    for example in pairs[::100]:
        for completion, text in zip(example.completions, example.completion_texts):
            tail = tokenizer(example.prompt_text + text)["input_ids"] + [tokenizer.eos_token_id]
            assert (example.prompt_ids + completion)[-len(completion) - 1 :] == tail[-len(completion) - 1 :]
    _, report = examples_of(found, kind="prompt", **options)
    assert (report.kept, report.dropped["duplicate_prompt"]) == (2257, 2)


def test_an_empty_prompt_is_refused_in_whichever_split_it_falls(jsonl, letters):
    # GOOD is in train, "" in another split by its hash: train has no fault of its own.
    source = jsonl(GOOD, {**GOOD, "prompt": ""}, {**GOOD, "prompt": " "}, {**GOOD, "prompt": ""})
    assert all(split_of(prompt) != "train" for prompt in ("", " "))
    for kind in ("pair", "demonstration", "prompt"):
        with pytest.raises(DataError, match=r"3 of 4 rows cannot be used \(empty_prompt 3\)") as caught:
            load(source, letters, kind=kind, split="train")
        assert [fault.where[-2:] for fault in caught.value.faults[1:]] == [":2", ":3", ":4"]
        with pytest.raises(DataError, match="empty_prompt 3"):
            examples_of(read_records(source), kind=kind, split="train", tokenizer=letters, lengths=LENGTHS)
    assert load(source, letters, split="train", skip_bad_rows=True)[1].kept == 1
    assert load(source, letters, kind="text", split="train")[1].kept == 1  # a text needs no prompt
    letters.bos_token = "d"
    assert load(source, letters, split="train")[1].kept == 1


def test_faults_are_in_the_order_of_their_lines_and_empty_prompts_among_them(jsonl, letters):
    source = jsonl({**GOOD, "chosen": None}, {**GOOD, "prompt": ""}, "{", {**GOOD, "rejected": ""}, "}", GOOD)
    with pytest.raises(DataError) as caught:
        load(source, letters, split="train")
    assert [fault.where[-2:] for fault in caught.value.faults[1:]] == [":1", ":2", ":3", ":4", ":5"]


SIDES = {"chosen": "a", "rejected": "b"}


def test_faults_of_other_splits_are_not_a_stages_business(jsonl, letters):
    rows = [{"prompt": "a", **SIDES, "split": split} for split in ("train_prefs", "test_prefs")]
    identical = {"prompt": "b", "chosen": "a", "rejected": "a", "split": "train_sft"}
    blank = {"prompt": "", **SIDES, "split": "train_sft"}
    source = jsonl(*rows, identical, blank)
    with pytest.raises(DataError, match=r"1 of 4 rows cannot be used \(identical_pair 1\)"):
        read_records(source)
    found = read_records(source, splits={"train_prefs", "test_prefs"}, tokenizer=letters, kind="pair")
    options = {"kind": "pair", "tokenizer": letters, "lengths": LENGTHS}
    assert len(examples_of(found, split="train_prefs", **options)[0]) == 1
    for split in ("train_sft", "all"):
        with pytest.raises(DataError, match=r"rows\.jsonl:3: identical_pair"):
            examples_of(found, split=split, **options)
    hashed = jsonl({"prompt": "a", **SIDES}, {"prompt": "b", "chosen": "a", "rejected": "a"})
    with pytest.raises(DataError, match="identical_pair"):  # by the hash of the prompt, any split may have them
        read_records(hashed, splits={"train"})


def test_a_second_source_is_the_test_split(jsonl, letters):
    first = jsonl({"prompt": "a", **SIDES}, {"prompt": "b", **SIDES}, name="first.jsonl")
    second = jsonl({"prompt": "c", **SIDES}, "{", name="second.jsonl")
    with pytest.raises(DataError, match=r"second\.jsonl:2: bad_json"):
        read_records(first, test=second, splits={"train", "test"})
    found = read_records(first, test=second, splits={"train", "test"}, skip_bad_rows=True)
    assert (found.rows, found.source) == (4, first)
    options = {"kind": "pair", "tokenizer": letters, "lengths": LENGTHS, "skip_bad_rows": True}
    for split, prompts in (("train", ["a", "b"]), ("test", ["c"])):
        assert [example.prompt_text for example in examples_of(found, split=split, **options)[0]] == prompts
    splits = [{"prompt": p, **SIDES, "split": s} for p, s in (("a", "train"), ("b", "test"), ("c", "judge"))]
    other = [{"prompt": p, **SIDES, "split": s} for p, s in (("d", "train"), ("aa", "test"))]
    found = read_records(jsonl(*splits, name="x.jsonl"), test=jsonl(*other, name="y.jsonl"))
    assert [(record.prompt, record.split) for record in found.records] == [
        ("a", "train"),
        ("c", "judge"),
        ("aa", "test"),
    ]
