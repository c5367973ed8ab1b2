"""Where memory runs out, micro-batches are halved and the step is the same; where that does not help, the run ends."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_pipeline.cli.main import main
from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.models.memory import Memory, ran_out
from rlhf_pipeline.models.modules import ActorCritic, Policy, RewardModel
from rlhf_pipeline.training.cost import CostMeter
from rlhf_pipeline.training.windows import pieces

# A large epsilon keeps AdamW's step proportional to small gradients, so that weights show gradients as they are.
SETTINGS = {
    "adam_epsilon": 1e-1,
    "learning_rate": 1e-1,
    "max_grad_norm": 1.0,
    "max_steps": 3,
    "per_device_train_batch_size": 8,
}
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB"), CPU, MemoryError()]


class Limit:
    """Models that fit only so many completions at a time; `grad`: only while they are trained."""

    def __init__(self, monkeypatch, most: int, *, grad: bool = True, error: Exception = ERRORS[0]):
        self.most, self.refused, self.held = most, 0, []
        for kind in (Policy, RewardModel, ActorCritic):
            monkeypatch.setattr(kind, "forward", self.limited(kind.forward, grad, error))

    def limited(self, forward, grad, error):
        def run(module, batch: PackedBatch | None = None, **decode):
            if (torch.is_grad_enabled() if grad else batch is not None) and module.training:
                if batch.num_completions > self.most:
                    self.refused += 1
                    raise error
                self.held.append(batch.num_completions)
            return forward(module, batch, **decode) if batch is not None else forward(module, **decode)

        return run


VARIANTS = {
    "sft": ("sft", {}, 1),
    "train-rm": ("train-rm", {}, 2),
    "dpo": ("dpo", {}, 2),
    "dpo without a cache": ("dpo", {"precompute_ref_log_probs": False}, 2),
    "ppo": ("ppo", {"gradient_accumulation_steps": 1}, 1),
    "train-rm on rankings": ("train-rm", {"center_rewards_coefficient": 0.1}, 5),
    "dpo on rankings": ("dpo", {}, 5),
    "plackett-luce": ("dpo", {"loss_type": "plackett_luce"}, 5),
}


@pytest.fixture(scope="module", params=VARIANTS)
def unsplit(request, tiny, rankings, tmp_path_factory):
    """A stage run in whole micro-batches; and the settings, the completions of an example (at most)."""
    stage, changes, each = VARIANTS[request.param]
    if each == 5:
        ties = stage == "train-rm"
        changes |= {"dataset_name": rankings(ties=ties), "dataset_train_split": "all", "dataset_test_split": "all"}
    lab = tiny.copy(tmp_path_factory.mktemp("unsplit") / "home")
    return stage, {**SETTINGS, **changes}, each, lab, lab.run(stage, **SETTINGS, **changes)


def log_of(result) -> str:
    return (Path(result.run) / "log.txt").read_text()


def assert_same_run(lab, result, expected_lab, expected) -> None:
    found, wanted = lab.weights(result.model), expected_lab.weights(expected.model)
    assert all((found[name] - wanted[name]).abs().max() <= 1e-6 for name in wanted)
    rows, wanted = lab.rows(result.run), expected_lab.rows(expected.run)
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for name in wanted[0]:
        if name not in ("rewards/accuracies", "first_minibatch/ratio_error"):  # at step 1 margins are rounding
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in wanted], abs=2e-5), name
    for name in ("tokens_trained", "flops", "tokens_generated", "optimizer_steps"):
        if name in ("tokens_generated", "optimizer_steps") or "first_minibatch/ratio_error" not in rows[0]:
            assert result.cost[name] == expected.cost[name]


@pytest.mark.parametrize("examples", [4, 1])
def test_halved_micro_batches_take_the_same_step(unsplit, lab, monkeypatch, examples):
    stage, settings, each, whole, expected = unsplit
    limit = Limit(monkeypatch, examples * each)
    result = lab.run(stage, **settings)
    assert_same_run(lab, result, whole, expected)
    halvings = 1 if examples == 4 else 3
    if each < 5:  # rankings have two to five completions
        assert limit.refused == halvings and max(limit.held) == examples * each
    assert 1 <= limit.refused <= halvings
    log = log_of(result)
    assert log.count("out of memory in training: ") == limit.refused
    assert "halving 1 of 3" in log and "an optimizer step keeps its examples" in log
    assert "CUDA out of memory. Tried to allocate 20 MiB" in log
    if stage == "ppo":
        rows = lab.rows(result.run)
        assert max(row["first_minibatch/ratio_error"] for row in rows) <= 1e-5
        assert max(row["first_minibatch/clipfrac"] for row in rows) == 0


@pytest.mark.parametrize("error", ERRORS[1:], ids=["cpu", "python"])
def test_other_words_for_it(lab, tiny, monkeypatch, error):
    expected = lab.run("sft", output_name="whole", **SETTINGS)
    limit = Limit(monkeypatch, 4, error=error)
    assert_same_run(lab, lab.run("sft", **SETTINGS), lab, expected)
    assert limit.refused == 1


class InBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, slope):
        raise ERRORS[0]


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_what_a_failed_attempt_has_added_is_thrown_away(lab, monkeypatch, stage):
    """The second micro-batch of a window ends in the middle of its backward pass; the first one has left gradients."""
    kind = {"sft": Policy, "ppo": ActorCritic}[stage]
    changes = SETTINGS if stage == "ppo" else {**SETTINGS, "gradient_accumulation_steps": 2}
    changes = {**changes, "per_device_train_batch_size": 4}
    expected = lab.run(stage, output_name="whole", **changes)
    forward, calls = kind.forward, []

    def once(module, *args, **options):
        found = forward(module, *args, **options)
        if torch.is_grad_enabled() and module.training:
            calls.append(module)
            if len(calls) == 4:  # of update 2, or of the second window
                hidden = next(p for name, p in module.named_parameters() if "down_proj" in name)
                assert hidden.grad is not None and hidden.grad.abs().max() > 0
                found = type(found)(InBackward.apply(found.logprobs), found.entropy, found.values)
        return found

    monkeypatch.setattr(kind, "forward", once)
    result = lab.run(stage, **changes)
    assert "out of memory in training: 4 examples at a time do not fit" in log_of(result)
    assert_same_run(lab, result, lab, expected)


def test_after_three_halvings_the_run_ends(lab, monkeypatch, capsys, tmp_path):
    """3 examples fit, 32, 16, 8 and 4 do not: the command ends with 1 and says what to do."""
    config = lab.config("sft", **{**SETTINGS, "per_device_train_batch_size": 32})
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True)))
    limit = Limit(monkeypatch, 3)
    assert main(["--home", str(lab.home), "sft", "--config", str(tmp_path / "sft.yaml")]) == 1
    error = capsys.readouterr().err
    assert limit.refused == 4 and limit.held == []
    assert "error: out of memory in training: 4 examples at a time do not fit after 3 of 3 halvings" in error
    assert "gradient_checkpointing: true" in error and "Traceback" not in error
    assert not lab.registry.models.numbers("tuned")


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo", "ppo"])
def test_a_single_example_that_does_not_fit_ends_the_run(lab, monkeypatch, stage):
    limit = Limit(monkeypatch, 0)
    with pytest.raises(RunFailed, match="a single example does not fit after 1 of 3 halvings") as caught:
        lab.run(stage, **{**SETTINGS, "per_device_train_batch_size": 2})
    assert limit.refused == 2 and caught.value.exit_code == 1
    assert not lab.registry.models.numbers(lab.config(stage).output_name)


def test_scoring_in_ppo(lab, monkeypatch):
    """Scoring runs out first, so that the very micro-batches that are scored are the halved ones."""
    expected = lab.run("ppo", output_name="whole", **SETTINGS)
    limit = Limit(monkeypatch, 4, grad=False)
    result = lab.run("ppo", **SETTINGS)
    assert limit.refused == 1 and max(limit.held) == 4
    assert_same_run(lab, result, lab, expected)
    assert max(row["first_minibatch/ratio_error"] for row in lab.rows(result.run)) <= 1e-5


def test_sampling_in_ppo(lab, monkeypatch):
    expected = lab.run("ppo", output_name="whole", **SETTINGS)
    forward, sizes = ActorCritic.forward, []

    def limited(module, batch=None, **decode):
        if batch is None:
            if decode["input_ids"].shape[0] > 5:
                raise ERRORS[0]
            sizes.append(decode["input_ids"].shape[0])
        return forward(module, batch, **decode)

    monkeypatch.setattr(ActorCritic, "forward", limited)
    result = lab.run("ppo", **SETTINGS)
    assert max(sizes) <= 5
    assert log_of(result).count("out of memory in sampling: ") == 2  # 16, 8
    assert_same_run(lab, result, lab, expected)


@pytest.mark.parametrize("stage", ["sft", "train-rm", "dpo"])
def test_evaluation(lab, monkeypatch, stage):
    """Held-out examples and the reference of DPO are read in halved batches; the figures are the same."""
    changes = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 32}
    expected = lab.run(stage, output_name="whole", **changes)
    kind = RewardModel if stage == "train-rm" else Policy
    forward, refused = kind.forward, []

    def limited(module, batch):
        if not torch.is_grad_enabled() and batch.num_completions > 20:
            refused.append(batch)
            raise ERRORS[0]
        return forward(module, batch)

    monkeypatch.setattr(kind, "forward", limited)
    result = lab.run(stage, **changes)
    assert refused and "out of memory in evaluation: " in log_of(result)
    rows = lab.rows(result.run)
    assert any("eval_nll" in row or "eval_accuracy" in row for row in rows)
    for row, wanted in zip(rows, lab.rows(expected.run), strict=True):
        assert row == pytest.approx(wanted, abs=2e-5)


def test_a_resumed_run_goes_on_in_halves(lab, monkeypatch):
    """Bit-equal to one that was not stopped, also where the machine that goes on has more memory."""
    changes = {**SETTINGS, "save_steps": 1}
    with monkeypatch.context() as patch:
        Limit(patch, 4)
        expected = lab.run("sft", output_name="whole", **changes)
    with monkeypatch.context() as patch:
        limit, update = Limit(patch, 4), []
        monkeypatch.setattr(
            "rlhf_pipeline.training.session._agree_to_stop", lambda run: update.append(run) or die(update)
        )
        with pytest.raises(KeyError):
            lab.run("sft", **changes)
        assert limit.refused == 1
    monkeypatch.undo()
    result = lab.run("sft", **changes)
    assert "resumed at step 1" in log_of(result)
    found, wanted = lab.weights(result.model), lab.weights(expected.model)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def die(updates: list) -> None:
    if len(updates) == 2:
        raise KeyError("killed")


@pytest.mark.parametrize(
    ("count", "halvings", "sizes"),
    [(8, 0, [8]), (8, 1, [4, 4]), (7, 1, [4, 3]), (7, 2, [2, 2, 2, 1]), (5, 3, [1] * 5), (1, 3, [1]), (3, 1, [2, 1])],
)
def test_pieces(count, halvings, sizes):
    found = pieces(count, halvings)
    assert [piece.stop - piece.start for piece in found] == sizes
    assert [i for piece in found for i in range(count)[piece]] == list(range(count))


@pytest.mark.parametrize(
    ("error", "answer"),
    [(error, True) for error in ERRORS]
    + [
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
        (RunFailed("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, answer):
    assert ran_out(error) is answer


def test_another_error_is_not_repeated():
    calls = []

    def work(halvings):
        calls.append(halvings)
        raise RuntimeError("The size of tensor a must match")

    with pytest.raises(RuntimeError, match="size of tensor"):
        Memory().repeat("training", work)
    assert calls == [0]


def test_a_failed_attempt_holds_no_memory_and_is_not_on_the_bill():
    meter, told, held = CostMeter(flops=3.0), [], []
    memory = Memory(told.append, meter)
    memory.holds(8)

    def work(halvings):
        assert all(ref() is None for ref in held)  # nothing of the attempt before is alive
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        meter.flops += 10
        meter.tokens_trained += 1
        if halvings < 2:
            raise torch.OutOfMemoryError("full")
        return halvings

    assert memory.repeat("training", work) == 2
    assert (meter.flops, meter.tokens_trained) == (13.0, 1)
    assert [line.split("halving ")[1][:6] for line in told] == ["1 of 3", "2 of 3"]
    assert memory.halvings == {"training": 2}


def test_kinds_of_work_are_halved_apart():
    memory = Memory()
    sizes = []

    def work(size):
        sizes.append(size)
        if size > 3:
            raise MemoryError
        return size

    assert memory.shrink("evaluation", 10, work) == 3
    assert sizes == [10, 5, 3]
    assert memory.halvings == {"evaluation": 2}
    assert memory.shrink("sampling", 3, work) == 3
