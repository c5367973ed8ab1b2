"""Contexts of demonstrations: token ids by hand, which demonstrations are read, and what is refused."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.config.in_context import name_arm, split_arm
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.data import world
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import ConfigError, DataError
from rlhf_pipeline.measure.bench import find_policies, set_up
from rlhf_pipeline.measure.contexts import known_as, one_per_prompt, pool_of, with_demonstrations
from rlhf_pipeline.measure.evaluate import run_evaluate

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}c{{ m.content }}{% elif m.role == 'user' %}a{{ m.content }}"
    "{% else %}d{{ m.content }}<eos>\n{% endif %}{% endfor %}{% if add_generation_prompt %}d{% endif %}"
)


def letters(bos: bool = False):
    """Tokenizer of <eos> 0, <pad> 1, a 2, b 3, c 4, d 5, newline 6, and <bos> 7."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", "a", "b", "c", "d", "\n", "<bos>"]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(words)}, merges=[]))
    names = {"bos_token": "<bos>"} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", **names)


def demonstration(prompt, *completions, ended=True, messages=None, key="k"):
    ids = [list(one) for one in completions]
    return Example(list(prompt), ids, [ended] * len(ids), key, "w", messages=messages)


def test_texts_follow_one_another_each_response_with_its_end_token():
    prompt = demonstration([2, 3])
    pairs = [demonstration([2, 4], [4, 0], [3, 3, 0]), demonstration([2, 5], [5, 0], [0])]
    assert with_demonstrations(prompt, pairs, letters()) == [2, 4, 4, 0, 2, 5, 5, 0, 2, 3]
    assert with_demonstrations(prompt, pairs, letters(), side=1) == [2, 4, 3, 3, 0, 2, 5, 0, 2, 3]
    assert with_demonstrations(prompt, [], letters()) == [2, 3]


def test_a_text_begins_once():
    first, second, prompt = (demonstration([7, 2, word], [word, 0]) for word in (3, 4, 5))
    assert with_demonstrations(prompt, [first, second], letters(bos=True)) == [7, 2, 3, 3, 0, 2, 4, 4, 0, 2, 5]


def user(text):
    return {"role": "user", "content": text}


def test_a_chat_model_reads_demonstrations_as_earlier_turns():
    tokenizer = letters()
    tokenizer.chat_template = CHAT_TEMPLATE
    system = {"role": "system", "content": "b"}
    one = demonstration([4, 3, 2, 4, 5], [3, 0], messages=(system, user("c")))  # cb ac d | b<eos>
    prompt = demonstration([4, 3, 2, 3, 5], messages=(system, user("b")))
    # cb, ac, db<eos>\n, ab, d: the system turn once, the newline of the template behind the reply
    assert with_demonstrations(prompt, [one], tokenizer) == [4, 3, 2, 4, 5, 3, 0, 6, 2, 3, 5]
    # A prompt that was cut, or whose row gives the template values of its own, has other ids: texts follow one another.
    cut = demonstration([2, 3, 5], messages=(system, user("b")))
    assert with_demonstrations(cut, [one], tokenizer) == [4, 3, 2, 4, 5, 3, 0, 2, 3, 5]


def test_one_demonstration_for_each_prompt_and_none_of_the_prompts_of_the_results():
    examples = [demonstration([2], [3], key=key) for key in "abacb"]
    assert [one.prompt_key for one in one_per_prompt(examples)] == ["a", "b", "c"]
    assert [one.prompt_key for one in one_per_prompt(examples, {"a"})] == ["b", "c"]


@pytest.mark.parametrize(
    ("text", "method", "policy"),
    [
        ("few_shot:sft@v1", "few_shot", "sft@v1"),
        ("few_shot:./folder", "few_shot", "./folder"),
        ("sft", None, "sft"),
        ("icdpo:few_shot:a", "icdpo", "few_shot:a"),
        ("few_shot:", None, "few_shot:"),
        ("fewshot:sft", None, "fewshot:sft"),
    ],
)
def test_the_name_of_an_arm(text, method, policy):
    assert split_arm(text) == (method, policy)
    assert name_arm(method, policy) == text


