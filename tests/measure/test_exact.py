"""`rlhf exact` on a tiny policy, reward model, PPO and DPO: the figures against another way to them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rlhf_pipeline.compare.run import compared
from rlhf_pipeline.errors import ConfigError, MismatchError, RunFailed
from rlhf_pipeline.evaluation.closed_forms import kl_divergence, optimum
from rlhf_pipeline.evaluation.enumeration import ResponseTree
from rlhf_pipeline.measure import exact as module
from rlhf_pipeline.measure.evaluate import run_evaluate
from rlhf_pipeline.measure.exact import run_exact
from rlhf_pipeline.measure.leaves import trained_reward
from rlhf_pipeline.measure.training_loss import problem_of

LEAVES = 31 + 31**2 + 1  # responses of at most two tokens
SHORT = {"max_new_tokens": 2}


@pytest.fixture(scope="module")
def arms(tiny, tmp_path_factory):
    """A laboratory with a PPO model, one on the true reward, and two DPO models on one data set."""
    lab = tiny.copy(tmp_path_factory.mktemp("arms") / "home")
    lab.run("ppo", max_steps=3)
    lab.run(
        "ppo",
        output_name="honest",
        max_steps=3,
        reward_model_path=None,
        reward_functions=[{"source": "world", "weight": 1.0}],
    )
    lab.run("dpo", max_steps=6)
    lab.run("dpo", output_name="longer", max_steps=60)
    return lab


def exact(lab, *references, **changes):
    return run_exact(list(references), lab.config("exact", **changes), lab.home)


@pytest.fixture(scope="module")
def result(arms):
    return exact(arms, "sft", "reward", "ppo", "honest", "dpo", "longer", **SHORT, reward_model_prompts=2)


def rows(result):
    return {row.name: row for row in result.rows}


def test_the_reference_and_the_optimum_stand_at_the_ends(result):
    found = rows(result)
    sft, best = found["sft@v1"], found["optimum"]
    assert result.responses == LEAVES and result.prompts == 8 and result.reward_model_prompts == 2
    assert (sft.kl, sft.share) == (0.0, pytest.approx(0.0, abs=1e-6))
    assert best.share == pytest.approx(1.0, abs=1e-12) and best.gap == pytest.approx(0.0, abs=1e-12)
    for row in result.rows:
        assert row.objective == pytest.approx(row.reward - 0.5 * row.kl, abs=1e-12)
        if row.prompts == 8:
            # J* - J = beta KL(pi || pi*), the one computed from means and the other as a KL.
            assert best.objective - row.objective == pytest.approx(row.gap, abs=2e-6)
            assert row.gap_true.value == pytest.approx(row.gap, abs=1e-12)
        assert row.below_frontier > -1e-9
        assert len(row.per_prompt.gap) == row.prompts


def test_parts_of_the_gap(result):
    found = rows(result)
    ppo, honest, dpo = found["ppo@v1"], found["honest@v1"], found["dpo@v1"]
    assert ppo.optimisation_gap.reward == [(1.0, "reward@v1")] and ppo.optimisation_gap.prompts == 2
    assert honest.optimisation_gap.value == pytest.approx(honest.gap, abs=1e-12)
    assert dpo.disagreement.reward == [(1.0, "reward@v1")]
    assert ppo.gap_true_there.value == pytest.approx(sum(ppo.per_prompt.gap[:2]) / 2, abs=1e-12)
    assert dpo.optimisation_gap is None and ppo.disagreement is None
    assert found["reward@v1"].gap_true.value > 0.01  # a tiny reward model is not the truth
    assert found["reward@v1"].prompts == 2


def test_training_losses_are_set_against_the_best_on_the_same_data(result, arms):
    found = rows(result)
    short, longer = found["dpo@v1"].training_loss, found["longer@v1"].training_loss
    assert short.best == longer.best == "longer@v1" and longer.excess == 0.0
    assert short.excess == pytest.approx(short.training_loss - longer.training_loss, abs=1e-12)
    assert 0 < short.excess < 0.7
    alone = rows(exact(arms, "dpo", **SHORT))["dpo@v1"].training_loss
    assert alone.excess is None and alone.training_loss == pytest.approx(short.training_loss, abs=1e-9)
    named = rows(exact(arms, "dpo", **SHORT, long_run="longer"))["dpo@v1"].training_loss
    assert named.excess == pytest.approx(short.excess, abs=1e-9)


def test_a_long_run_that_dpo_has_not_trained_is_refused(arms, tmp_path):
    from rlhf_pipeline.registry.store import Registry

    plain = Registry(arms.home).export("longer", tmp_path / "plain")
    (plain / "manifest.json").unlink(missing_ok=True)
    for long_run, label in (("ppo", "ppo@v1"), (str(plain), str(plain))):
        with pytest.raises(ConfigError) as caught:
            exact(arms, "dpo", **SHORT, long_run=long_run)
        (fault,) = caught.value.faults
        assert (fault.where, fault.found) == ("long_run", f"{label} was not trained by `rlhf dpo`")
        assert fault.expected.startswith("a DPO model")


def test_the_optimum_under_a_reward_model_is_that_of_its_scores(arms, result):
    """Scores and reference by the plain way, one response at a time."""
    from rlhf_pipeline.data import world
    from rlhf_pipeline.data.batch import pack
    from rlhf_pipeline.data.tokenize import Example
    from rlhf_pipeline.registry.store import Registry
    from rlhf_pipeline.stages.common import load_policy, load_reward_model, tokenizer_of

    registry, config = Registry(arms.home), arms.config("exact")
    sft, reward = registry.resolve("sft"), registry.resolve("reward")
    policy = load_policy(sft, config, tokenizer_of(sft), torch.device("cpu"), frozen=True)
    scorer = load_reward_model(reward, config, torch.device("cpu"))
    tree = ResponseTree(32, 1, 2)
    completions = [tree.completion(leaf) for leaf in range(tree.num_leaves)]
    ended = tree.ended.tolist()
    gaps = []
    prompts = sorted(pair for pair, split in world.vocabulary.SPLITS.items() if split == "test")
    for pair in prompts:
        ids = world.encode(world.prompt_text(*pair))
        batch = pack([Example(ids, completions, ended, "p", "x")], layout="rows")
        with torch.no_grad():
            logprobs = batch.per_completion(policy(batch).logprobs.double())
            scores = scorer(batch).double()
        truth = torch.from_numpy(world.verdicts([ids] * len(completions), completions, ended).reward)
        gaps.append(0.5 * kl_divergence(optimum(logprobs, scores, 0.5), optimum(logprobs, truth, 0.5)))
    whole = rows(exact(arms, "reward", **SHORT, beta=0.5, reward_model_prompts=8))["reward@v1"]
    assert whole.gap_true.value == pytest.approx(sum(gaps) / 8, abs=1e-5)


def test_sampled_figures_agree_with_the_exact_ones(arms):
    changes = {"samples": 512, "split": "test", **SHORT}
    sampled = run_evaluate("longer", arms.config("evaluate", **changes), arms.home)["metrics"]
    row = rows(exact(arms, "longer", **SHORT))["longer@v1"]
    for name, figure in (("true_reward", "reward"), ("kl", "kl")):
        values = sampled[name]
        # 4 standard errors of 8 x 512 samples; the prompts are the same, so their spread is no part of it.
        assert abs(values.mean - getattr(row, figure)) < 0.15


def test_another_reward_for_the_objective(arms):
    found = rows(exact(arms, "sft", "ppo", **SHORT, reward="reward", reward_model_prompts=3))
    ppo = found["ppo@v1"]
    assert ppo.prompts == 3 and ppo.gap_true.prompts == 8
    assert ppo.gap == pytest.approx(ppo.optimisation_gap.value, abs=1e-12)


def test_scores_of_all_responses_are_kept_by_digest(arms, monkeypatch):
    from rlhf_pipeline.measure import leaves

    first = exact(arms, "reward", **SHORT, beta=0.5, reward_model_prompts=1)
    assert list((arms.home / "cache").glob("leaves-*.safetensors"))
    monkeypatch.setattr(leaves, "leaf_scores", None)  # asked for again it would fail
    assert exact(arms, "reward", **SHORT, beta=0.5, reward_model_prompts=1) == first
    with pytest.raises(TypeError):
        exact(arms, "reward", max_new_tokens=1, beta=0.5, reward_model_prompts=1)


def test_a_policy_above_the_frontier_is_an_error(arms, monkeypatch):
    monkeypatch.setattr(
        module.ExactBench, "frontier", lambda self, count: type("Low", (), {"bound": lambda s, kl: -9.0})()
    )
    with pytest.raises(RunFailed, match="above the exact frontier"):
        exact(arms, "dpo", **SHORT, max_prompts=3)


def test_what_a_ppo_model_was_trained_on(arms):
    registry = arms.registry
    assert trained_reward(registry, registry.resolve("ppo")) == ((1.0, "reward@v1"),)
    assert trained_reward(registry, registry.resolve("honest")) == ((1.0, "world"),)
    assert trained_reward(registry, registry.resolve("dpo")) is None


def test_beta_has_to_be_known(arms):
    with pytest.raises(ConfigError, match="--beta"):
        exact(arms, "sft", **SHORT)
    assert rows(exact(arms, "sft", **SHORT, beta=0.25))["optimum"].beta == 0.25


def test_too_many_responses_are_refused(arms):
    with pytest.raises(MismatchError, match="at most 5,000,000 can be enumerated"):
        exact(arms, "dpo", max_new_tokens=5)


def test_comparisons_carry_exact_figures(arms):
    config = arms.config("compare", name="exact", arms=["ppo", "dpo"], baseline="sft", samples=2, exact=True, **SHORT)
    found = compared(config, arms.home, quiet=True).exact
    assert [row.name for row in found.rows] == ["sft@v1", "ppo@v1", "dpo@v1", "optimum"]
    assert found.rows[1].optimisation_gap.prompts == 4


def dpo_model(**config):
    """A DPO model with these values of its config, as its manifest tells of it."""
    given = {
        "model_name_or_path": "sft",
        "dataset_name": "collected:pairs@v1",
        "output_name": "m",
        "beta": 0.5,
        **config,
    }
    reference, data = SimpleNamespace(digest="r"), SimpleNamespace(digest="d", source="collected:pairs@v1")
    made = {"parents": {"base": reference, "reference": reference}, "moves_optimum": None, "data": [data]}
    return SimpleNamespace(
        label="m@v1", config=given, method=None, manifest=SimpleNamespace(stage="dpo", config=given, **made)
    )


@pytest.mark.parametrize(
    ("config", "elsewhere"),
    [
        ({}, False),
        ({"loss_type": "sigmoid", "label_smoothing": 0.1}, False),  # beta on another scale
        ({"loss_type": "ipo"}, False),
        ({"loss_type": "robust", "label_smoothing": 0.1}, False),
        ({"loss_type": "plackett_luce"}, False),
        ({"loss_type": "hinge"}, True),
        ({"loss_type": "apo_zero"}, True),
        ({"loss_type": "kto"}, True),
        ({"loss_type": ["sigmoid", "hinge"]}, True),
        ({"loss_type": "of another release"}, True),
        ({"sft_weight": 0.1}, True),
        ({"f_divergence": "js"}, True),
        ({"weight_decay": 0.1}, True),
        ({"sync_ref_model": True}, True),
        ({"use_margin": True}, True),
        ({"ld_alpha": 0.5}, True),
    ],
)
def test_only_a_policy_that_aims_at_the_optimum_of_a_reward_can_disagree_with_it(config, elsewhere):
    given = {"loss_type": "sigmoid", **config}
    assert module._aims_elsewhere(dpo_model(**given)) is elsewhere


def test_a_model_with_another_optimum_has_no_disagreement(arms, result, monkeypatch):
    assert rows(result)["dpo@v1"].disagreement is not None
    monkeypatch.setattr(module, "own_moves", lambda manifest: {"sft_weight": 0.1})
    (row,) = [
        row for row in exact(arms, "reward", "longer", **SHORT, reward_model_prompts=1).rows if row.stage == "dpo"
    ]
    assert row.disagreement is None and row.gap_true is not None


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        ({"loss_type": ["sigmoid", "simpo"]}, {"simpo_gamma": 1.5}),
        ({"loss_type": ["sigmoid", "cpo"]}, {"cpo_alpha": 0.2}),
        ({}, {"beta": 0.1}),
        ({}, {"loss_type": "hinge"}),
        ({"loss_type": ["sigmoid", "hinge"]}, {"loss_weights": [1.0, 2.0]}),
        ({}, {"label_smoothing": 0.1}),
        ({}, {"sft_weight": 0.1}),
        ({"f_divergence": "alpha"}, {"f_alpha": 0.2}),
        ({}, {"f_divergence": "js"}),
        ({}, {"soft_labels": True}),
        ({}, {"use_margin": True}),
        ({}, {"max_train_samples": 8}),
    ],
)
def test_what_makes_two_losses_one_problem(config, changes):
    one = dpo_model(**config)
    assert problem_of(one) == problem_of(dpo_model(**config, learning_rate=1e-3, output_name="other"))
    assert problem_of(one) != problem_of(dpo_model(**config, **changes))


@pytest.mark.check
def test_an_arm_with_scaled_scores_is_measured_at_the_beta_that_they_amount_to(arms):
    arms.run("ppo", output_name="scaled", max_steps=1, reward_scale=4.0, kl_coef=1.0)
    (row, *_) = exact(arms, "scaled", **SHORT, reward_model_prompts=2).rows
    assert (row.name, row.beta) == ("scaled@v1", 0.25)
