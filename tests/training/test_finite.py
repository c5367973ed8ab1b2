"""NaN and infinity stop a run before the optimizer steps: the place is named, the batch kept, and the run goes on."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.rollout import rewards
from rlhf_pipeline.stages import dpo, ppo, reward, sft
from rlhf_pipeline.training import ppo_rollouts, session
from rlhf_pipeline.training.finite import bad_completions, bad_places
from tests import fake_vllm

STAGES = {"sft": sft, "train-rm": reward, "dpo": dpo, "ppo": ppo}
# Update 3 of 4 is the bad one; windows are two micro-batches of 4.
SETTINGS = {
    "save_steps": 1,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-3,
}
PPO = {"save_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3}
# PPO has 2 epochs x 2 minibatches x 2 micro-batches in an update, the others 2 micro-batches.
BAD_CALL = {"sft": 6, "train-rm": 6, "dpo": 6, "ppo": 18}
UPDATE, LAST = 3, "checkpoints/step-2"
NAMES = {"sft": "sft_step", "train-rm": "reward_step", "dpo": "dpo_step", "ppo": "ppo_step"}


def settings(stage: str) -> dict:
    return PPO if stage == "ppo" else SETTINGS


class Poison(torch.autograd.Function):
    """The identity, with a gradient of NaN or infinity."""

    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        return torch.full_like(slope, ctx.bad), None


class Fault:
    """Spoils one example of update 3, the second of the window's second micro-batch, wherever it is computed."""

    def __init__(self, monkeypatch, stage: str):
        self.patch, self.stage, self.module = monkeypatch, stage, STAGES[stage]
        self.example: Example | None = None
        self.figure: tuple[str, float] | None = None
        self.here, self.calls = False, 0
        step = getattr(self.module, NAMES[stage])

        def watched(model, micro_batch, **options):
            self.calls += 1
            if self.calls == BAD_CALL[stage]:
                self.example = micro_batch.examples[1]
            places = [i for i, e in enumerate(micro_batch.examples) if e is self.example]
            self.here = bool(places)
            if places and self.figure is not None:
                before = sum(len(e.completions) for e in micro_batch.examples[: places[0]])
                model = self.wrapped(model, before + len(self.example.completions) - 1)
            return step(model, micro_batch, **options)

        monkeypatch.setattr(self.module, NAMES[stage], watched)

    def wrapped(self, model, row):
        """A model one of whose figures is bad in one completion, the last of the example."""
        name, bad = self.figure

        def spoiled(batch):
            found = model(batch)
            value = (found if isinstance(found, Tensor) else getattr(found, name)).clone()
            where = [row] if len(value) == batch.num_completions else batch.completion_index == row
            value[where] = bad
            return value if isinstance(found, Tensor) else replace(found, **{name: value})

        return spoiled

    def spoil_output(self, name: str, bad: float) -> None:
        self.figure = (name, bad)

    def spoil_function(self, name: str, change) -> None:
        original = getattr(self.module, name)
        self.patch.setattr(
            self.module,
            name,
            lambda *args, **options: change(original(*args, **options)) if self.here else original(*args, **options),
        )


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """The weights and metrics of runs that nothing disturbed."""
    lab = tiny.copy(tmp_path_factory.mktemp("whole") / "home")
    kept = {}

    def of(stage: str, **changes):
        key = (stage, *sorted(map(str, changes.items())))
        if key not in kept:
            result = lab.run(stage, resume=False, **settings(stage), **changes)
            kept[key] = lab.weights(result.model), (Path(result.run) / "metrics.jsonl").read_text()
        return kept[key]

    return of


