from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.tokenize import Example, tokenize, whole_sequence
from rlhf_pipeline.data.tokenizers import tokenizer_digest
from rlhf_pipeline.errors import DataError

WIDE = SimpleNamespace(prompt=10, response=10, total=20)
EOS, A, B, C, D, LINE, BC = 0, 2, 3, 4, 5, 6, 7


def limits(prompt: int, response: int) -> SimpleNamespace:
    return SimpleNamespace(prompt=prompt, response=response, total=prompt + response)


def ids(record: Record, tokenizer, lengths=WIDE, **options) -> tuple[list[int], list[list[int]]]:
    (example,), counts = tokenize([record], tokenizer, lengths, **options)
    assert not counts.dropped and not counts.faults
    return example.prompt_ids, example.completions


def test_eos_stands_where_the_completion_ended_and_once(letters, pair):
    assert ids(pair("a", "b", "c", (True, False)), letters) == ([A], [[B, EOS], [C]])
    assert ids(pair("a", "b<eos>", "c"), letters) == ([A], [[B, EOS], [C, EOS]])


@pytest.mark.parametrize(
    ("text", "ended", "cut"),
    [
        ("bd", [B, D], [B]),
        ("bd\n", [B, D], [B]),
        ("bd\n<eos>", [B, D], [B]),
        ("b\n<eos>\nd", [B, LINE, EOS], [B, LINE]),
        ("b\n", [B, LINE, EOS], [B, LINE]),
        ("bda", [B, D, A, EOS], [B, D, A]),  # a stop token within a text ends nothing
        ("d", [D], [D]),
    ],
)
def test_a_text_that_ends_in_stop_tokens_ends_at_the_first_of_them(letters, text, ended, cut):
    """The stop ids of the model: EOS, and d as the end of a turn."""
    letters.model_stop_ids = (D, EOS)
    for flag, expected in ((True, ended), (False, cut)):
        assert ids(Record("demonstration", "a", (text,), (flag,)), letters) == ([A], [expected])


def test_where_a_token_reaches_over_the_border_the_prompts_own_ids_win(letters, pair):
    demonstration = Record("demonstration", "ab", ("cd",), (False,))
    assert ids(demonstration, letters) == ([A, B], [[C, D]])
    assert ids(pair("ab", "cd", "dd", (False, False)), letters) == ([A, B], [[C, D], [D, D]])
    assert ids(pair("ab", "dd", "cd", (False, False)), letters) == ([A, B], [[D, D], [C, D]])
    _, counts = tokenize([pair("ab", "cd", "dd", where="f:1"), pair("ab", "dd", "da", where="f:2")], letters, WIDE)
    assert counts.truncated == {"token_across_border": 1}
    assert counts.rows == {"token_across_border": ["f:1"]}


def test_a_long_prompt_is_cut_from_the_left(letters):
    examples, counts = tokenize(
        [Record("prompt", "aaabd"), Record("prompt", "bd")], letters, limits(prompt=2, response=1)
    )
    assert [example.prompt_ids for example in examples] == [[B, D], [B, D]]
    assert counts.truncated == {"prompt_truncated": 1}


def test_a_completion_that_does_not_fit_with_its_eos_drops_the_example(letters, pair):
    records = [pair("a", "bb", "b"), pair("a", "b", "bb"), pair("a", "bb", "b", (False, True)), pair()]
    examples, counts = tokenize(records, letters, limits(prompt=1, response=2))
    assert [example.completions for example in examples] == [[[B, B], [B, EOS]], [[B, EOS], [C, EOS]]]
    assert counts.dropped == {"completion_too_long": 2}


def ranking(*completions: str, **extra: tuple[float, ...]) -> Record:
    return Record("ranking", "a", completions, tuple(text != "d" for text in completions), "f:1", extra=extra)


def test_a_ranking_stands_best_first_with_its_ties(letters):
    (example,), counts = tokenize([ranking("b", "cc", "d", "c", scores=(0.5, 3, 3, -1))], letters, WIDE)
    assert example.completions == [[C, C, EOS], [D], [B, EOS], [C, EOS]]
    assert (example.ended, example.ranks) == ([True, False, True, True], (1, 1, 2, 3))
    assert example.completion_texts == ("cc", "d", "b", "c")
    assert example.untied() == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert not counts.dropped and not counts.truncated and example.label_probability is None


def test_a_ranking_does_without_completions_that_do_not_fit(letters):
    records = [
        ranking("bb", "c", "b", ranks=(1, 2, 3)),
        ranking("bb", "c", "b", ranks=(1, 2, 2)),
        ranking("bb", "c", "cc", ranks=(1, 2, 3)),
        ranking("c", "c", "bb", ranks=(1, 2, 3)),
    ]
    (example,), counts = tokenize(records, letters, limits(prompt=1, response=2))
    assert (example.completions, example.ranks) == ([[C, EOS], [B, EOS]], (2, 3))
    assert counts.truncated == {"ranking_shortened": 1}
    assert counts.dropped == {"tied_ranking": 1, "completion_too_long": 1, "identical_pair": 1}


