"""How models are read where they are measured: as trained, so many responses at once, less where memory runs out."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from pydantic import BaseModel
from torch.nn.functional import softplus

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.compare.run import run_compare
from rlhf_pipeline.data.load import read_records
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.measure.evaluate import run_evaluate
from rlhf_pipeline.measure.exact import run_exact
from rlhf_pipeline.measure.generate import run_generate
from rlhf_pipeline.models import forward
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.rollout import responses
from rlhf_pipeline.stages.collect import run_collect
from rlhf_pipeline.stages.common import load_policy, tokenizer_of
from rlhf_pipeline.stages.data import StageData

pytestmark = pytest.mark.check

CPU = torch.device("cpu")
PROMPT = "the plot of this drama was"


@pytest.fixture(scope="module")
def arms(tiny, tmp_path_factory):
    """A laboratory with a PPO and two DPO models."""
    lab = tiny.copy(tmp_path_factory.mktemp("arms") / "home")
    lab.run("ppo", max_steps=2)
    lab.run("dpo", max_steps=6)
    lab.run("dpo", output_name="longer", max_steps=40)
    return lab


# 1. As trained, whatever the temperature of sampling.


def pairs_of(lab, split: str) -> list[Example]:
    tokenizer = tokenizer_of(lab.registry.resolve("dpo"))
    return StageData(lab.config("dpo"), lab.home, lambda _: None).split("pair", split, tokenizer)[0]


def margins(lab, split: str) -> torch.Tensor:
    """beta (log pi / pi_ref of the chosen response - that of the rejected one), by plain forward passes, in float64."""
    config, pairs = lab.config("dpo"), pairs_of(lab, split)
    tokenizer = tokenizer_of(lab.registry.resolve("dpo"))
    models = [load_policy(lab.registry.resolve(name), config, tokenizer, CPU, frozen=True) for name in ("dpo", "sft")]
    rows = []
    for pair in pairs:
        sums = []
        for ids in pair.completions:
            for model in models:
                with torch.no_grad():
                    logits = model.model(torch.tensor([pair.prompt_ids + ids])).logits[0, len(pair.prompt_ids) - 1 : -1]
                sums.append(logits.double().log_softmax(-1)[range(len(ids)), ids].sum())
        rows.append(0.5 * ((sums[0] - sums[1]) - (sums[2] - sums[3])))
    return torch.stack(rows)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_implicit_rewards_are_of_the_policy_as_trained(arms, temperature):
    values = {"name": "warm", "arms": ["dpo"], "baseline": "sft", "samples": 1, "temperature": temperature}
    found = run_compare(arms.config("compare", **values), arms.home, quiet=True).preferences.scorers["dpo@v1"]
    expected, prompts = margins(arms, "test"), [pair.prompt_key for pair in pairs_of(arms, "test")]
    weights = torch.tensor([1 / prompts.count(prompt) for prompt in prompts]).double()  # a prompt counts the same
    assert found.nll == pytest.approx(float(weights @ softplus(-expected) / weights.sum()), abs=1e-6)
    assert found.accuracy.mean == pytest.approx(float((expected > 0).double().mean()), abs=0.05)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_training_losses_are_of_the_policy_as_trained(arms, temperature):
    config = arms.config("exact", max_new_tokens=1, max_prompts=2, temperature=temperature)
    rows = {row.name: row for row in run_exact(["dpo", "longer"], config, arms.home).rows}
    expected = float(softplus(-margins(arms, "train")).mean())
    assert rows["dpo@v1"].training_loss.training_loss == pytest.approx(expected, abs=1e-6)


def test_sampled_and_exact_figures_are_at_the_temperature_of_sampling(arms):
    def figures(temperature: float) -> tuple[float, float]:
        short = {"max_new_tokens": 1, "max_prompts": 2, "temperature": temperature, "training_loss": False}
        (row, _) = run_exact(["dpo"], arms.config("exact", **short), arms.home).rows
        sampled = run_evaluate("dpo", arms.config("evaluate", temperature=temperature), arms.home)
        return row.reward, sampled["metrics"]["entropy"].mean

    warm, cold = figures(1.0), figures(0.25)
    assert cold[0] != pytest.approx(warm[0], abs=1e-3) and cold[1] < 0.75 * warm[1]


# 2. So many responses at once; half as many where memory runs out.


class Passes:
    """How many responses each forward pass held; with `most`, those that hold more run out of memory.

    A prefix with all its next tokens, of which exact figures read many, counts as one.
    """

    def __init__(self, monkeypatch, most: int | None = None):
        self.most, self.held, self.refused = most, [], 0
        mask, run = forward.attention_mask, Policy.forward

        def packed(batch, *args):
            rows = batch.input_ids.shape[0]
            self.see(rows if batch.num_completions >= 31 * rows else batch.num_completions)
            return mask(batch, *args)

        def decoded(policy, batch=None, **decode):
            if batch is None and decode["input_ids"].shape[1] == 1:
                self.see(decode["input_ids"].shape[0])
            return run(policy, batch, **decode)

        monkeypatch.setattr(forward, "attention_mask", packed)
        monkeypatch.setattr(Policy, "forward", decoded)

    def see(self, count: int) -> None:
        if self.most is not None and count > self.most:
            self.refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        self.held.append(count)


def evaluated(lab, at_once, name="dpo"):
    config = lab.config("evaluate", samples=6, best_of=[2], reward_model="reward", **at_once)
    return run_evaluate(name, config, lab.home)


def compared(lab, at_once):
    values = {"name": "measured", "arms": ["ppo", "dpo"], "baseline": "sft", "samples": 6, **at_once}
    found = run_compare(lab.config("compare", **values), lab.home)
    return [found.rows, found.preferences, found.samples_shown]


def exactly(lab, at_once):
    config = lab.config("exact", max_new_tokens=2, max_prompts=2, reward_model_prompts=1, **at_once)
    for path in (lab.home / "cache").glob("*"):
        path.unlink()
    return run_exact(["sft", "reward", "dpo", "longer"], config, lab.home).rows


def generated(lab, at_once):
    config = lab.config("evaluate", samples=20, reward_model="reward", **at_once)
    return run_generate("dpo", config, lab.home, texts=[PROMPT])["responses"]


def collected(lab, at_once):
    result = run_collect(lab.config("collect", num=12, k=3, judge="reward", **at_once), lab.home)
    rows = [record.__dict__ for record in read_records(f"collected:{result.model}", home=lab.home).records]
    return [{key: value for key, value in row.items() if key != "where"} for row in rows]


COMMANDS: dict[str, Any] = {
    "evaluate": evaluated,
    "evaluate a reward model": lambda lab, at_once: evaluated(lab, at_once, "reward"),
    "compare": compared,
    "exact": exactly,
    "generate": generated,
    "data collect": collected,
}


def assert_same(found: Any, expected: Any) -> None:
    """Equal but for the rounding of numbers: 1e-6."""
    if isinstance(expected, BaseModel):
        found, expected = found.model_dump(), expected.model_dump()
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            if key not in ("cost", "wall_seconds"):
                assert_same(found[key], value)
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=1e-6, rel=1e-6)
    else:
        assert found == expected


@pytest.fixture(scope="module", params=COMMANDS)
def measured(request, arms):
    """A command, and what it finds with everything in one batch."""
    work = COMMANDS[request.param]
    with pytest.MonkeyPatch.context() as patch:
        passes = Passes(patch)
        expected = work(arms, {"per_device_eval_batch_size": 4096})
    assert max(passes.held) > 16  # so that a bound means something
    return work, expected


def test_per_device_eval_batch_size_counts_responses(measured, arms, monkeypatch):
    work, expected = measured
    passes = Passes(monkeypatch)
    assert_same(work(arms, {"per_device_eval_batch_size": 4}), expected)
    assert max(passes.held) == 4


def test_where_memory_runs_out_responses_are_halved(measured, arms, monkeypatch, capsys):
    work, expected = measured
    passes = Passes(monkeypatch, most=5)
    assert_same(work(arms, {"per_device_eval_batch_size": 16}), expected)
    said = " ".join(capsys.readouterr().err.split())
    assert passes.refused == said.count("out of memory in ") and passes.refused % 2 == 0  # 16 and 8, of each kind
    assert "16 responses at a time do not fit" in said or "16 prefixes at a time do not fit" in said
    assert "(CUDA out of memory. Tried to allocate 20 MiB); halved from now on (halving 1 of 3)" in said
    assert max(passes.held) <= 5 and "optimizer step" not in said


@pytest.mark.parametrize(
    ("at_once", "most", "found"),
    [
        (64, 5, "8 responses at a time do not fit after 3 of 3 halvings"),
        (2, 0, "a single response does not fit after 1 of 3 halvings"),
    ],
)
def test_after_three_halvings_the_command_ends(arms, monkeypatch, capsys, at_once, most, found):
    sample = responses.sample_grouped

    def limited(*args, responses_at_once, **options):
        if responses_at_once > most:
            raise MemoryError
        return sample(*args, responses_at_once=responses_at_once, **options)

    monkeypatch.setattr(responses, "sample_grouped", limited)
    words = ["generate", "sft", "--prompt", PROMPT, "--samples", "64", f"per_device_eval_batch_size={at_once}"]
    assert main([*words, "use_cpu=true", "--home", str(arms.home)]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert f"error: out of memory in sampling: {found}" in said
    assert "try a smaller per_device_eval_batch_size" in said and "gradient_checkpointing" not in said


# 3. The world's reward judges what the world has labelled, or what it is asked to.


def rated(prompts, completions, **columns):
    """A judge of somebody else's."""
    return [float(len(text)) for text in completions]


