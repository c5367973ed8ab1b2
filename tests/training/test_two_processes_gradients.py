"""Two processes (gloo) of which each has used other parameters: every gradient is added up, in the same few calls."""

from __future__ import annotations

import json

import pytest
import torch

from rlhf_pipeline.training.ranks import BUCKET_BYTES, buckets
from tests.two_processes import in_two_processes

# Each process r has the losses of its own examples x: first . x where r = 0, both . x, last . x where r = 1.
WORKER = """
import json, os, sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from rlhf_pipeline.training import ranks
from rlhf_pipeline.training.loop import fit
from rlhf_pipeline.training.windows import Loss, Window

rank, most = int(os.environ["RANK"]), int(sys.argv[1])
names = ("first", "both", "exact", "grid", "last", "nobody")

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.ones(2)))
        self.exact = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.grid = nn.Parameter(torch.ones(3, 2).T)  # columns lie together
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)

    def forward(self, x):
        own = self.last if rank else self.first
        grid = (self.grid * torch.arange(6.0).reshape(2, 3)).sum()
        return ((own + self.both + self.exact.float()) * x).sum() + grid

def step(model, x):
    return Loss({"line": (model(x), "examples", 1.0)}, {})

class Schedule:
    def step(self): pass
    def get_last_lr(self): return [1.0]

cut = ranks.buckets
ranks.buckets = lambda gradients: cut(gradients, most)
calls = []
add = dist.all_reduce
def counted(tensor, *args, **options):
    calls.append(tensor.numel())
    return add(tensor, *args, **options)

accelerator = Accelerator(cpu=True)
model = accelerator.prepare(Model())
clip = accelerator.clip_grad_norm_
def seen(parameters, most):
    dist.all_reduce = add
    return clip(parameters, most)
accelerator.clip_grad_norm_ = seen
together = ranks.Ranks.add_gradients
def watched(self, parameters):
    dist.all_reduce = counted
    together(self, parameters)
ranks.Ranks.add_gradients = watched

batches = [torch.tensor([1.0, 2.0]) * 10**rank, torch.tensor([3.0, 4.0]) * 10**rank]
fit(model, [Window(batches, {"examples": 1.0})], step, optimizer=torch.optim.SGD(model.parameters(), lr=1.0),
    scheduler=Schedule(), accelerator=accelerator, max_grad_norm=0.0, on_update=lambda *args: None)
found = dict(model.module.named_parameters())
print("FOUND" + json.dumps({
    "weights": {name: value.tolist() for name, value in found.items()},
    "none": [name for name, value in found.items() if value.grad is None],
    "calls": calls,
}))
dist.destroy_process_group()
"""


def in_two(most: int) -> list[dict]:
    """What both processes have after one step, with buckets of `most` bytes."""
    codes, outputs = in_two_processes(WORKER, str(most))
    assert codes == [0, 0], "\n".join(outputs)
    return [json.loads(output.partition("FOUND")[2]) for output in outputs]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("most", "calls"),
    [
        (BUCKET_BYTES, [6, 2 + 2 + 6 + 2, 2]),  # which ones; those of four bytes; those of eight
        (16, [6, 2 + 2, 2, 6, 2]),  # the grid does not fit beside another
        (1, [6, 2, 2, 2, 6, 2]),
    ],
    ids=["one", "several", "each"],
)
def test_parameters_that_one_process_alone_has_used(most, calls):
    """Slopes by hand: of the first process 1 + 3, 2 + 4; of the second ten times that; of both the sum."""
    ours, theirs = in_two(most)
    assert ours == theirs
    assert ours["weights"] == {
        "first": [1 - 4, 1 - 6],
        "both": [1 - 44, 1 - 66],
        "exact": [1 - 44, 1 - 66],
        "grid": [[1 - 4 * 0, 1 - 4 * 1, 1 - 4 * 2], [1 - 4 * 3, 1 - 4 * 4, 1 - 4 * 5]],
        "last": [1 - 40, 1 - 60],
        "nobody": [1, 1],
        "frozen": [1, 1],
    }
    assert sorted(ours["none"]) == ["frozen", "nobody"]  # an optimizer that decays weights leaves them alone
    assert sorted(ours["calls"]) == sorted(calls)


def test_buckets_by_hand():
    """Sizes of 8, 8, 16 (another dtype), 8, 40, 8 and 0 bytes into buckets of 16."""
    a, b, d, e, f = (torch.zeros(size) for size in (2, 2, 2, 10, 2))
    c, g = torch.zeros(2, dtype=torch.float64), torch.zeros(0)
    found = [[id(one) for one in bucket] for bucket in buckets([a, b, c, d, e, f, g], 16)]
    assert found == [[id(one) for one in bucket] for bucket in ([a, b], [c], [d], [e], [f, g])]
    assert buckets([]) == []
