"""Reward sources."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from rlhf_pipeline.config.reward_names import is_function_name, load_function
from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import ConfigError, RunFailed
from rlhf_pipeline.models.forward import Reader
from rlhf_pipeline.models.modules import RewardModel
from rlhf_pipeline.rollout.functions import FunctionReward
from rlhf_pipeline.rollout.rewards import CombinedReward, ModelReward, WorldReward, world_verdicts


def example(genre: str, aspect: str, *responses: tuple[str, bool]) -> Example:
    completions = [world.encode(text) + [world.EOS_ID] * ended for text, ended in responses]
    return Example(world.encode(world.prompt_text(genre, aspect)), completions, [e for _, e in responses], "k", "w")


EXAMPLES = [
    example("drama", "plot", ("great", True), ("very great and fine", False)),
    example("horror", "pacing", ("slow", True)),
    example("western", "music", ("loud loud", True), ("not loud", True)),
]
TRUE = [1.5, 2.8, -0.5, -2.5, -1.125]


def test_world_reward_scores_completions_in_order():
    assert WorldReward().score(EXAMPLES).tolist() == pytest.approx(TRUE, abs=1e-6)
    assert WorldReward().score(EXAMPLES).dtype == torch.float32
    assert world_verdicts(EXAMPLES).well_formed.tolist() == [True, True, True, False, True]


def lengths(prompts, completions, **columns):
    return [len(text.split()) for text in completions]


def test_a_function_gets_texts_without_the_stop_token_and_its_columns():
    seen = {}

    def judge(prompts, completions, **columns):
        seen.update(columns, prompts=prompts, completions=completions)
        return [1, 2.5, -1, 0, True]

    found = FunctionReward("judge", judge, world.tokenizer()).score(EXAMPLES)
    assert found.tolist() == [1.0, 2.5, -1.0, 0.0, 1.0]
    assert seen["prompts"] == [
        "the plot of this drama was",
        "the plot of this drama was",
        "the pacing of this horror was",
        "the music of this western was",
        "the music of this western was",
    ]
    assert seen["completions"] == ["great", "very great and fine", "slow", "loud loud", "not loud"]
    assert seen["ended"] == [True, False, True, True, True]
    assert seen["completion_ids"] == [ids for e in EXAMPLES for ids in e.completions]


@pytest.mark.parametrize(
    "answer",
    [[1.0], [1.0] * 6, [], ["1"] * 5],
    ids=["one", "six", "none", "text"],
)
def test_a_function_that_gives_something_else_stops_the_run(answer):
    source = FunctionReward("my:judge", lambda prompts, completions, **_: answer, world.tokenizer())
    with pytest.raises(RunFailed, match="my:judge: expected 5 numbers"):
        source.score(EXAMPLES)


def test_a_weighted_sum():
    words = FunctionReward("words", lengths, world.tokenizer())
    both = CombinedReward(((2.0, WorldReward()), (-0.5, words)))
    expected = [2 * true - 0.5 * count for true, count in zip(TRUE, [1, 4, 1, 2, 2])]
    assert both.score(EXAMPLES).tolist() == pytest.approx(expected, abs=1e-6)
    assert both.label == "2 x world + -0.5 x words"
    assert CombinedReward(((1.0, words),)).label == "words"
    assert CombinedReward(((2.0, words),)).label == "2 x words"


class Counting(RewardModel):
    """A reward model without a network: the number of tokens."""

    def __init__(self, reader: Reader):
        torch.nn.Module.__init__(self)
        self.reader, self.layouts = reader, []

    def forward(self, batch):
        self.layouts.append(batch.layout)
        return batch.lengths.double()


@pytest.mark.parametrize("layout", ["flat", "trees", "rows"])
@pytest.mark.parametrize("given", ["flat", "trees", "rows", None])
def test_a_model_is_asked_in_a_layout_that_it_reads(layout, given):
    model = Counting(Reader(layout))
    packed = None if given is None else pack(EXAMPLES, layout=given, flat_from=0)
    found = ModelReward("rm", model).score(EXAMPLES, packed)
    assert found.tolist() == [2, 4, 2, 3, 3] and found.dtype == torch.float32
    # What is given is taken where the model reads it. These trees are short: packed anew they are laid out as "trees".
    taken = {"flat": ("flat", "trees", "rows"), "trees": ("trees", "rows"), "rows": ("rows",)}[layout]
    assert model.layouts == [given if given in taken else "rows" if layout == "rows" else "trees"]


@pytest.mark.parametrize(
    "name, expected",
    [("module:function", True), ("a.b:c", True), ("reward@v1", False), ("a/b", False), ("a:", False), (":b", False)],
)
def test_names_of_functions(name, expected):
    assert is_function_name(name) is expected


def test_functions_come_from_the_current_folder_and_the_path_stays(tmp_path, monkeypatch):
    (tmp_path / "judges_here.py").write_text("number = 3\n\ndef judge(prompts, completions, **_):\n    return [7.0]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = list(sys.path)
    try:
        assert load_function("judges_here:judge")([], []) == [7.0]
        with pytest.raises(ConfigError, match="found a int"):
            load_function("judges_here:number")
        with pytest.raises(ConfigError, match="cannot import it"):
            load_function("judges_here:absent")
    finally:
        sys.modules.pop("judges_here", None)
    with pytest.raises(ConfigError, match="cannot import it"):
        load_function("no_such_module_anywhere:judge")
    assert sys.path == before


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_too_large_for_a_float_is_named_with_its_function(sign):
    huge = [sign * 10**400] * 2
    source = FunctionReward("huge:f", lambda prompts, completions, **_: huge, world.tokenizer())
    with pytest.raises(RunFailed, match=f"reward function huge:f: found {sign * math.inf} for the completion"):
        source.score(EXAMPLES[:1])