@pytest.fixture(scope="module")
def others(tiny, tmp_path_factory):
    """DPO on a file of the user's own and on pairs that a function has judged, with the world's tokenizer."""
    lab = tiny.copy(tmp_path_factory.mktemp("others") / "home")
    rows = [
        {"prompt": PROMPT, "chosen": " great", "rejected": " awful", "split": "train"},
        {"prompt": "the acting of this western was", "chosen": " dull", "rejected": " fine", "split": "test"},
    ]
    path = lab.home / "own.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lab.run("dpo", output_name="own", dataset_name=str(path), max_steps=1)
    lab.run("collect", output_name="judged", judge=f"{__name__}:rated", num=300)
    lab.run("dpo", output_name="judged", dataset_name="collected:judged", max_steps=1)
    lab.run("dpo", output_name="honest", max_steps=1)
    return lab


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("sft", {}, "true reward: the built-in world's, since the prompts are those of world:verdicts"),
        ("honest", {}, "true reward: the built-in world's, since it labelled collected:pairs"),
        ("own", {"true_reward": "world"}, "true reward: the built-in world's, since true_reward names it"),
        ("own", {"reward_model": "world"}, "true reward: the built-in world's, since reward_model names it"),
        ("own", {"prompts": "world:verdicts"}, "since the prompts are those of world:verdicts"),
        ("own", {}, "note: own@v1 has the tokenizer of world:verdicts, but nothing shows that the world labelled"),
        (
            "judged",
            {},
            "note: judged@v1 has the tokenizer of world:verdicts, but nothing shows that the world labelled",
        ),
    ],
)
def test_the_world_judges_by_the_data_or_by_request(others, capsys, name, changes, says):
    found = run_evaluate(name, others.config("evaluate", samples=1, **changes), others.home)
    assert says in " ".join(capsys.readouterr().err.split())
    known = not says.startswith("note")
    assert found["true_reward"] == ("world" if known else None)
    assert ("true_reward" in found["metrics"]) is ("well_formed" in found["metrics"]) is known