def test_a_ranking_keeps_a_response_that_comes_twice(letters):
    (example,), counts = tokenize([ranking("b", "c", "b", ranks=(1, 2, 3))], letters, WIDE)
    assert len(example.completions) == 3 and example.untied() == [(0, 1), (1, 2)]
    assert not counts.dropped


def test_own_ids_are_used_as_they_are_with_the_same_tokenizer_only(letters, pair):
    record = pair("a", "", "b", (True, False), prompt_ids=(B, C), completion_ids=((EOS,), (C,)))
    digest = tokenizer_digest(letters)
    assert ids(record, letters, source_tokenizer_digest=digest) == ([B, C], [[EOS], [C]])
    assert ids(record, letters, source_tokenizer_digest="another") == ([A], [[EOS], [B]])
    assert ids(record, letters) == ([A], [[EOS], [B]])


def test_own_ids_without_eos_get_it_where_they_ended(letters):
    record = Record("demonstration", "a", ("",), (True,), prompt_ids=(A,), completion_ids=((),))
    assert ids(record, letters, source_tokenizer_digest=tokenizer_digest(letters)) == ([A], [[EOS]])


def test_pairs_that_are_equal_as_tokens_are_dropped(letters, pair):
    examples, counts = tokenize([pair("a", "b", "b<eos>")], letters, WIDE)
    assert (examples, counts.dropped) == ([], {"identical_pair": 1})


def test_an_empty_prompt_needs_a_bos(letters):
    record = Record("demonstration", "", ("b",), (True,), "f:1")
    examples, counts = tokenize([record], letters, WIDE)
    assert examples == []
    assert [(item.reason, item.fault.where) for item in counts.faults] == [("empty_prompt", "f:1")]
    letters.bos_token = "d"
    assert ids(record, letters) == ([D], [[B, EOS]])


def test_a_bos_that_the_tokenizer_sets_itself_is_kept_at_the_front(letters):
    from tokenizers.processors import TemplateProcessing

    letters.bos_token = "d"
    letters.backend_tokenizer.post_processor = TemplateProcessing(single="d $A", special_tokens=[("d", D)])
    record = Record("demonstration", "aab", ("b",), (True,))
    assert ids(record, letters) == ([D, A, A, B], [[B, EOS]])
    assert ids(record, letters, limits(prompt=3, response=2)) == ([D, A, B], [[B, EOS]])


def test_a_completion_without_tokens_is_a_fault(letters):
    _, counts = tokenize([Record("demonstration", "a", ("",), (False,), "f:1")], letters, WIDE)
    assert [item.reason for item in counts.faults] == ["empty_completion"]


def test_text_that_has_no_token_is_a_fault_of_its_row():
    from rlhf_pipeline.data.world import tokenizer

    records = [Record("prompt", "xylophone", where="f:1"), Record("prompt", "plot", where="f:2")]
    examples, counts = tokenize(records, tokenizer(), WIDE)
    assert [(item.reason, item.fault.where) for item in counts.faults] == [("unknown_token", "f:1")]
    assert [example.where for example in examples] == ["f:2"]


def test_texts_are_cut_into_chunks(letters):
    examples, counts = tokenize(
        [Record("text", None, ("aabda",), (True,)), Record("text", None, ("aaa",), (True,))],
        letters,
        limits(prompt=2, response=2),
    )
    assert [(example.prompt_ids, example.completions, example.ended) for example in examples] == [
        ([A], [[A, B, D]], [False]),
        ([A], [[EOS]], [True]),
        ([A], [[A, A, EOS]], [True]),
    ]
    _, counts = tokenize([Record("text", None, ("aaaa",), (True,))], letters, limits(prompt=2, response=2))
    assert (counts.dropped, counts.truncated) == ({"chunk_too_short": 1}, {"text_cut_into_chunks": 1})


def test_records_are_turned_into_the_kind_that_is_asked_for(letters, pair):
    examples, counts = tokenize([pair("a"), pair("a", "d", "b")], letters, WIDE, kind="prompt")
    assert [example.completions for example in examples] == [[]]
    assert counts.dropped == {"duplicate_prompt": 1}


def test_an_example_knows_its_texts_its_prompt_and_its_label(letters, pair):
    record = pair("a", "b", "c", where="f:7", extra={"label_probability": 0.75})
    (example,), _ = tokenize([record], letters, WIDE)
    assert (example.prompt_text, example.completion_texts) == ("a", ("b", "c"))
    assert (example.prompt_key, example.where, example.label_probability) == (record.prompt_key, "f:7", 0.75)


