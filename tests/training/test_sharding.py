"""Weights divided between two processes (FSDP2 over gloo): the steps of one process, and its checkpoints."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rlhf_pipeline.errors import BadInput, RunFailed
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.models.sharding import _layers, _own_parameters, _require_groups, whole
from rlhf_pipeline.training.ranks import together
from tests.conftest import TINY_LLAMA
from tests.once import once
from tests.two_processes import in_processes, run_of, run_stages, same

# 11 examples in windows of 4: of the last three, one process has two micro-batches and the other one.
SETTINGS = {
    "adam_epsilon": 1e-1,
    "learning_rate": 1e-1,
    "weight_decay": 0.1,
    "max_grad_norm": 1.0,
    "num_train_epochs": 2,
    "max_steps": None,
    "max_train_samples": 11,
    "gradient_accumulation_steps": 2,
}
LORA = {"use_peft": True, "lora_r": 3, "lora_alpha": 4, "lora_target_modules": ["q_proj", "v_proj"]}
# Two layers, head and embedding one weight, and sizes that two does not divide.
FRESH = {
    "model_name_or_path": None,
    "model_init": {**TINY_LLAMA, "num_hidden_layers": 2, "intermediate_size": 33, "tie_word_embeddings": True},
    "tokenizer_init": {"type": "world"},
    "dataset_name": "world:verdicts",
}
CHOSEN = {"reward_centering": "chosen"}
BEST = {"eval_steps": 2, "load_best_model_at_end": True}
STEPS = 6
SECOND = {"fsdp_reshard_after_forward": False}
RUNS = {
    "sft": ("sft", {**FRESH, "snapshot_steps": [3]}),
    "sft-lora": ("sft", LORA),
    "sft-packed": ("sft", {"packing": True, "gradient_checkpointing": True}),
    "train-rm": ("train-rm", {**CHOSEN, **BEST}),
    "train-rm-lora": ("train-rm", {**CHOSEN, **LORA, **BEST}),
    "dpo": ("dpo", {"precompute_ref_log_probs": False, "gradient_checkpointing": True}),
    "dpo-lora": ("dpo", {**LORA, "lora_target_modules": "all-linear", "precompute_ref_log_probs": False}),
    "dpo-saved": ("dpo", {"eval_steps": 3}),
    "kto": ("dpo", {"loss_type": "kto"}),
    **{f"sft-{name}": ("sft", {"optim": name}) for name in ("adamw_torch", "sgd")},
    **{f"sft-{name}": ("sft", {"optim": name, "optim_args": {"eps": 1e-1}}) for name in ("rmsprop", "adagrad")},
    "sft-lion": ("sft", {"optim": "lion", "learning_rate": 1e-2}),
}
# Compared with what those of another key do in one process.
KEPT = {f"{name}-zero2": name for name in ("sft-packed", "train-rm", "dpo")}
RUNS_OF_TWO = {**RUNS, **{kept: (RUNS[name][0], {**RUNS[name][1], **SECOND}) for kept, name in KEPT.items()}}
# Nothing is added up in another order: no accumulation, no clipping.
PLAIN = {"gradient_accumulation_steps": 1, "max_grad_norm": 0.0}
IN_16_BITS = {"autocast": ("sft", {"bf16": True, **PLAIN}), "stored": ("dpo", {"dtype": "bfloat16", **PLAIN})}
CUT = {name: RUNS[name] for name in ("sft", "dpo-lora", "train-rm")}

WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch.distributed as dist
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.errors import Interrupted, RunFailed
from rlhf_pipeline.models.sharding import is_part, local
from rlhf_pipeline.experiment.functions import stage_function
from rlhf_pipeline.training import session
from rlhf_pipeline.training.open_run import Run

home, runs = Path(sys.argv[1]), json.loads(sys.argv[2])
fit, placed = session.fit, Run.placed

def held(parameters):
    parameters = list(parameters)
    return [sum(local(one).numel() for one in parameters), sum(one.numel() for one in parameters)]

def counted(self, *models):
    placed(self, *models)
    if self.sharded:
        print("MODELS" + json.dumps([self.config.output_name, [held(model.parameters()) for model in models]]))

Run.placed = counted
gathers, gather = [0], dist.all_gather_single

def counted_gather(*given, **options):
    gathers[0] += 1
    return gather(*given, **options)

dist.all_gather_single = counted_gather

def stopping(at):
    def wrapped(model, windows, step, *, on_update, optimizer, **options):
        def full(*given):
            raise MemoryError("no room")

        if at == -2 and os.environ["RANK"] == "1":
            step = full

        def hook(done, metrics, window):
            if done == at and os.environ.get("RANK", "0") == "1":
                os.kill(os.getpid(), signal.SIGTERM)
            print("GATHERS" + json.dumps([os.environ["RUN"], *gathers]))
            on_update(done, metrics, window)
            gathers[0] = 0
            if done == 1 and all(map(is_part, model.parameters())):
                state = [one for kept in optimizer.state.values() for one in kept.values() if one.numel() > 1]
                print("STATE" + json.dumps([all(map(is_part, state)), *held(state)]))
        return fit(model, windows, step, on_update=hook, optimizer=optimizer, **options)
    return wrapped

for stage, values, stop_at in runs:
    os.environ["RUN"] = values["output_name"]
    session.fit = stopping(stop_at)
    try:
        stage_function(stage)(load_config(stage, None, extra=values).config, home, quiet=True)
    except Interrupted:
        assert stop_at > 0
    except RunFailed as error:
        assert stop_at < 0
        print("FAILED" + json.dumps(str(error)))
    else:
        assert not stop_at
"""


