"""Communication between the processes of a run within an optimizer step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.models.memory import Memory
from rlhf_pipeline.training.finite import NotFinite

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")
# The size of DDP's own buckets: few calls, and two buckets take little memory compared with the gradients.
BUCKET_BYTES = 25 * 2**20


def of_the_first(accelerator: Accelerator, value: T) -> T:
    """The value that the first process has, so that all processes decide alike; every process must call it."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    shared = [value]
    broadcast_object_list(shared)
    return shared[0]


class Ranks:
    """The processes of a run, for the training loop.

    Under DDP gradients are added up after the last micro-batch of a window, not within its backward pass. Until then no
    process waits for another, so a process that runs out of memory can repeat its share alone. Divided weights
    (models/sharding.py) are gathered, and their gradients added up, within each pass.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module):
        self.accelerator, self.model = accelerator, model
        self.count = accelerator.num_processes
        self.alone = self.count == 1 or isinstance(model, DistributedDataParallel)

    def accumulating(self, last: bool = False) -> contextlib.AbstractContextManager:
        """A context for the forward and backward pass of a micro-batch, without communication if possible."""
        if isinstance(self.model, DistributedDataParallel):
            return self.model.no_sync()  # accelerate's is no context at all in a single process
        return self.accelerator.no_sync(self.model) if self.alone or not last else contextlib.nullcontext()

    def even(self, micro_batches: list[Any]) -> list[Any]:
        """The micro-batches of a window, behind stand-ins of weight 0 up to the largest number of any process.

        With divided weights all processes must make the same number of passes, of the same kind: only the first
        micro-batches, which may be those of a pretraining stream, can differ in number.
        """
        if self.alone:
            return micro_batches
        mine = torch.tensor([len(micro_batches)], device=self.accelerator.device)
        missing = int(self.accelerator.gather(mine).max()) - len(micro_batches)
        return [replace(micro_batches[0].part(slice(0, 1)), weight=0.0) for _ in range(missing)] + micro_batches

    def reduce(self, values: Tensor) -> Tensor:
        """Sums over all processes."""
        return self.accelerator.reduce(values, "sum") if self.count > 1 else values

    def agreed(self, failure: NotFinite) -> RunFailed:
        """The error for a failure on every process; a process that knows the bad rows reports them."""
        if self.count == 1:
            return failure
        mine = torch.tensor([float(bool(failure.rows))], device=self.accelerator.device)
        return _agreed(self.accelerator, failure, int(self.accelerator.gather(mine).argmax()))

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes: g = g_1 + ... + g_n, with 0 for a missing gradient.

        A parameter without a gradient on any process keeps none. The processes first agree on the parameters, so that
        all make the same calls, whichever parameters their own examples have used.
        """
        if self.count == 1 or not self.alone:
            return
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        mine = [int(parameter.grad is not None) for parameter in trained]
        held = torch.tensor(mine, dtype=torch.int32, device=self.accelerator.device)
        dist.all_reduce(held, dist.ReduceOp.MAX)
        gradients: list[Tensor] = []
        for parameter, some in zip(trained, held.tolist(), strict=True):
            if not some:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        begun: list[Callable[[], None]] = []
        for bucket in buckets(gradients):
            begun.append(_begin_sum(bucket))
            if len(begun) > 1:  # a bucket is sent while the next one is filled
                begun.pop(0)()
        for finish in begun:
            finish()


def buckets(gradients: Iterable[Tensor], most: int = BUCKET_BYTES) -> list[list[Tensor]]:
    """Gradients in their order, cut by dtype into buckets of at most `most` bytes; a larger one has its own bucket."""
    found: list[list[Tensor]] = []
    filling: dict[torch.dtype, tuple[list[Tensor], int]] = {}
    for gradient in gradients:
        size = gradient.numel() * gradient.element_size()
        bucket, held = filling.get(gradient.dtype, ([], 0))
        if not bucket or held + size > most:
            bucket, held = [], 0
            found.append(bucket)
        bucket.append(gradient)
        filling[gradient.dtype] = bucket, held + size
    return found


def _begin_sum(bucket: Sequence[Tensor]) -> Callable[[], None]:
    """Start to add up a bucket over all processes; the returned function waits and writes the sums back."""
    in_place = len(bucket) == 1 and bucket[0].is_contiguous()
    flat = bucket[0] if in_place else torch.cat([gradient.reshape(-1) for gradient in bucket])
    handle = dist.all_reduce(flat, async_op=True)

    def finish() -> None:
        handle.wait()
        if not in_place:
            for gradient, found in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
                gradient.copy_(found.view(gradient.shape))

    return finish


def together(accelerator: Accelerator, memory: Memory, work: Callable[[], T]) -> T:
    """Run work() on every process; a failure or a halving on one process applies to all.

    With divided weights, a process that runs out of memory leaves at once: the others wait for it within a pass, and
    end when it has ended.

    Raises:
        RunFailed: work() failed on a process; the first such process reports its cause, and the others report that
            another process has failed.
    """
    if accelerator.num_processes == 1:
        return work()
    failure: RunFailed | None = None
    try:
        result = work()
    except RunFailed as error:
        if not (memory.repeats or isinstance(error, NotFinite)):
            raise
        failure = error
    times = memory.halvings.get("training", 0)
    mine = torch.tensor([[float(failure is not None), float(times)]], device=accelerator.device)
    failed, halvings = accelerator.gather(mine).unbind(1)
    memory.halvings["training"] = int(halvings.max())
    if not bool(failed.any()):
        return result
    raise _agreed(accelerator, failure, int(failed.argmax()))


def _agreed(accelerator: Accelerator, failure: RunFailed | None, first: int) -> RunFailed:
    if failure is None or first != accelerator.process_index:
        failure = RunFailed(f"process {first} of this run has failed; see its message")
        failure.elsewhere = True
    failure.agreed = True
    return failure
