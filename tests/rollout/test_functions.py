"""Reward functions are called as TRL's GRPO trainer calls them."""

from __future__ import annotations

import asyncio
import math

import pytest

from rlhf_pipeline.config.lengths import Lengths
from rlhf_pipeline.config.reward_names import load_function
from rlhf_pipeline.data import world
from rlhf_pipeline.data.formats import parse
from rlhf_pipeline.data.kinds import as_kind
from rlhf_pipeline.data.tokenize import Example, tokenize
from rlhf_pipeline.data.tokenizers import train_byte_level_bpe
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.rollout.functions import FunctionReward
from rlhf_pipeline.rollout.rewards import CombinedReward, WorldReward

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    made = train_byte_level_bpe(["hello there, general"] * 4, 280)
    made.chat_template = CHATML
    return made


def prompts(tokenizer, rows):
    """The prompts of some rows as examples, without completions."""
    records = parse([(f"f.jsonl:{i}", row) for i, row in enumerate(rows, 1)], "f.jsonl").records
    examples, _ = tokenize(as_kind(records, "prompt")[0], tokenizer, Lengths(100, 100, 200))
    return examples


def answered(tokenizer, rows, *texts):
    """The prompts of some rows, each with the next of the texts as its response, which ended."""
    examples = prompts(tokenizer, rows)
    for example, text in zip(examples, texts, strict=True):
        example.completions = [tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]]
        example.ended = [True]
    return examples


def seen_by(tokenizer, examples):
    seen = {}

    def function(**given):
        seen.update(given)
        return [0.0] * len(given["completions"])

    FunctionReward("m:f", function, tokenizer).score(examples)
    return seen


def test_every_column_of_the_row_is_passed_by_its_name(tokenizer):
    rows = [
        {"prompt": "2+2?", "solution": "4", "level": 1, "tags": ["a"]},
        {"prompt": "3+3?", "solution": "6", "level": None, "tags": []},
    ]
    seen = seen_by(tokenizer, answered(tokenizer, rows, "4", "5"))
    assert seen["prompts"] == ["2+2?", "3+3?"] and seen["completions"] == ["4", "5"]
    assert seen["solution"] == ["4", "6"] and seen["level"] == [1, None] and seen["tags"] == [["a"], []]
    given = {"prompts", "completions", "completion_ids", "ended", "trainer_state", "log_extra", "log_metric"}
    assert set(seen) == given | {"solution", "level", "tags"}


def test_the_sides_of_a_pair_are_columns(tokenizer):
    rows = [{"prompt": "2+2?", "chosen": "4", "rejected": "5", "source": "s"}]
    seen = seen_by(tokenizer, answered(tokenizer, rows, "3"))
    assert (seen["chosen"], seen["rejected"], seen["source"]) == (["4"], ["5"], ["s"])


def test_chat_data_are_messages(tokenizer):
    turns = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "hello"}]
    examples = answered(tokenizer, [{"prompt": turns}], "<think>x</think> hi")
    seen = seen_by(tokenizer, examples)
    assert seen["prompts"] == [turns]
    assert seen["completions"] == [[{"role": "assistant", "content": "<think>x</think> hi"}]]
    source = FunctionReward("t", load_function("trl.rewards:think_format_reward"), tokenizer)
    assert source.score(examples).tolist() == [1.0]
    assert source.score(answered(tokenizer, [{"prompt": turns}], "x</think> hi")).tolist() == [0.0]


def test_a_response_continues_an_assistants_turn(tokenizer):
    """TRL takes the open turn from the prompt and puts it before the completion."""
    example = answered(tokenizer, [{"prompt": [{"role": "user", "content": "hello"}]}], " there")[0]
    example.messages = (*example.messages, {"role": "assistant", "content": "general"})
    seen = seen_by(tokenizer, [example])
    assert seen["prompts"] == [[{"role": "user", "content": "hello"}]]
    assert seen["completions"] == [[{"role": "assistant", "content": "general there"}]]