def run_in(lab, count: int, runs: list) -> list[str]:
    """Run (stage, config, step at which the second process gets a signal, 0, or -1 for a failure) in `count` ranks."""
    return run_stages(lab, count, WORKER, runs)


def told(output: str, what: str) -> list:
    """What a process has printed under a word."""
    return [json.loads(line.removeprefix(what)) for line in output.splitlines() if line.startswith(what)]


@pytest.fixture(scope="module")
def sharded(tiny, tmp_path_factory):
    """A home with runs of one process and of two that divide the weights, and the output of those."""

    def make(folder: Path) -> tuple:
        lab = tiny.copy(folder / "home")

        def run(
            name: str, count: int, of: tuple, stop_at: int = 0, *, begun: int | None = None, fsdp: bool = True
        ) -> tuple:
            stage, changes = of
            size = {"per_device_train_batch_size": 2 // (begun or count), "output_name": name, "fsdp": fsdp}
            if changes.get("packing"):
                size["max_train_samples"] = 23
            return stage, lab.config(stage, **{**SETTINGS, **changes, **size}), stop_at

        one = [run(f"{name}-1", 1, of) for name, of in RUNS.items()]
        run_in(lab, 1, one)
        two = [run(f"{name}-2", 2, of) for name, of in RUNS_OF_TWO.items()]
        two += [
            run(f"{name}-{kind}", 2, of, fsdp=kind == "2") for name, of in IN_16_BITS.items() for kind in ("2", "ddp")
        ]
        two += [run(f"{name}-cut-{then}", 2, of, 2) for name, of in CUT.items() for then in (1, 2)]
        wild = run("wild", 2, ("sft", {"learning_rate": 1e30, "max_grad_norm": 0.0}), -1)
        outputs = run_in(lab, 2, [*two, wild])
        run_in(lab, 1, [run(f"{name}-cut-1", 1, of, begun=2) for name, of in CUT.items()])
        run_in(lab, 2, [run(f"{name}-cut-2", 2, of) for name, of in CUT.items()])
        return lab, outputs

    return once(tmp_path_factory, "sharded", make)


slow = [pytest.mark.slow, pytest.mark.check]
each = pytest.mark.parametrize


class TestTwoProcesses:
    pytestmark = slow

    @each("name", RUNS_OF_TWO)
    def test_take_the_steps_of_one(self, sharded, name):
        lab, _ = sharded
        one = f"{KEPT.get(name, name)}-1"
        same(lab, f"{name}-2", one, within=2e-5)
        rows = lab.rows(run_of(lab, one))
        loss = next(key for key in rows[0] if key.startswith("loss/"))
        losses = [row[loss] for row in rows if loss in row]
        assert abs(losses[0] - losses[-1]) > 1e-3
        assert lab.registry.resolve(f"{name}-2").manifest.metrics["processes"] == 2

    def test_keep_snapshots(self, sharded):
        lab, _ = sharded
        found, expected = lab.weights("sft-2#3"), lab.weights("sft-1#3")
        assert found.keys() == expected.keys() and "lm_head.weight" not in found  # it is the embedding
        assert max(float((found[key] - expected[key]).abs().max()) for key in expected) <= 1e-5

    @each("name", IN_16_BITS)
    def test_compute_in_16_bits_as_with_whole_weights(self, sharded, name):
        lab, _ = sharded
        same(lab, f"{name}-2", f"{name}-ddp", but=("grad_norm", "weights/changed"), within=2e-5)  # of parts
        norms = [[row["grad_norm"] for row in lab.rows(run_of(lab, f"{name}-{kind}"))] for kind in ("2", "ddp")]
        assert norms[0] == pytest.approx(norms[1], rel=2**-7 if name == "stored" else 1e-5)  # in bfloat16

    def test_hold_about_half_of_every_model_and_its_state(self, sharded):
        _, outputs = sharded
        models = [dict(told(output, "MODELS")) for output in outputs]
        for name, (stage, _) in RUNS_OF_TWO.items():
            first, second = (found[f"{name}-2"] for found in models)
            assert len(first) == len(second) == (2 if stage == "dpo" else 1)  # the policy, the reference
            for (mine, total), (theirs, _) in zip(first, second, strict=True):
                assert mine + theirs == total and total > 1000
                assert 0.45 < mine / total < 0.55
        states = [told(output, "STATE") for output in outputs]
        assert len(states[0]) == len(states[1]) >= len(RUNS_OF_TWO) - 1  # sgd has none
        for (parts, mine, total), (_, theirs, _) in zip(*states, strict=True):
            assert parts and mine + theirs == total
            assert total == 0 or 0.35 < mine / total < 0.65

    @each(("name", "reference"), [("sft-packed", 0), ("train-rm", 0), ("dpo", 4)])
    def test_gather_half_as_often_if_weights_are_kept_until_the_backward_pass(self, sharded, name, reference):
        """A layer and the module around it, twice in each of two micro-batches, or once; the reference as before."""
        _, outputs = sharded
        for output in outputs:
            counts = [
                [count for of, count in told(output, "GATHERS") if of == run][1:]
                for run in (f"{name}-2", f"{name}-zero2-2")
            ]
            assert {*counts[0]} == {8 + reference} and {*counts[1]} == {4 + reference}

    @each("name", CUT)
    def test_their_checkpoint_is_resumed_by_one(self, sharded, name):
        lab, _ = sharded
        same(lab, f"{name}-cut-1", f"{name}-1", within=2e-5)
        log = (run_of(lab, f"{name}-cut-1") / "log.txt").read_text()
        assert f"resumed at step 2 of {STEPS}; it began in 2 processes" in log

    @each("name", CUT)
    def test_their_checkpoint_is_resumed_by_two_bit_for_bit(self, sharded, name):
        lab, _ = sharded
        found, expected = lab.weights(f"{name}-cut-2"), lab.weights(f"{name}-2")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        assert lab.rows(run_of(lab, f"{name}-cut-2")) == lab.rows(run_of(lab, f"{name}-2"))

    def test_both_stop_at_a_figure_that_is_not_finite(self, sharded):
        lab, outputs = sharded
        failures = [told(output, "FAILED") for output in outputs]
        assert [len(found) for found in failures] == [1, 1]
        assert "not finite" in failures[0][0]
        assert (run_of(lab, "wild") / "failure" / "failure.json").is_file()


@pytest.mark.slow
@pytest.mark.check
def test_a_process_without_memory_ends_and_the_other_with_it(tiny, tmp_path):
    lab = tiny.copy(tmp_path / "home")
    config = lab.config("sft", output_name="full", fsdp=True)
    codes, outputs = in_processes(2, WORKER, str(lab.home), json.dumps([("sft", config.model_dump(mode="json"), -2)]))
    (failure,) = told(outputs[1], "FAILED")
    assert failure.startswith(
        "out of memory in training: 8 examples at a time do not fit (several processes that share"
    )
    assert codes[1] == 0 and codes[0] not in (0, -signal.SIGKILL)  # it did not have to be killed


class Shared(nn.Module):
    """Two layers over one weight."""

    _no_split_modules = ("Linear",)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.layers[1].weight = self.layers[0].weight


def test_weights_that_cannot_be_divided_are_refused():
    with pytest.raises(BadInput, match="no list of decoder layers in Linear"):
        _layers(nn.Linear(2, 2))
    shared = Shared()
    assert len(_layers(shared)) == 2
    with pytest.raises(BadInput, match="weights that several layers of Shared share"):
        _require_groups(shared, _layers(shared))
    shared.layers[1] = nn.Linear(2, 2)
    _require_groups(shared, _layers(shared))
    shared.layers[1].bias.data = shared.layers[1].bias.data.to(torch.bfloat16)
    with pytest.raises(BadInput, match="trained weights in bfloat16 and float32 in one layer"):
        _require_groups(shared, _layers(shared))
    shared.layers[1].bias.requires_grad_(False)  # the weights below an adapter
    _require_groups(shared, _layers(shared))
    shared.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(BadInput, match="a weight without a dimension in Shared"):
        _require_groups(shared, _layers(shared))


def test_a_module_gets_parameters_of_its_own_over_the_same_memory():
    shared, other = Shared(), nn.Linear(2, 2)
    other.weight = shared.layers[0].weight
    _own_parameters(shared)
    assert shared.layers[0].weight is shared.layers[1].weight  # still tied
    assert shared.layers[0].weight is not other.weight
    assert shared.layers[0].weight.data_ptr() == other.weight.data_ptr()
    assert len(list(shared.parameters())) == 3 and len(dict(shared.named_parameters(remove_duplicate=False))) == 4


def test_whole_tensors_are_left_as_they_are():
    weight = torch.ones(2)
    assert whole({"a": weight, "b": weight}) == {"a": weight, "b": weight}


def test_a_process_without_memory_leaves_at_once_if_the_others_wait_within_a_pass():
    alone = SimpleNamespace(num_processes=2, process_index=1, device="cpu")  # cannot gather

    def work():
        raise RunFailed("out of memory")

    memory = Memory()
    memory.repeats = False
    with pytest.raises(RunFailed, match=r"^out of memory$") as failed:
        together(alone, memory, work)
    assert not failed.value.agreed
