"""The manifest of a folder is anybody's: its parents are not fetched, and values of a wrong kind end in one line."""

from __future__ import annotations

import json

import pytest

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.points import Point
from rlhf_pipeline.compare.preference_quality import preference_quality
from rlhf_pipeline.compare.rows import Scorers, bill
from rlhf_pipeline.compare.run import gates_of
from rlhf_pipeline.data.tokenizers import stop_ids
from rlhf_pipeline.errors import MismatchError, RlhfError
from rlhf_pipeline.measure.bench import set_up
from rlhf_pipeline.measure.leaves import trained_reward
from rlhf_pipeline.measure.training_loss import trained_by_dpo
from rlhf_pipeline.registry.lengths import positions_of
from rlhf_pipeline.stages.common import tokenizer_of

HUB = {"ref": "evil/model", "digest": None}
REWARD = {"reward_model_path": "evil/model"}


@pytest.fixture
def foreign(lab, tmp_path):
    """Make a folder of sft@v1 whose manifest says something else; returns what it resolves to."""

    def make(config=None, **fields):
        folder = lab.registry.export("sft", tmp_path / f"foreign{len(list(tmp_path.glob('foreign*')))}")
        values = json.loads((folder / "manifest.json").read_text())
        for key in ("format", "manifest_sha256"):
            del values[key]
        values["config"] |= config or {}
        (folder / "manifest.json").write_text(json.dumps(values | fields))
        return lab.registry.resolve(str(folder))

    return make


class Stub:
    """A bench of which nothing but the registry is read."""

    def __init__(self, registry):
        self.registry = registry


def test_a_reward_model_on_the_hub_is_not_taken_from_a_folder(lab, foreign):
    model = foreign(REWARD, stage="ppo", parents={"reward_model": HUB})
    points, bench = [(Point("a", None, {}, model.label), model)], Stub(lab.registry)
    with pytest.raises(MismatchError, match="on the hub"):
        trained_reward(lab.registry, model)
    with pytest.raises(MismatchError, match="on the hub"):
        Scorers.of(bench, points, False)
    with pytest.raises(MismatchError, match="on the hub"):
        preference_quality(bench, None, points)
    assert Scorers.of(bench, points, True).by_seed == {}  # another one was asked for: this one plays no part


def test_a_reward_model_of_another_digest_is_not_taken(lab, foreign):
    model = foreign(REWARD, stage="ppo", parents={"reward_model": {"ref": "reward@v1", "digest": "0" * 64}})
    for take in (
        lambda: trained_reward(lab.registry, model),
        lambda: Scorers.of(Stub(lab.registry), [(Point("a", None, {}, model.label), model)], False),
    ):
        with pytest.raises(MismatchError, match="digest 000000000000"):
            take()


def test_more_rewards_than_parents(lab, foreign):
    parts = [{"source": "reward", "weight": 1.0}, {"source": "other", "weight": 1.0}]
    model = foreign({"reward_functions": parts}, stage="ppo", parents={"reward_model": {"ref": "reward@v1"}})
    with pytest.raises(MismatchError, match="'other' of its config is not among its parents"):
        trained_reward(lab.registry, model)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stop_token", ["great"]),
        ("split_fractions", {"train": "all"}),
        ("split_fractions", {"train": 0.5}),
        ("split_fractions", [0.5, 0.5]),
        ("reward_functions", [{"weight": 1.0}]),
        ("reward_functions", [{"source": "world", "weight": "much"}]),
        ("reward_functions", {"source": "world"}),
        ("reward_model_path", 3),
        ("temperature", "warm"),
        ("kl_coef", [1]),
        ("beta", -1),
        ("beta", 10**400),
        ("max_length", 10**30),
        ("dataset_config", {}),
    ],
)
def test_values_of_another_kind_are_not_kept(foreign, key, value):
    assert key not in foreign({key: value}).manifest.config


def test_values_of_their_kind_are_kept(lab, foreign):
    parts = [{"source": "world", "weight": -0.5}, {"source": "world"}]
    said = {"reward_functions": parts, "stop_token": "great", "temperature": 0.5, "split_fractions": {"train": 1}}
    assert foreign(said).manifest.config == {
        key: value
        for key, value in (lab.registry.resolve("sft").manifest.config | said).items()
        if key not in ("trust_remote_code", "attn_implementation")
    }


def test_metrics_and_costs_of_another_kind_are_not_kept(lab, foreign):
    model = foreign(
        metrics={"calibration_slope": {"mean": "x"}, "gate": "passed", "health": [{"cause": "x"}], "loss": "x"},
        cost={"flops": "many", "wall_seconds": 3.0},
    )
    assert model.manifest.metrics == {"loss": "x"} and model.manifest.cost == {"wall_seconds": 3.0}
    assert bill(lab.registry, model).flops == 0.0


def test_a_gate_of_another_kind_is_not_kept(foreign):
    good = {"passed": False, "reason": "few"}
    for gate, kept in ((good, True), ({}, False), ({"passed": "perhaps", "reason": "few"}, False)):
        assert bool(gates_of([foreign(metrics={"gate": gate})])) is kept


def test_a_dpo_model_without_a_reference_is_none(foreign):
    assert not trained_by_dpo(foreign({"beta": 0.5}, stage="dpo", parents={}))
    assert not trained_by_dpo(foreign({"beta": "x"}, stage="dpo", parents={"reference": {"ref": "sft@v1"}}))
    assert trained_by_dpo(foreign({"beta": 0.5}, stage="dpo", parents={"reference": {"ref": "sft@v1"}}))


@pytest.mark.parametrize("text", ["[]", "{", "[" * 100_000])
def test_broken_files_beside_a_model_are_named(foreign, text):
    for name, read in (("config.json", positions_of), ("generation_config.json", tokenizer_of)):
        model = foreign()
        (model.path / name).write_text(text)
        with pytest.raises(RlhfError, match=name):
            read(model)


@pytest.mark.parametrize("stops", [-1, 10**30, "a", [None, 1, {}], [5]])
def test_stop_ids_that_are_no_tokens_end_nothing(foreign, stops):
    model = foreign()
    (model.path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    assert stop_ids(tokenizer_of(model)) == ((1, 5) if stops == [5] else (1,))


def test_a_stop_token_that_the_tokenizer_does_not_have(lab, foreign):
    model, config = foreign({"stop_token": "nowhere"}), lab.config("evaluate", max_prompts=2)
    with pytest.raises(MismatchError, match="stop token 'nowhere'"):
        set_up(lab.registry, config, model, "cpu", reference=None, samples=1, seed=0, say=lambda _: None)


def test_lineage_and_notes_show_what_a_terminal_would_obey(lab, foreign, capsys, tmp_path):
    wild = "\x1b[2J\x9b31m\u202e"
    model = foreign(stage=f"sft{wild}", parents={f"base{wild}": {"ref": f"x/y{wild}\nerror: all is lost"}})
    assert main(["models", "lineage", model.label, "--home", str(lab.home)]) == 0
    shown = capsys.readouterr().out
    assert not set("\x1b\x9b\u202e") & set(shown) and shown.count(r"\x1b[2J\x9b31m\u202e") == 3
    assert all(not line.startswith("error:") for line in shown.splitlines())