@pytest.mark.parametrize(
    "make, arguments, expected",
    [
        ("get_repetition_penalty_reward", {"ngram_size": 1, "max_penalty": -1.0}, [-0.5, 0.0]),
        ("get_soft_overlong_punishment", {"max_completion_len": 5, "soft_punish_cache": 4}, [-0.75, -0.25]),
    ],
)
def test_trls_functions_of_token_ids(make, arguments, expected, tokenizer):
    """Of 4 ids 2 are different: 1 - 2 / 4. Lengths 4 and 2 with 1 token free of charge: (1 - length) / 4."""
    import trl.rewards

    examples = [Example([5], [[7, 7, 7, 0], [8, 0]], [True, True], "k", "w", prompt_text="x")]
    scores = FunctionReward("t", getattr(trl.rewards, make)(**arguments), tokenizer).score(examples)
    assert scores.tolist() == pytest.approx(expected)


def test_an_async_function_also_where_an_event_loop_runs(tokenizer):
    async def judge(completions, **_):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    class Judge:
        async def __call__(self, completions, **_):
            return await judge(completions)

    examples = answered(tokenizer, [{"prompt": "a"}, {"prompt": "b"}], "xyz", "x")
    for function in (judge, Judge()):
        source = FunctionReward("m:judge", function, tokenizer)
        assert source.score(examples).tolist() == [3.0, 1.0]

        async def within(source=source):
            return source.score(examples).tolist()

        assert asyncio.run(within()) == [3.0, 1.0]


def test_an_async_function_that_fails_is_named(tokenizer):
    async def judge(solution, **_):
        return []

    with pytest.raises(RunFailed, match=r"m:judge: TypeError: .*'solution'.*the call was f\(prompts=.*level=\.\.\.\)"):
        FunctionReward("m:judge", judge, tokenizer).score(answered(tokenizer, [{"prompt": "a", "level": 1}], "x"))


def example(*responses):
    completions = [[*world.encode(text), world.EOS_ID] for text in responses]
    return Example(world.encode(world.prompt_text("drama", "plot")), completions, [True] * len(responses), "k", "w")


def constant(name, *values):
    return FunctionReward(name, lambda **_: list(values), world.tokenizer())


def test_none_is_left_out_of_every_combination_and_said_once():
    """Three responses; `one` applies to the first two, `two` to the first and, with weight 2, to none of the rest."""
    parts = ((1.0, constant("one", 4.0, 1.0, None)), (2.0, constant("two", 3.0, None, None)))
    expected = {"sum": [10.0, 1.0, 0.0], "min": [4.0, 1.0, 0.0], "mean_minus_std": [5.0 - 1.0, 1.0, 0.0]}
    for combination, scores in expected.items():
        said = []
        reward = CombinedReward(parts, combination, said.append)
        assert reward.score([example("great", "slow", "fine")]).tolist() == scores
        reward.score([example("great", "slow", "fine")])
        assert len(said) == 1 and "the score 0" in said[0]
    assert CombinedReward(parts, "min").label == "min(one, 2 x two)"


def test_combinations_of_three_rewards():
    """By hand: of 1, 2, 6 the mean is 3 and the variance (4 + 1 + 9) / 3; the weights are 1, 2 and -1."""
    parts = ((1.0, constant("a", 1.0)), (2.0, constant("b", 1.0)), (-1.0, constant("c", -6.0)))
    for combination, expected in (("sum", 9.0), ("min", 1.0), ("mean_minus_std", 3 - math.sqrt(14 / 3))):
        assert CombinedReward(parts, combination).score([example("great")]).item() == pytest.approx(expected, abs=1e-6)


def test_nan_from_a_function_is_still_refused():
    with pytest.raises(RunFailed, match="found nan for the completion 'slow'"):
        constant("m:f", None, math.nan).score([example("great", "slow")])


def test_a_reward_of_the_world_skips_nothing():
    reward = CombinedReward(((1.0, WorldReward()),))
    assert reward.score([example("great")]).tolist() == WorldReward().score([example("great")]).tolist() == [1.5]


def test_log_metric_and_trainer_state(tokenizer):
    def judge(completions, trainer_state, log_metric, log_extra, **_):
        log_metric("length", len(completions[0]))
        log_extra("shown", completions)
        return [float(trainer_state.global_step + 10 * trainer_state.max_steps)] * len(completions)

    source = FunctionReward("m:judge", judge, tokenizer)
    examples = answered(tokenizer, [{"prompt": "a"}], "xyz")
    assert source.score(examples).tolist() == [0.0]
    source.at(2, 7)
    assert source.score(examples).tolist() == [72.0] and source.logged == {"length": [3.0]}