@pytest.fixture
def fails(lab, monkeypatch, whole):
    """Run a stage that must fail, check what it leaves, mend it, and check that it ends as if nothing had been."""

    def run(stage: str, spoil, figure: str, *, steps: bool = True, **changes) -> dict:
        states, fit = [], session.fit

        def watched(model, *args, **options):
            try:
                return fit(model, *args, **options)
            finally:
                states.append({name: value.detach().clone() for name, value in model.state_dict().items()})

        with monkeypatch.context() as patch:
            patch.setattr(session, "fit", watched)
            spoil(patch)
            try:
                lab.run(stage, **settings(stage), **changes)
                message = "the run has gone on"
            except RunFailed as error:
                message = str(error)
                assert error.exit_code == 1
        assert message.startswith(f"update {UPDATE}: the {figure} ")
        assert "this step was not applied" in message and f"the last checkpoint is {LAST}" in message
        (directory,) = (lab.home / "runs").iterdir()
        assert str(directory / "failure") in message
        kept = load_file(directory / LAST / "model.safetensors")
        if steps:
            assert all(torch.equal(states[0][name], kept[name]) for name in kept)
        told = json.loads((directory / "failure" / "failure.json").read_text())
        assert (told["cause"], told["update"]) == (figure, UPDATE)
        assert told["last_metrics"]["epoch"] > 0 and told["learning_rate"] > 0 and told["parents"]["base"]
        tensors = load_file(directory / "failure" / "batch.safetensors")
        assert {int(name.partition(".")[0]) for name in tensors} == set(told["micro_batches"])
        result = lab.run(stage, **settings(stage), **changes)
        weights, metrics = whole(stage, **changes)
        found = lab.weights(result.model)
        assert all(torch.equal(found[name], weights[name]) for name in weights)
        assert (Path(result.run) / "metrics.jsonl").read_text() == metrics
        return told | {"message": message, "tensors": tensors}

    return run


def assert_names(told: dict, example: Example, completion: int | None, bad: float, total: int) -> None:
    """The one row is that example's, with its ids and texts, and lies in the packed batch."""
    (row,) = told["rows"]
    assert row["where"] == example.where and f"first: {example.where})" in told["message"]
    assert row["prompt_ids"] == example.prompt_ids
    chosen = range(len(example.completions)) if completion is None else [completion]
    assert [c["ids"] for c in row["completions"]] == [example.completions[k] for k in chosen]
    assert all(c["text"] for c in row["completions"]) and row["prompt"]
    assert {value["value"] for value in row["values"]} <= ({str(bad)} if completion is not None else {str(bad), "nan"})
    assert (told["bad"], told["of"]) == (1, total)
    ids = told["tensors"][f"{row['micro_batch']}.input_ids"].flatten().tolist()
    assert all(token in ids for token in example.prompt_ids)


BAD = [math.nan, math.inf]
POLICY = "log-probabilities of the policy"


@pytest.mark.parametrize("bad", [*BAD, -math.inf])  # a rejected response of -inf has a loss of 0 in DPO
@pytest.mark.parametrize(
    ("stage", "name", "figure", "total"),
    [
        ("sft", "logprobs", POLICY, 8),
        ("dpo", "logprobs", POLICY, 16),
        ("train-rm", "scores", "scores", 16),
        ("ppo", "logprobs", POLICY, 8),
        ("ppo", "values", "values", 8),
    ],
    ids=["sft", "dpo", "train-rm", "ppo", "values"],
)
def test_what_the_model_says(fails, stage, name, figure, total, bad):
    faults = []

    def spoil(patch):
        faults.append(Fault(patch, stage))
        faults[0].spoil_output(name, bad)

    told = fails(stage, spoil, figure)
    (row,) = told["rows"]
    example = faults[0].example
    assert row["micro_batch"] == 1
    if stage in ("sft", "ppo"):  # the others look at whole completions
        assert [value["token"] for value in row["values"]] == list(range(len(example.completions[-1])))
    assert_names(told, example, len(example.completions) - 1, bad, total)