def bench_of(lab, **changes):
    config = lab.config("evaluate", **changes)
    (arm,) = find_policies(lab.registry, ["few_shot:sft"], lambda _: None)
    options = {"reference": arm.policy, "samples": 2, "seed": 0, "say": lambda _: None}
    return set_up(lab.registry, config, arm, torch.device("cpu"), **options), arm


@pytest.mark.check
def test_demonstrations_come_from_the_training_split_of_the_sft_model(tiny):
    bench, arm = bench_of(tiny)
    pool = pool_of(bench, arm)
    assert pool.source == "world:verdicts"
    first: dict = {}
    for record in world.records():
        if record.split == "train":
            first.setdefault(record.prompt_ids, record)
    expected = {ids: record.completion_ids[0] for ids, record in first.items() if record.ended[0]}
    assert {tuple(one.prompt_ids): tuple(one.completions[0]) for one in pool.examples} == expected
    assert 10 < len(pool.examples) == len(expected) < 20


def test_demonstrations_of_another_source(tiny):
    bench, arm = bench_of(tiny, in_context={"source": "collected:pairs"})
    pool = pool_of(bench, arm)
    chosen = {
        (tuple(record.prompt_ids), tuple(record.completion_ids[0]))
        for record in pool.data.sources("demonstration")[0].records
        if record.split == "train"
    }
    assert pool.source == "collected:pairs" and 0 < len(pool.examples) <= 20
    assert all((tuple(one.prompt_ids), tuple(one.completions[0])) in chosen for one in pool.examples)


def test_bad_rows_of_the_source_are_left_out_like_those_of_the_prompts(tiny, tmp_path):
    path = tmp_path / "shown.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3, "completion": "b"}\n')
    source = {"source": str(path)}
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        known_as(*bench_of(tiny, in_context=source))
    _, _, one = known_as(*bench_of(tiny, in_context=source, skip_bad_rows=True))
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    assert known_as(*bench_of(tiny, in_context=source))[2] == one


@pytest.mark.check
def test_too_many_demonstrations_for_the_positions(tiny):
    bench, arm = bench_of(tiny, in_context={"demonstrations": 4})  # 4 x 7 + 6 + 4 > 32
    with pytest.raises(ConfigError, match=r"in_context\.demonstrations: 0 of 20 demonstrations of world:verdicts have"):
        pool_of(bench, arm)


def test_what_is_refused(tiny):
    with pytest.raises(ConfigError, match="split 'validation' has the prompts on which few_shot:sft chooses its"):
        run_evaluate("few_shot:sft", tiny.config("evaluate", split="validation"), tiny.registry.home)
    with pytest.raises(ConfigError, match="reference sft"):
        load_config("evaluate", None, extra={"reference": "few_shot:sft"})


def test_an_arm_is_another_policy_than_its_model(tiny):
    (arm, plain) = find_policies(tiny.registry, ["few_shot:sft", "sft"], lambda _: None)
    assert (arm.label, arm.stage, arm.policy.label) == ("few_shot:sft@v1", "few_shot", "sft@v1")
    assert arm.policy == plain and arm.digest != plain.digest and arm.identity != plain.identity


@pytest.mark.check
def test_samples_of_an_arm_are_known_by_its_demonstrations(tiny):
    bench, arm = bench_of(tiny)
    more, _ = bench_of(tiny, in_context={"demonstrations": 1})
    others, _ = bench_of(tiny, in_context={"source": "collected:pairs"})
    found = [str(known_as(one, arm)) for one in (bench, more, others)]
    assert len(set(found)) == 3 and str(known_as(bench_of(tiny)[0], arm)) == found[0]
