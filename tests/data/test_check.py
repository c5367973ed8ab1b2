from __future__ import annotations

from types import SimpleNamespace

from rlhf_pipeline.data.check import describe, preview
from rlhf_pipeline.data.load import read_records

ROWS = [
    {"prompt": "a", "chosen": "bb", "rejected": "c", "split": "train"},
    {"prompt": "a", "chosen": "b", "rejected": "cc", "split": "test", "label_probability": 0.5},
    {"prompt": "ab", "chosen": "bbb", "rejected": "dda", "rejected_ended": False, "split": "train"},
    {"prompt": "ab", "chosen": "b", "rejected": "b", "split": "train"},
    {"prompt": "aaa", "chosen": None, "rejected": None, "split": "train"},
]


def check_source(source, **options):
    """Describe a source as `rlhf data check` does."""
    return describe(read_records(source, skip_bad_rows=True), **options)


def test_a_source_is_described(jsonl):
    found = check_source(jsonl(*ROWS))
    expected = {
        "format": "pair",
        "rows": 5,
        "usable": 3,
        "kinds": {"pair": 3},
        "faulty_rows": 2,
        "faults": {"identical_pair": 1, "null": 1},
        "ties": 2,
        "duplicate_prompts": 1,
        "duplicate_rows": 0,
        "not_ended": 1,
        "splits_from": "source",
        "splits": {"train": 2, "test": 1},
        "prompt_overlap": {"test/train": 1},
        "length_unit": "characters",
        "longer_wins": 0.5,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["lengths"]["prompt"] == {"median": 1, "p95": 2, "p99": 2, "max": 2}
    assert found["lengths"]["rejected"] == {"median": 2, "p95": 3, "p99": 3, "max": 3}
    assert len(found["fault_list"]) == 3


def test_margins_are_described(jsonl):
    rows = [{**ROWS[0], "margin": 2}, {**ROWS[2], "margin": -0.5}, {**ROWS[0], "prompt": "b", "margin": None}]
    found = check_source(jsonl(*rows))
    assert found["margins"] == {"pairs": 2, "min": -0.5, "mean": 0.75, "max": 2}
    assert found["not_read"] == ["margin"] and check_source(jsonl(ROWS[0]))["margins"] is None


def test_prompts_whose_rewards_have_a_finite_best_value_are_counted(jsonl):
    def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}

    rows = [
        pair("one label", "b", "c"),
        pair("both ways", "b", "c"),
        pair("both ways", "c", "b"),
        pair("a circle", "b", "c"),
        pair("a circle", "c", "d"),
        pair("a circle", "d", "b"),
        pair("a circle and its tail", "b", "c"),
        pair("a circle and its tail", "c", "b"),
        pair("a circle and its tail", "c", "d"),
        pair("two apart", "b", "c"),
        pair("two apart", "c", "b"),
        pair("two apart", "d", "e"),
        pair("two apart", "e", "d"),
    ]
    assert check_source(jsonl(*rows))["win_graphs"] == {"prompts": 5, "connected": 2}
    ranking = {"prompt": "a", "completions": ["b", "cc", "ddd"]}
    again = [{**ranking, "scores": [2, 1, 0]}, {**ranking, "scores": [0, 1, 1]}]  # ddd = cc > b > cc > ddd
    assert check_source(jsonl(again[0]))["win_graphs"] == {"prompts": 1, "connected": 0}
    assert check_source(jsonl(*again))["win_graphs"] == {"prompts": 1, "connected": 1}
    assert check_source(jsonl({"prompt": "a", "completion": "b"}))["win_graphs"] is None


def test_lengths_are_in_tokens_with_a_tokenizer_or_ids(jsonl, letters):
    source = jsonl({"prompt": "a", "completion": "bcbc"}, {"prompt": "ad", "completion": "d"})
    found = check_source(source, tokenizer=letters)
    assert (found["length_unit"], found["lengths"]["completion"]["max"]) == ("tokens", 2)
    assert found["longer_wins"] is None
    row = {"prompt": "a", "completion": "b", "prompt_ids": [1, 2, 3], "completion_ids": [4]}
    assert check_source(jsonl(row))["lengths"]["prompt"]["max"] == 3


def test_ties_of_rankings_are_counted(jsonl):
    row = {"prompt": "a", "completions": ["b", "cc", "ddd"], "scores": [1, 1, 0]}
    found = check_source(jsonl(row))
    assert (found["ties"], found["longer_wins"]) == (1, 0.0)


def test_a_preview_shows_records_as_they_were_understood(jsonl):
    first, second = preview(jsonl(*ROWS), 2)
    assert first["where"].endswith(":1")
    assert {name: second[name] for name in ("kind", "split", "prompt", "completions", "label_probability")} == {
        "kind": "pair",
        "split": "test",
        "prompt": "a",
        "completions": ["b", "cc"],
        "label_probability": 0.5,
    }


