"""The words around an Alpaca instruction, and chats made of text."""

from __future__ import annotations

from rlhf_pipeline.data.formats import parse
from rlhf_pipeline.data.styles import PLAIN, Style, instruction_prompt

OPENING = "Below is an instruction that describes a task"


def test_the_three_styles_of_an_instruction():
    assert instruction_prompt("plain", "Add.", "1 2") == "Add.\n1 2"
    assert instruction_prompt("plain", "Add.", " ") == "Add."
    sections = "### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    assert instruction_prompt("sections", "Add.", "1 2") == sections
    assert instruction_prompt("alpaca", "Add.", "1 2") == (
        f"{OPENING}, paired with an input that provides further context. "
        f"Write a response that appropriately completes the request.\n\n{sections}"
    )
    assert instruction_prompt("alpaca", "Add.", "") == (
        f"{OPENING}. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Response:\n"
    )


def record(**row):
    (found,) = parse([("rows:1", row)], "rows").records
    return found


def test_a_row_of_alpaca_in_each_style():
    row = record(instruction="Add.", input="1 2", output="3")
    assert PLAIN.apply(row).prompt == row.prompt == instruction_prompt("sections", "Add.", "1 2")
    assert Style("alpaca").apply(row).prompt == instruction_prompt("alpaca", "Add.", "1 2")
    chat = Style("plain", chat=True).apply(row)
    assert chat.prompt == ({"role": "user", "content": "Add.\n1 2"},)
    assert chat.completions == (({"role": "assistant", "content": "3"},),)
    assert row.canonical() == record(instruction="Add.", input="1 2", output="3").canonical()


def test_a_pair_of_texts_as_a_chat():
    pair = Style(chat=True).apply(record(prompt="q", chosen="a", rejected="b"))
    assert pair.prompt == ({"role": "user", "content": "q"},)
    assert [text[0] for text in pair.completions] == [
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]


def test_messages_and_plain_text_stay_as_they_are():
    messages = record(messages=[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}])
    assert Style("plain", chat=True).apply(messages) == messages
    text = record(text="once")
    assert Style("plain", chat=True).apply(text) == text


def test_the_style_of_a_config_of_an_earlier_release():
    assert Style.of({}) == PLAIN
    assert Style.of({"instruction_style": "plain", "text_as_chat": True}) == Style("plain", True)
