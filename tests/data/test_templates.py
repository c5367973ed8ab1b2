"""Chat templates in the shape of eight families', and what they do to prompts, turns and replies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_pipeline.data.borders import decoded
from rlhf_pipeline.data.check import describe
from rlhf_pipeline.data.formats import RecordSet
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.shown import trained_pieces
from rlhf_pipeline.data.templates import BUILT_IN, apply_template_keys, with_values
from rlhf_pipeline.data.tokenize import tokenize
from rlhf_pipeline.data.tokenizers import chat_template_digest, load_tokenizer, train_byte_level_bpe
from rlhf_pipeline.errors import ConfigError, DataError

WIDE = SimpleNamespace(prompt=200, response=200, total=400)
ALTERNATE = (
    "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}{% endfor %}"
)
# Name: template, special tokens, EOS, whether the template has BOS, whether it takes a system turn.
FAMILIES = {
    "ChatML": (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "Llama 3": (
        "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' "
        "+ m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|eot_id|>",
    ),
    "Gemma": (
        "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + ALTERNATE + "{% for m in messages %}{{ '<start_of_turn>' + "
        "('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"],
        "<eos>",
    ),
    "Qwen3": (
        "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}"
        "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% set content = m.content.split('</think>')[-1].lstrip('\n') %}"
        "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') "
        "if '</think>' in m.content else '' %}"
        "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"
        "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
        "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{% endif %}",
        ["<|im_start|>", "<|im_end|>"],
        "<|im_end|>",
    ),
    "Mistral": (
        "{{ bos_token }}" + ALTERNATE + "{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}",
        ["<s>", "</s>", "[INST]", "[/INST]"],
        "</s>",
    ),
    "Zephyr": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}",
        ["<s>", "</s>"],
        "</s>",
    ),
    "DeepSeek": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '<｜User｜>' + m.content }}{% else %}{{ '<｜Assistant｜>' + m.content.split('</think>')[-1] + eos_token }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}",
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"],
        "<｜end▁of▁sentence｜>",
    ),
    "Phi": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endofdoc|>"],
        "<|endofdoc|>",
    ),
}
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REFUSES_SYSTEM = ("Gemma", "Mistral")
TEXTS = ("2+2?", "\n4, I think", "- and 3+3?", '"6"', "the rest ", " done.")


def talk(*texts: str, system: str | None = None) -> tuple[dict[str, str], ...]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return (*([{"role": "system", "content": system}] if system else []), *turns)


def family(name: str):
    """A small byte-level tokenizer with the special tokens and the template of a family, and Llama 3's pieces."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template, special, eos = FAMILIES[name]
    core = Tokenizer(models.BPE())
    pieces = pre_tokenizers.Split(Regex(PIECES), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pieces, pre_tokenizers.ByteLevel(False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(['user: assistant\n\n"- model <think>\n\n2+2? 4, I 3+3? 6\n\n'] * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"additional_special_tokens": special, "eos_token": eos})
    if "bos_token" in template:
        tokenizer.bos_token = special[0]
    tokenizer.chat_template = template
    return tokenizer


def conversation(turns, where: str = "f:1", **fields) -> Record:
    return Record("demonstration", turns[:-1], (turns[-1:],), (True,), where, turns=True, **fields)


def rendered(tokenizer, turns, **how) -> list[int]:
    return tokenizer.apply_chat_template(list(turns), tokenize=True, return_dict=False, **how)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_ids_are_those_of_the_whole_conversation(name):
    tokenizer = family(name)
    turns = talk(*TEXTS, system=None if name in REFUSES_SYSTEM else "Be brief.")
    whole = rendered(tokenizer, turns)
    (last,), counts = tokenize([conversation(turns)], tokenizer, WIDE)
    (every,), _ = tokenize([conversation(turns)], tokenizer, WIDE, all_replies=True)
    (prompt,), _ = tokenize([Record("prompt", turns[:-1])], tokenizer, WIDE)
    ids = last.prompt_ids + last.completions[0]
    assert last.prompt_ids == prompt.prompt_ids == rendered(tokenizer, turns[:-1], add_generation_prompt=True)
    if name == "DeepSeek":  # its prompt opens <think>, and the conversation does not have it
        opened = tokenizer("<think>\n", add_special_tokens=False)["input_ids"]
        assert counts.rows == {"prompt_rewritten_by_template": ["f:1"]}
        assert last.prompt_ids[-len(opened) :] == opened
        ids = last.prompt_ids[: -len(opened)] + last.completions[0]
    # Behind the last end-of-turn mark there may be a newline in the template.
    same = min(len(ids), len(whole))
    assert ids[:same] == whole[:same]
    assert tokenizer.decode([*ids[same:], *whole[same:]]).strip() in ("", tokenizer.eos_token)
    assert every.prompt_ids + every.completions[0] == last.prompt_ids + last.completions[0]
    if tokenizer.bos_token is not None:
        assert ids.count(tokenizer.bos_token_id) == 1 == ids.index(tokenizer.bos_token_id) + 1
    pieces = trained_pieces(every, 0, tokenizer)
    assert len(pieces) == 3
    for piece, text in zip(pieces, TEXTS[1::2]):
        assert text.strip() in piece and "user" not in piece and "?" not in piece
    marks = {"Gemma": "<end_of_turn>", "Phi": "<|end|>"}
    assert all(piece.endswith(marks.get(name, tokenizer.eos_token)) for piece in pieces[:2])


@pytest.mark.parametrize("name", REFUSES_SYSTEM)
def test_every_row_that_a_template_refuses_is_named(name):
    tokenizer = family(name)
    rows = [conversation(talk("2?", "2", system="Be brief." if i in (4, 8) else None), f"f:{i}") for i in range(1, 10)]
    rows.append(conversation((*talk("2?"), *talk("3?", "3")), "f:10"))  # two users' turns
    examples, counts = tokenize(rows, tokenizer, WIDE)
    assert [(item.reason, item.fault.where) for item in counts.faults] == [
        ("refused_by_template", f"f:{i}") for i in (4, 8, 10)
    ]
    assert len(examples) == 7
    found = describe(RecordSet("f", "demonstration", len(rows), rows), tokenizer=tokenizer)
    assert (found["faulty_rows"], found["faults"], found["usable"]) == (3, {"refused_by_template": 3}, 7)


def test_a_prompt_that_opens_thinking_is_trained_as_it_is_sampled():
    """Its generation prompt ends in `<think>` and a newline; the reply goes on with a newline: one token of two."""
    tokenizer = family("Qwen3")
    opened = "{{ '<|im_start|>assistant\n' }}"
    template = tokenizer.chat_template
    assert template.count(opened) == 1
    tokenizer.chat_template = template.replace(opened, "{{ '<|im_start|>assistant\n<think>\n' }}")
    alone = rendered(tokenizer, talk("2+2?"), add_generation_prompt=True)
    rows = [conversation(talk("2+2?", "4")), Record("prompt", talk("2+2?"), where="f:2")]
    (trained, sampled), counts = tokenize(rows, tokenizer, WIDE)
    assert trained.prompt_ids == sampled.prompt_ids == alone
    assert decoded(tokenizer, alone).endswith("<think>\n")
    assert decoded(tokenizer, trained.completions[0]) == "\n</think>\n\n4<|im_end|>"
    assert counts.rows == {"token_across_border": ["f:1"]}
    found = describe(RecordSet("f", "demonstration", 2, rows), tokenizer=tokenizer)
    assert found["tokens"] == {"token_across_border": {"rows": 1, "first": ["f:1"]}}


def test_reasoning_that_the_template_removes_is_said():
    tokenizer = family("DeepSeek")

    def reply(thought: str, answer: str):
        return talk("", f"<think>{thought}</think>{answer}")[1:]

    same = Record("pair", talk("2?"), (reply("easy", "2"), reply("hard", "2")), (True, True), "f:1")
    other = Record("pair", talk("2?"), (reply("easy", "2"), reply("hard", "3")), (True, True), "f:2")
    examples, counts = tokenize([same, other], tokenizer, WIDE)
    assert [example.where for example in examples] == ["f:2"] and counts.dropped == {"identical_pair": 1}
    assert counts.rows["reasoning_removed_by_template"] == ["f:1", "f:2"]
    kept = Record("pair", talk("2?"), same.completions, (True, True), "f:1")
    _, counts = tokenize([kept], family("ChatML"), WIDE)
    assert not counts.rows


@pytest.mark.parametrize("name", ["ChatML", "Llama 3", "Mistral", "Zephyr"])
def test_a_prompt_that_ends_in_an_assistants_turn_is_continued(name):
    tokenizer = family(name)
    begun = talk("2+2?", "The sum is")
    (pair,), _ = tokenize(
        [Record("pair", begun, (talk("", " 4.")[1:], talk("", " 5.")[1:]), (True, True))], tokenizer, WIDE
    )
    assert pair.prompt_ids == rendered(tokenizer, begun, continue_final_message=True)
    assert decoded(tokenizer, pair.prompt_ids).endswith("The sum is")
    whole = rendered(tokenizer, talk("2+2?", "The sum is 4."))
    ids = pair.prompt_ids + pair.completions[0]
    assert ids == whole[: len(ids)]
    assert pair.completion_texts == (f" 4.{tokenizer.eos_token}", f" 5.{tokenizer.eos_token}")


def test_one_bos_and_one_eos_in_text_that_has_them():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = {token: i for i, token in enumerate(["<s>", "</s>", "[INST]", "hi", "[/INST]", "yes", "no"])}
    core = Tokenizer(models.WordLevel(words))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    marked = Record("pair", "<s>[INST] hi [/INST]", (" yes</s>\n", " no</s>\n"), (True, True), "f:1")
    plain = Record("pair", "hi", (" yes", " no"), (True, True), "f:2")
    examples, _ = tokenize([marked, plain], tokenizer, WIDE)
    assert [example.prompt_ids for example in examples] == [[0, 2, 3, 4], [0, 3]]
    assert [example.completions for example in examples] == [[[5, 1], [6, 1]]] * 2
    found = describe(RecordSet("f", "pair", 2, [marked, plain]), tokenizer=tokenizer)
    assert found["tokens"] == {"control_tokens_in_text": {"rows": 1, "first": ["f:1"]}}


def test_a_mark_in_a_users_words_is_named():
    tokenizer = family("Zephyr")
    rows = [conversation(talk(text, "2"), f"f:{i}") for i, text in enumerate(("2?", "what is <|assistant|>?", "</s>"))]
    tokenizer.chat_template = BUILT_IN["zephyr"] + "{# <|assistant|> #}"
    found = describe(RecordSet("f", "demonstration", 3, rows), tokenizer=tokenizer)
    assert found["tokens"]["control_tokens_in_text"] == {"rows": 2, "first": ["f:1", "f:2"]}


def test_whole_turns_are_dropped_from_a_long_prompt_and_the_system_turn_stays():
    tokenizer = family("ChatML")
    turns = talk("one?", "1", "two?", "2", "three?", "3", system="Count.")
    lengths = [len(rendered(tokenizer, (turns[0], *turns[i:-1]), add_generation_prompt=True)) for i in (1, 3, 5)]
    for limit, kept in ((lengths[0], 1), (lengths[0] - 1, 3), (lengths[1], 3), (lengths[1] - 1, 5), (lengths[2], 5)):
        limits = SimpleNamespace(prompt=limit, response=9, total=limit + 9)
        record = conversation(turns)
        (example,), counts = tokenize([record], tokenizer, limits)
        assert example.prompt_ids == rendered(tokenizer, (turns[0], *turns[kept:-1]), add_generation_prompt=True)
        assert counts.rows == ({} if kept == 1 else {"turns_dropped": ["f:1"]})
        assert example.prompt_truncated == (kept > 1) and example.prompt_key == record.prompt_key
        (every,), _ = tokenize([record], tokenizer, limits, all_replies=True)
        assert len(trained_pieces(every, 0, tokenizer)) == {1: 3, 3: 2, 5: 1}[kept]
    limits = SimpleNamespace(prompt=99, response=9, total=lengths[1] + 2)  # the total alone: a reply of two tokens
    (example,), _ = tokenize([conversation(turns)], tokenizer, limits)
    assert len(example.prompt_ids) == lengths[1]
    limits = SimpleNamespace(prompt=lengths[2] - 1, response=9, total=99)
    examples, counts = tokenize([conversation(turns)], tokenizer, limits)
    assert (examples, counts.dropped) == ([], {"prompt_too_long": 1})


def keys(**given):
    return SimpleNamespace(
        **{"chat_template": None, "chat_template_path": None, "chat_template_kwargs": None, "eos_token": None, **given}
    )


def test_values_are_kept_in_the_template(tmp_path):
    tokenizer = family("Qwen3")
    before = chat_template_digest(tokenizer)
    expected = rendered(tokenizer, talk("2?"), add_generation_prompt=True, enable_thinking=False)
    assert rendered(tokenizer, talk("2?"), add_generation_prompt=True) != expected
    apply_template_keys(tokenizer, keys(chat_template_kwargs={"enable_thinking": False}))
    assert chat_template_digest(tokenizer) != before
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    for made in (tokenizer, loaded):
        assert rendered(made, talk("2?"), add_generation_prompt=True) == expected
        assert rendered(made, talk("2?"), add_generation_prompt=True, enable_thinking=True) != expected
    row = Record("prompt", talk("2?"), extra={"chat_template_kwargs": {"enable_thinking": True}})
    assert tokenize([row], tokenizer, WIDE)[0][0].prompt_ids != expected


def test_values_of_every_kind_reach_the_template():
    tokenizer = family("ChatML")
    values = {"a": None, "b": [1, 2.5, "x'\"\n"], "c": {"d": True}, "e": "ü 😀"}
    tokenizer.chat_template = with_values("\n{{ a is none }} {{ b | tojson }} {{ c.d }} {{ e }}", values)
    text = tokenizer.apply_chat_template(list(talk("2?")), tokenize=False)
    assert text == '\nTrue [1, 2.5, "x\'\\"\\n"] True ü 😀'


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_base_model_takes_a_built_in_template(name):
    tokenizer = train_byte_level_bpe(["user assistant"] * 3, 270)
    row = conversation(talk("2?", "2", "3?", "3", system="Count."))
    with pytest.raises(DataError, match="set `chat_template: chatml`"):
        tokenize([row], tokenizer, WIDE)
    apply_template_keys(tokenizer, keys(chat_template=name))
    (example,), _ = tokenize([row], tokenizer, WIDE, all_replies=True)
    assert trained_pieces(example, 0, tokenizer) == ["2<|endoftext|>", "3<|endoftext|>"]


def test_templates_come_from_a_file_or_a_tokenizer(tmp_path):
    tokenizer = family("Phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    (tmp_path / "own.jinja").write_text("{{ messages[0].content }}")
    assert (
        apply_template_keys(family("ChatML"), keys(chat_template_path=str(tmp_path / "phi"))).chat_template
        == (FAMILIES["Phi"][0])
    )
    own = apply_template_keys(tokenizer, keys(chat_template_path=str(tmp_path / "own.jinja")))
    assert own.apply_chat_template(list(talk("2?")), tokenize=False) == "2?"
    with pytest.raises(ConfigError, match=r"chat_template_path: .*cannot be read"):
        apply_template_keys(tokenizer, keys(chat_template_path=str(tmp_path / "none")))
    assert load_tokenizer(str(tmp_path / "phi"), eos_token="<|end|>").eos_token == "<|end|>"
    with pytest.raises(ConfigError, match="eos_token: '<none>' is not a token"):
        load_tokenizer(str(tmp_path / "phi"), eos_token="<none>")


def test_a_template_that_is_not_jinja_is_refused_at_once():
    tokenizer = family("ChatML")
    tokenizer.chat_template = "{% for m in messages %}"
    with pytest.raises(DataError, match="chat_template: the chat template is not Jinja"):
        tokenize([conversation(talk("2?", "2"))], tokenizer, WIDE)