def test_texts_that_do_not_come_back_from_their_tokens_are_named(jsonl, letters):
    rows = [{"prompt": "a", "completion": completion} for completion in ("bc", "x", "bd")]
    found = check_source(jsonl(*rows), tokenizer=letters)["round_trip"]
    # "x" has no token and comes back as nothing; "bd" comes back as "b d".
    assert (found["texts"], found["different"], found["white_space_only"]) == (6, 2, 1)
    (place,) = found["first"]
    assert place.endswith("rows.jsonl:2: completion 1: it differs after decoding from character 1 on")


def test_what_the_length_policy_would_do_is_counted(jsonl, letters):
    rows = [
        {"prompt": "aaa", "completion": "b"},  # cut to two tokens
        {"prompt": "ad", "completion": "bcbcd"},  # three tokens and the end: dropped
        {"prompt": "d", "completion": "d"},
    ]
    limits = SimpleNamespace(prompt=2, response=3, total=5)
    found = check_source(jsonl(*rows), tokenizer=letters, limits=limits)["length_policy"]
    assert found == {
        "max_prompt_length": 2,
        "response_length": 3,
        "max_length": 5,
        "examples": 2,
        "dropped": {"completion_too_long": 1},
        "faults": {},
        "cut": {"prompt_truncated": 1},
    }


def test_rows_that_training_has_seen_are_listed(jsonl):
    found = check_source(jsonl(*ROWS))
    assert (found["leaked_rows"], found["leaks"]) == (1, {"leaked_prompt": 1})
    assert "rows.jsonl:2" in found["leak_list"][0] and "rows.jsonl:1" in found["leak_list"][0]
    assert (found["duplicate_rows"], found["similar_rows"]) == (0, 0)
    assert found["similar_prompt_overlap"] == {"test/train": 1}


def test_rows_that_a_stage_would_refuse_are_faults(jsonl, letters):
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    source = jsonl(good, {**good, "prompt": ""}, "{", {**good, "prompt": " \n"})
    found = check_source(source)
    assert (found["faulty_rows"], found["usable"]) == (3, 1)
    assert found["faults"] == {"bad_json": 1, "empty_prompt": 2}
    assert [line.split(": ")[0][-2:] for line in found["fault_list"]] == [":2", ":3", ":4"]
    # The tokenizer has a token for a line break, and a stage takes it; with a BOS token it takes the empty prompt too.
    assert check_source(source, tokenizer=letters)["faults"] == {"bad_json": 1, "empty_prompt": 1}
    letters.bos_token = "d"
    assert check_source(source, tokenizer=letters)["faults"] == {"bad_json": 1}


def test_an_empty_prompt_is_none_where_no_prompt_is_read(jsonl):
    assert check_source(jsonl({"text": "a", "prompt": ""}))["faults"] == {}
    row = {"instruction": "", "input": " ", "output": "b"}
    assert check_source(jsonl(row))["faults"] == {}  # the template of the prompt is left


def test_text_without_a_token_is_a_fault_with_the_tokenizer(jsonl):
    from rlhf_pipeline.data.world import tokenizer

    found = check_source(jsonl({"prompt": "plot"}, {"prompt": "xylophone"}), tokenizer=tokenizer())
    assert (found["faults"], found["usable"]) == ({"unknown_token": 1}, 1)


def test_rows_that_repeat_earlier_ones_are_named(jsonl):
    rows = [{"prompt": prompt} for prompt in ("a", "b", "a", "a")]
    found = check_source(jsonl(*rows))
    named = [[part[-1] for part in line.split(" as ")] for line in found["duplicate_list"]]
    assert (found["duplicate_rows"], named) == (2, [["3", "1"], ["4", "1"]])
    assert sum(found["split_prompts"].values()) == 2


def test_leaks_are_found_in_splits_of_any_name(jsonl):
    pairs = [{"prompt": "ab"[n % 2] * (n + 1), "chosen": "a", "rejected": "b"} for n in range(40)]
    rows = [{**row, "split": "train_prefs"} for row in pairs] + [{**row, "split": "test_prefs"} for row in pairs[:10]]
    rows += [{**pairs[0], "split": "test_sft"}, {**pairs[1], "prompt": "c", "split": "train_sft"}]
    found = check_source(jsonl(*rows))
    assert (found["leaked_rows"], found["leaks"]) == (10, {"leaked_row": 10})
    assert "this row of split 'test_prefs' is also in split 'train_prefs'" in found["leak_list"][0]


def test_what_is_not_read_and_labels_are_described(jsonl):
    rows = [{"prompt": "a", "completion": "b", "label": label, "tools": [{}]} for label in (True, False, True)]
    found = check_source(jsonl(*rows))
    assert found["labels"] == {"true": 2, "false": 1}
    assert (found["not_read"], found["notes"]) == (["tools"], ["not read: tools (except by reward functions)"])
    scored = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 1, "score_rejected": 2}
    found = check_source(jsonl(scored, {**scored, "prompt": "b", "score_rejected": 1}))
    assert (found["contradicted"], found["ties"]) == (1, 1)
