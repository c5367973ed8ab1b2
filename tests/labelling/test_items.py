"""Items: whose turn it is, which responses they have, and where the reward model is least sure."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.config.labelling import LabelConfig
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import BadInput, ConfigError, DataError
from rlhf_pipeline.labelling.items import make_items, settled
from rlhf_pipeline.labelling.kinds import Response
from rlhf_pipeline.labelling.origins import give, turns, winner_entropy
from rlhf_pipeline.labelling.outlook import outlook
from rlhf_pipeline.labelling.project import open_or_make

CPU = {"use_cpu": True, "num_threads": 1}
SMALL = {**CPU, "prompts": "world:verdicts", "max_prompt_length": 6, "response_length": 4}


def config(**keys: Any) -> LabelConfig:
    return load_config("label", None, extra=keys).of(LabelConfig)


def test_models_respond_in_turn() -> None:
    two = config(policies=["a", "b"], prompts="p", k=4)
    assert [turns(two, item) for item in range(3)] == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    three = config(policies=["a", "b", "c"], prompts="p", k=4)
    assert turns(three, 1) == [1, 2, 0, 1]
    arena = config(arena=["a", "b", "c"], prompts="p")
    assert [turns(arena, item) for item in range(4)] == [[0, 1], [0, 2], [1, 2], [0, 1]]


def test_the_entropy_of_the_winner() -> None:
    assert winner_entropy([5.0] * 4) == pytest.approx(math.log(4), abs=1e-12)
    # Odds of 3 to 1: -(.75 log .75 + .25 log .25)
    assert winner_entropy([math.log(3), 0.0]) == pytest.approx(0.5623351446188083, abs=1e-12)
    assert winner_entropy([1000.0, 0.0, 0.0]) == pytest.approx(0.0, abs=1e-12)
    # P = (2, 1, 1) / 4: 1.5 bits
    assert winner_entropy([-7.0, math.log(2) - 7, -7.0]) == pytest.approx(1.5 * math.log(2), abs=1e-12)


def test_a_response_like_another_is_drawn_again_and_then_left_out() -> None:
    texts = {(0, 0): "a", (0, 1): "aab", (0, 2): "aaaaaa", (1, 1): "xy"}  # by item and k, one letter a draw

    def run(redraws: int) -> tuple[list[dict[int, str]], dict[str, int]]:
        left = {place: iter(letters) for place, letters in texts.items()}

        def draw(todo: Any) -> Any:
            for number, wanted in todo.items():
                for k in wanted:
                    yield number, k, Response(text=next(left[number, k]))

        drawn: list[dict[int, Response]] = [{}, {0: Response(text="x")}]
        counts = give(draw, {0: [0, 1, 2], 1: [1]}, drawn, redraws)
        return [{k: one.text for k, one in item.items()} for item in drawn], dict(+counts)

    assert run(3) == ([{0: "a", 1: "b"}, {0: "x", 1: "y"}], {"again": 3 + 2 + 1, "merged": 1})
    assert run(1) == ([{0: "a"}, {0: "x", 1: "y"}], {"again": 3, "merged": 2})
    assert run(0) == ([{0: "a", 1: "a", 2: "a"}, {0: "x", 1: "x"}], {})


FAULTY: list[tuple[dict[str, Any], str]] = [
    ({}, "policies"),
    ({"policies": ["a"]}, "prompts"),
    ({"policies": ["a"], "arena": ["b", "c"], "prompts": "p"}, "policies"),
    ({"responses": "r.jsonl", "prompts": "p"}, "prompts"),
    ({"arena": ["a"], "prompts": "p"}, "arena"),
    ({"arena": ["a", "b"], "prompts": "p", "k": 4}, "k"),
    ({"policies": ["a", "a"], "prompts": "p"}, "policies"),
    ({"policies": ["a", "b", "c"], "prompts": "p", "k": 2}, "policies"),
    ({"policies": ["a"], "prompts": "p", "k": 10}, "k"),
    ({"policies": ["a"], "prompts": "p", "scale": {"lowest": 5, "highest": 5}}, "scale"),
    ({"policies": ["a"], "prompts": "p", "scale": {"highest": 99}}, "scale"),
    ({"policies": ["a"], "prompts": "p", "flags": [{"key": "A b", "text": "t"}]}, "key"),
    ({"policies": ["a"], "prompts": "p", "flags": [{"key": "a", "text": "t"}] * 2}, "flags"),
    ({"policies": ["a"], "prompts": "p", "order": "uncertain"}, "reward_model"),
    ({"policies": ["a"], "prompts": "p", "reward_model": "rm"}, "reward_model"),
    ({"responses": "r", "order": "uncertain", "reward_model": "world"}, "reward_model"),
    ({"policies": ["a"], "prompts": "p", "repeat_share": 1.5}, "repeat_share"),
]


def test_faults_of_a_config_name_their_key() -> None:
    for keys, key in FAULTY:
        with pytest.raises(ConfigError) as caught:
            config(**keys)
        assert any(key in fault.where for fault in caught.value.faults), (keys, str(caught.value))
    flags = config(policies=["a"], prompts="p", flags=[{"key": "rude", "text": "Is rude"}])
    assert flags.flag_keys == ("rude",)
    assert len(config(policies=["a"], prompts="p").flags) == 10


def test_instructions_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "how.md"
    path.write_text("Do *this*.\n", encoding="utf-8")
    given = {"policies": ["a"], "prompts": "p"}
    assert settled(config(**given, instructions=str(path))).instructions == "Do *this*.\n"
    assert settled(config(**given, instructions="how.md"), tmp_path).instructions == "Do *this*.\n"
    assert settled(config(**given, instructions="Rank them.")).instructions == "Rank them."
    with pytest.raises(BadInput, match="No such file"):
        settled(config(**given, instructions=str(tmp_path / "other.md")))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_given_responses_are_read_and_equal_ones_merged(tmp_path: Path) -> None:
    source = write(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "a", "completions": ["x", "y", "x"], "ranks": [1, 2, 3], "topic": "t"},
            {"prompt": "b", "completions": ["x", "x"], "ranks": [1, 2]},
            {"prompt": "c", "completions": [str(n) for n in range(10)], "ranks": list(range(1, 11))},
            {"prompt": "d", "completions": ["x", "y"], "ranks": [2, 1]},
        ],
    )
    said: list[str] = []
    made = make_items(config(responses=source), tmp_path, said.append)
    assert [[one.text for one in item.responses] for item in made.items] == [["x", "y"], ["x", "y"]]
    assert [item.prompt for item in made.items] == ["a", "d"]
    assert made.items[0].columns == {"topic": "t"}
    assert all(item.split in ("train", "judge", "validation", "test") for item in made.items)
    assert all(one.source is None and one.ids is None for item in made.items for one in item.responses)
    assert made.uncertainty is None
    assert sum("one response" in text or "more than 9" in text for text in said) == 2
    assert any(text.startswith("responses that are like another") and text.endswith("once: 1") for text in said)
    with pytest.raises(BadInput, match="can be compared"):
        make_items(
            config(
                responses=write(tmp_path / "b.jsonl", [{"prompt": "b", "completions": ["x", "x"], "ranks": [1, 2]}])
            ),
            tmp_path,
            said.append,
        )
    with pytest.raises(DataError, match="`completions`"):
        make_items(config(responses=write(tmp_path / "p.jsonl", [{"prompt": "b"}])), tmp_path, said.append)


def test_given_chats_stay_chats(tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "hi"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("good", "bad")]
    source = write(tmp_path / "rows.jsonl", [{"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}])
    (item,) = make_items(config(responses=source), tmp_path, lambda _: None).items
    assert (item.prompt, [one.text for one in item.responses]) == (prompt, answers)


@pytest.mark.check
def test_responses_without_ranks_are_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "why"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("x", "y")]
    source = write(
        tmp_path / "rows.jsonl",
        [
            {"prompt": "a", "completions": ["x", "y", "x"], "ended": [True, False, True], "topic": "t"},
            {"prompt": "b", "completions": ["x", "x"]},
        ],
    )
    said: list[str] = []
    (item,) = make_items(config(responses=source), tmp_path, said.append).items
    assert (item.prompt, [(one.text, one.ended) for one in item.responses]) == ("a", [("x", True), ("y", False)])
    assert item.columns == {"topic": "t"}
    assert [text for text in said if "not read" in text] == [f"{source}: not read: topic"]
    chat = write(tmp_path / "chat.jsonl", [{"prompt": turns, "completions": answers}])
    (item,) = make_items(config(responses=chat), tmp_path, said.append).items
    assert (item.prompt, [one.text for one in item.responses]) == (turns, answers)


FAULTY_RESPONSES: list[tuple[Any, str]] = [
    ("x", "not a list of two or more"),
    (["x"], "not a list of two or more"),
    (["x", 3], r"completions\[1\]' is a number"),
    (["x", " "], r"completions\[1\]' is empty"),
]


def test_faulty_responses_without_ranks_are_said_by_line(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "completions": ["x", "y"]}]
    rows += [{"prompt": "b", "completions": given} for given, _ in FAULTY_RESPONSES]
    source = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError) as caught:
        make_items(config(responses=source), tmp_path, lambda _: None)
    assert [fault.where.rpartition(":")[2] for fault in caught.value.faults] == ["2", "3", "4", "5"]
    for fault, (_, found) in zip(caught.value.faults, FAULTY_RESPONSES, strict=True):
        assert re.search(found, fault.found), fault
    said: list[str] = []
    (item,) = make_items(config(responses=source, skip_bad_rows=True), tmp_path, said.append).items
    assert item.prompt == "a" and any(text.endswith("that can be read: 4") for text in said)


def test_a_dry_run_reads_given_responses_as_the_run_does(tmp_path: Path) -> None:
    good = write(
        tmp_path / "good.jsonl",
        [{"prompt": "a", "completions": ["x", "y"]}, {"prompt": "b", "completions": ["x", "x"]}],
    )
    assert outlook(config(responses=good), tmp_path)["items"] == 1
    for rows in ([{"prompt": "b"}], [{"prompt": "b", "completions": ["x", "x"]}]):
        bad = config(responses=write(tmp_path / "bad.jsonl", rows))
        with pytest.raises(DataError):
            outlook(bad, tmp_path)
        with pytest.raises(DataError):
            make_items(bad, tmp_path, lambda _: None)


def test_responses_are_sampled_from_models_in_turn(lab: Any) -> None:
    other = str(lab.registry.resolve("sft").path)
    said: list[str] = []
    wanted = config(**SMALL, policies=["sft", other], k=4, num=6, order="uncertain", reward_model="world")
    made = make_items(wanted, lab.home, said.append)
    assert len(made.items) == 6
    tokenizer_digest = lab.registry.resolve("sft").manifest.tokenizer_digest
    assert made.origin.tokenizer_digest == tokenizer_digest
    assert len(made.origin.parents) == 2
    labels = list(made.origin.parents)
    from rlhf_pipeline.data.world import tokenizer

    words = tokenizer()
    sources: Counter[str | None] = Counter()
    for item in made.items:
        texts = [one.text for one in item.responses]
        assert len(set(texts)) == len(texts) >= 2
        for one in item.responses:
            assert one.ids is not None
            assert len(one.ids) <= 4
            ids = one.ids[: len(one.ids) - int(one.ended)]
            assert words.decode(ids) == one.text
            assert (one.ids[-1] == words.eos_token_id) == one.ended
        if len(texts) == 4:
            assert [one.source for one in item.responses] == [labels[turn] for turn in turns(wanted, item.number)]
        sources.update(one.source for one in item.responses)
        assert words.decode(item.columns["prompt_ids"]) == item.prompt
    assert set(sources) == set(labels)
    assert make_items(wanted, lab.home, lambda _: None) == made  # the same seed
    assert made.uncertainty is not None
    assert all(0 <= value <= math.log(4) for value in made.uncertainty)
    assert len(set(made.uncertainty)) > 1


@pytest.mark.check
def test_an_arena_keeps_ties_and_balances_its_pairs(lab: Any) -> None:
    other = str(lab.registry.resolve("sft").path)
    made = make_items(
        config(**SMALL, arena=["sft", other, "sft@v1"], num=9, temperature=0.01), lab.home, lambda _: None
    )
    assert [item.kind for item in made.items] == ["arena"] * 9
    assert all(len(item.responses) == 2 for item in made.items)
    assert any(item.responses[0].text == item.responses[1].text for item in made.items)  # nearly greedy, one model
    pairs = Counter(tuple(one.source for one in item.responses) for item in made.items)
    assert max(pairs.values()) <= 6


@pytest.mark.check
def test_a_project_is_opened_again_and_another_config_refused(lab: Any) -> None:
    wanted = config(**SMALL, policies=["sft"], k=2, num=3, host="127.0.0.1")
    said: list[str] = []
    with open_or_make(wanted, lab.home, said.append) as store:
        first = store.items()
    said.clear()
    with open_or_make(wanted.model_copy(update={"port": 1, "token": "t"}), lab.home, said.append) as store:
        assert store.items() == first
    assert not any("sampling" in text for text in said)
    with pytest.raises(ConfigError) as caught:
        open_or_make(wanted.model_copy(update={"k": 3, "overlap": 2}), lab.home, said.append)
    assert [fault.where for fault in caught.value.faults] == ["k", "overlap"]
    assert caught.value.exit_code == 2


@pytest.mark.check
def test_the_reward_model_reads_given_responses(lab: Any, rankings: Any) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = rankings(8)
    keys = {**CPU, "order": "uncertain", "reward_model": "reward", "max_prompt_length": 6, "response_length": 5}
    made = make_items(config(**keys, responses=source), lab.home, lambda _: None)
    path = lab.registry.resolve("reward").path
    model = AutoModelForSequenceClassification.from_pretrained(path).double().eval()
    words = AutoTokenizer.from_pretrained(path)
    assert made.uncertainty is not None
    for item, entropy in zip(made.items, made.uncertainty, strict=True):
        scores = []
        for one in item.responses:
            ids = words(item.prompt, add_special_tokens=False)["input_ids"][-6:]
            ids += words(one.text, add_special_tokens=False)["input_ids"] + [words.eos_token_id] * one.ended
            with torch.no_grad():
                scores.append(model(torch.tensor([ids])).logits[0, 0])
        logp = torch.log_softmax(torch.stack(scores), 0)
        assert entropy == pytest.approx(float(-(logp.exp() * logp).sum()), abs=1e-5)
    with open_or_make(config(**keys, responses=source), lab.home, lambda _: None) as store:
        state = store.task(store.labeler("Ann"))
        assert state is not None
        assert state.item == max(range(len(made.items)), key=lambda n: made.uncertainty[n])