LOSSES = {
    "sft": ("negative_log_likelihood", lambda found, act: act(found)),
    "train-rm": ("bradley_terry_loss", lambda found, act: act(found)),
    "dpo": ("preference_loss", lambda found, act: replace(found, loss=act(found.loss))),
    "ppo": ("clipped_policy_loss", lambda found, act: replace(found, loss=act(found.loss))),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("figure", ["loss", "gradient"])
@pytest.mark.parametrize("stage", list(STAGES))
def test_loss_and_gradient(fails, stage, figure, bad):
    name, change = LOSSES[stage]
    faults = []

    def act(value):
        return value + bad if figure == "loss" else Poison.apply(value, bad)

    def spoil(patch):
        faults.append(Fault(patch, stage))
        faults[0].spoil_function(name, lambda found: change(found, act))

    told = fails(stage, spoil, figure)
    assert_names(told, faults[0].example, None, bad, 8)
    assert told["micro_batches"] == [1]
    if figure == "gradient":
        assert all("." in value["parameter"] for value in told["rows"][0]["values"])


@pytest.mark.parametrize("stage", list(STAGES))
def test_a_weight(fails, stage):
    """Everything that reads it is bad: all rows are told, and the weight is named."""

    def spoil(patch):
        fault = Fault(patch, stage)
        watched = getattr(fault.module, NAMES[stage])

        def broken(model, micro_batch, **options):
            if fault.calls == BAD_CALL[stage] - 2:
                next(p for name, p in model.named_parameters() if "norm" in name).data[0] = math.nan
            return watched(model, micro_batch, **options)

        patch.setattr(fault.module, NAMES[stage], broken)

    told = fails(stage, spoil, "scores" if stage == "train-rm" else POLICY, steps=False)
    assert told["bad"] == told["of"] == (8 if stage in ("sft", "ppo") else 16)
    assert told["micro_batches"] == [0, 1]
    assert len(told["weights_not_finite"]) == 1 and "norm" in told["weights_not_finite"][0]
    assert "weights themselves are not finite" in told["message"]


@pytest.mark.parametrize("bad", BAD)
def test_the_reference_of_dpo(fails, bad):
    found = []

    def spoil(patch):
        fault = Fault(patch, "dpo")
        watched = dpo.dpo_step

        def spoiled(model, micro_batch, *, reference, **options):
            reference = reference.clone()
            if fault.calls == BAD_CALL["dpo"] - 1:
                found.append(micro_batch.examples[1])
                reference[micro_batch.indices[1], 1] = bad
            return watched(model, micro_batch, reference=reference, **options)

        patch.setattr(dpo, "dpo_step", spoiled)

    told = fails("dpo", spoil, "log-probabilities of the reference")
    assert_names(told, found[0], 1, bad, 16)
    assert "check the reference model" in told["message"]


def test_reference_log_probabilities_that_are_not_finite_are_not_cached(lab, monkeypatch):
    from rlhf_pipeline.training import reference_cache

    sums = reference_cache.completion_logprob_sums
    before = set((lab.home / "cache").glob("reference-*")) if (lab.home / "cache").is_dir() else set()
    with monkeypatch.context() as patch:
        patch.setattr(reference_cache, "completion_logprob_sums", lambda *a, **o: sums(*a, **o) * math.nan)
        with pytest.raises(RunFailed, match="update 1: the log-probabilities of the reference are not finite"):
            lab.run("dpo", **SETTINGS)
    assert set((lab.home / "cache").glob("reference-*")) == before
    lab.run("dpo", **SETTINGS)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("scores", "rewards of reward@v1"),
        ("logprobs", POLICY),
        ("ref_logprobs", "log-probabilities of the reference"),
        ("values", "values"),
    ],
)
def test_the_figures_of_a_rollout(fails, name, figure, bad):
    spoiled = []

    def spoil(patch):
        run_models = ppo_rollouts.run_models

        def shifted(*args):
            found, refused = run_models(*args)
            shifted.calls += 1
            if shifted.calls != UPDATE:
                return found, refused
            value = getattr(found, name).clone()
            value[(5, 0) if value.ndim == 2 else 5] = bad
            spoiled.append(found.examples[5])
            return replace(found, **{name: value}), refused

        shifted.calls = 0
        patch.setattr(ppo_rollouts, "run_models", shifted)

    told = fails("ppo", spoil, figure)
    assert_names(told, spoiled[0], 0, bad, 16)
    assert told["rows"][0]["values"] == [({} if name == "scores" else {"token": 0}) | {"value": str(bad)}]


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_log_probabilities_of_another_sampler(fails, monkeypatch, bad):
    """A weight of exp(old - -inf) is the cap: without a look at what the engine says the run would go on."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setitem(sys.modules, "vllm", fake_vllm.module())
    answered, spoiled = [], []

    def answer(output):
        answered.append(output)
        if len(answered) != (UPDATE - 1) * 16 + 6:  # the sixth response of update 3
            return output
        (token,) = output.logprobs[0]
        first = {token: SimpleNamespace(logprob=bad)}
        return SimpleNamespace(**{**vars(output), "logprobs": [first, *output.logprobs[1:]]})

    def spoil(patch):
        run_models = ppo_rollouts.run_models

        def watched(*args):
            found, refused = run_models(*args)
            spoiled[:] = [found.examples[5]]
            return found, refused

        patch.setattr(ppo_rollouts, "run_models", watched)
        patch.setattr(fake_vllm.LLM, "answer", staticmethod(answer))

    told = fails("ppo", spoil, "log-probabilities of the sampler", rollout_engine="vllm")
    assert_names(told, spoiled[0], 0, bad, 16)
    assert told["rows"][0]["values"] == [{"token": 0, "value": str(bad)}]
    assert "use rollout_engine: native" in told["message"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", ["advantages", "returns"])
def test_advantages_and_returns(fails, name, bad):
    spoiled = []

    def spoil(patch):
        check_and_describe = ppo.check_and_describe

        def shifted(setup, scored, estimates):
            spoiled.append(scored.rollout.examples[2])
            if len(spoiled) == UPDATE:
                value = getattr(estimates, name).clone()
                value[2, 0] = bad
                estimates = replace(estimates, **{name: value})
            return check_and_describe(setup, scored, estimates)

        patch.setattr(ppo, "check_and_describe", shifted)

    told = fails("ppo", spoil, name)
    assert_names(told, spoiled[UPDATE - 1], 0, bad, 16)


@pytest.mark.parametrize("bad", BAD)
def test_each_reward_source_is_named(fails, bad):
    """Of two weighted sources the one that has said it."""
    spoiled = []

    def spoil(patch):
        score, calls = rewards.WorldReward.score, []

        def shifted(self, examples, packed=None):
            found = score(self, examples, packed)
            calls.append(len(examples))
            if len(calls) == 11:  # four micro-batches of 4 in an update: the third of update 3
                found[1] = bad
                spoiled.append(examples[1])
            return found

        patch.setattr(rewards.WorldReward, "score", shifted)

    sources = ["world", {"source": "reward", "weight": 0.5}]
    told = fails("ppo", spoil, "rewards of world", reward_model_path=None, reward_functions=sources, value_init="sft")
    assert_names(told, spoiled[0], 0, bad, 16)
    assert told["rows"][0]["micro_batch"] == 2
    assert "reward world: found scores that are not finite" in told["message"]
    assert "correct the source of the reward" in told["message"]


def test_a_reward_function_by_the_command_line(lab, tmp_path, monkeypatch, capsys):
    """Its name, the prompt and the answer in the message, exit 1, no version; mended, the same command goes on."""
    (tmp_path / "judge_of_this_test.py").write_text(
        "BAD = True\ncalls = []\n\n\ndef judge(prompts, completions, **_):\n"
        "    calls.append(len(prompts))\n"
        "    return [float('nan') if BAD and len(calls) == 9 and i == 3 else float(len(c)) for i, c in"
        " enumerate(completions)]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = lab.config("ppo", **PPO, reward_model_path=None, reward_functions=["judge_of_this_test:judge"])
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    command = ["--home", str(lab.home), "ppo", "--config", "ppo.yaml"]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "update 3: the rewards of judge_of_this_test:judge are not finite (1 of 16 completions" in error
    assert "found nan for the completion" in error and "Traceback" not in error
    assert not lab.registry.models.numbers("ppo")
    import judge_of_this_test

    judge_of_this_test.BAD = False
    assert main(command) == 0
    assert lab.registry.models.numbers("ppo") == [1]


def test_a_second_failure_takes_the_place_of_the_first(lab, monkeypatch):
    for bad in ("nan", "inf"):
        with monkeypatch.context() as patch:
            fault = Fault(patch, "sft")
            fault.spoil_output("logprobs", float(bad))
            fault.calls = 0 if bad == "nan" else 4  # the second run begins at update 3
            with pytest.raises(RunFailed):
                lab.run("sft", **SETTINGS)
        (directory,) = (lab.home / "runs").iterdir()
        told = json.loads((directory / "failure" / "failure.json").read_text())
        assert told["rows"][0]["values"][0]["value"] == bad
        assert sorted(path.name for path in (directory / "failure").iterdir()) == ["batch.safetensors", "failure.json"]
        assert not list(directory.glob(".failure*"))


def test_a_failure_that_a_resumed_run_has_passed_is_kept_under_another_name(lab, monkeypatch):
    """Updates 3 and 4 fail once each: until an update is done its failure is `failure/`, then `failure-<number>/`."""

    def failures() -> dict[str, int]:
        (directory,) = (lab.home / "runs").iterdir()
        found = {path.name: json.loads((path / "failure.json").read_text()) for path in directory.glob("failure*")}
        return {name: told["update"] for name, told in found.items()}

    def fail(already: int) -> None:
        """Fail at the bad call after `already` calls of the step, two of which are an update."""
        with monkeypatch.context() as patch:
            fault = Fault(patch, "sft")
            fault.spoil_output("logprobs", math.nan)
            fault.calls = already
            with pytest.raises(RunFailed):
                lab.run("sft", **SETTINGS, max_steps=5)

    fail(already=0)
    assert failures() == {"failure": 3}
    fail(already=4)  # the run begins again at update 3
    assert failures() == {"failure": 3}
    fail(already=2)
    assert failures() == {"failure": 4, "failure-1": 3}
    result = lab.run("sft", **SETTINGS, max_steps=5)
    assert failures() == {"failure-1": 3, "failure-2": 4}
    assert "update 4, which had failed before, is done" in (Path(result.run) / "log.txt").read_text()
    assert sorted(path.name for path in (Path(result.run) / "failure-1").iterdir()) == [
        "batch.safetensors",
        "failure.json",
    ]


def test_before_the_first_checkpoint(lab, monkeypatch):
    fault = Fault(monkeypatch, "sft")
    fault.spoil_output("logprobs", math.nan)
    with pytest.raises(RunFailed, match="there is no checkpoint"):
        lab.run("sft", **{**SETTINGS, "save_steps": None})


def test_places_by_hand():
    value = torch.tensor([[1.0, math.nan], [2.0, 3.0], [-math.inf, math.inf]])
    assert bad_places(value) == {
        0: [{"token": 1, "value": "nan"}],
        2: [{"token": 0, "value": "-inf"}, {"token": 1, "value": "inf"}],
    }
    batch = pack([Example([1], [[2, 3], [4]], [True, True], "a", "a"), Example([1], [[5, 6, 7]], [True], "b", "b")])
    tokens = torch.tensor([0.0, 0.0, math.inf, 0.0, math.nan, 0.0])
    assert bad_completions(batch, tokens) == {
        1: [{"token": 0, "value": "inf"}],
        2: [{"token": 1, "value": "nan"}],
    }
    assert bad_completions(batch, torch.tensor([0.0, math.nan, 0.0])) == {1: [{"value": "nan"}]}