def test_messages_go_through_the_chat_template(chat):
    user, bot, other = (
        {"role": role, "content": text} for role, text in (("user", "b"), ("assistant", "a"), ("assistant", "d"))
    )
    record = Record("pair", (user,), ((bot,), (other,)), (True, False))
    assert ids(record, chat) == ([A, B, D], [[A, EOS], [D]])
    assert ids(Record("prompt", (user,)), chat) == ([A, B, D], [])
    assert ids(Record("text", None, ((user, bot),), (True,)), chat) == ([A], [[B, D, A, EOS]])


def talk(*texts: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    """Messages of user and assistant in turn."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return (*([{"role": "system", "content": system}] if system else []), *turns)


def conversation(*texts: str, **fields) -> Record:
    turns = talk(*texts)
    return Record("demonstration", turns[:-1], (turns[-1:],), (True,), "f:1", turns=True, **fields)


NEWLINE = 6


@pytest.mark.parametrize("marks", [False, True])
def test_every_turn_of_the_assistant_is_trained(chat, marks):
    """By hand: users' turns are `a` and text, the assistant's `d`, text, <eos> and a newline; texts and <eos> train."""
    if marks:
        reply, newline = "{{ m.content }}<eos>", "{{ '\\n' }}"
        assert chat.chat_template.count(f"d{reply}\n") == 1
        marked = f"d{{% generation %}}{reply}{{% endgeneration %}}{newline}"
        chat.chat_template = chat.chat_template.replace(f"d{reply}\n", marked)
    record = conversation("b", "cb", "c", "dd", "b", "a")
    (example,), _ = tokenize([record], chat, limits(30, 30), all_replies=True)
    assert example.prompt_ids == [A, B, D]
    rest = [C, B, EOS, NEWLINE, A, C, D, D, D, EOS, NEWLINE, A, B, D, A, EOS]
    trained = [1, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1]
    assert (example.completions, example.trained) == ([rest], [bool(flag) for flag in trained])
    assert example.tokens_trained == 8
    (last,), _ = tokenize([record], chat, limits(30, 30))
    assert (last.prompt_ids + last.completions[0], last.trained) == (example.prompt_ids + rest, None)
    assert last.completions == [[A, EOS]]
    whole = whole_sequence(example)
    assert (whole.prompt_ids, whole.completions, whole.trained) == ([A], [[B, D, *rest]], None)


def test_a_template_that_writes_the_last_turn_otherwise_is_followed(chat):
    """Like Qwen3: the last reply has its reasoning, or an empty one, the earlier ones have not."""
    chat.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}a{{ m.content }}{% else %}d"
        "{% if loop.last %}cc{% endif %}{{ m.content }}<eos>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}d{% endif %}"
    )
    (example,), _ = tokenize([conversation("b", "b", "b", "a")], chat, limits(30, 30), all_replies=True)
    assert (example.prompt_ids, example.completions) == ([A, B, D], [[B, EOS, NEWLINE, A, B, D, C, C, A, EOS]])
    assert example.trained == [True, True, *[False] * 4, *[True] * 4]


def test_one_reply_and_prompts_of_their_own_train_the_completion(chat):
    single = conversation("b", "a")
    given = Record("demonstration", talk("b", "a", "c"), (talk("", "d")[1:],), (True,))  # columns prompt and completion
    for record in (single, given):
        (example,), _ = tokenize([record], chat, limits(30, 30), all_replies=True)
        assert example.trained is None and example.prompt_ids[-1] == D


def test_messages_without_a_chat_template_are_refused(letters):
    with pytest.raises(DataError, match="f:1: messages, and the tokenizer has no chat template"):
        tokenize([Record("prompt", ({"role": "user", "content": "b"},), where="f:1")], letters, WIDE)


def test_whole_sequence_moves_the_prompt_into_the_completion():
    example = Example([1, 2, 3], [[4, 5]], [True], "key", "f:1")
    assert whole_sequence(example) == Example([1], [[2, 3, 4, 5]], [True], "key", "f:1")
    with pytest.raises(ValueError, match="f:1: expected one completion, found 2"):
        whole_sequence(Example([1], [[2], [3]], [True, True], "key", "f:1"))


def test_a_total_alone_limits_the_sum_and_cuts_the_prompt(letters, pair):
    total = SimpleNamespace(prompt=5, response=5, total=6)
    assert ids(pair("aaa", "bd", "c"), letters, total) == ([A] * 3, [[B, D, EOS], [C, EOS]])
    (example,), counts = tokenize([pair("abdd", "ddd", "c")], letters, total)  # 4 tokens of the longer side leave 2
    assert (example.prompt_ids, example.prompt_truncated) == ([D, D], True)
    assert dict(counts.truncated) == {"prompt_truncated": 1}
    assert tokenize([pair("a", "ddddd", "c")], letters, total)[1].dropped == {"completion_too_long": 1}
    (example,), _ = tokenize([Record("prompt", "dddda" * 2)], letters, total)
    assert example.prompt_ids == [D, D, D, D, A]
