"""How fast this machine trains and samples a model, measured in about a second on layers of the model's own sizes."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from rlhf_pipeline.config.stages import ModelConfig
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.experiment.work import Work
from rlhf_pipeline.models.loading import model_of_config
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.models.selfcheck import inspect_model
from rlhf_pipeline.rollout.sampler import pick, sample
from rlhf_pipeline.stages.common import onto
from rlhf_pipeline.training.cost import ModelShape
from rlhf_pipeline.training.precision import uses_bf16

FACTOR = 2
"""The estimate of a time is taken to be right up to this factor, either way."""
PASSES = 8
"""Reads and writes of each trained weight in an optimizer step: the gradient's norm, and weight, gradient and two
averages of AdamW."""
SMALL = 20_000_000  # weights of a layer, of which two are then measured; else one
VOCABULARY = 256
CONTEXT, STEPS, ROWS = 64, 4, 8
SECONDS = 0.04  # for each measurement, which is repeated at least twice


@dataclass(frozen=True)
class Speed:
    """The speed of one model on this machine.

    training, forward: FLOP/s with gradients and without. bytes_per_second: at which weights are read.
    decoding_step: seconds of a decoding step, without what each response of the batch adds. decoded_token: seconds that
    each response adds to a step.
    """

    device: str
    training: float
    forward: float
    bytes_per_second: float
    decoding_step: float
    decoded_token: float

    def seconds(self, work: Work) -> dict[str, float]:
        """The time of some work, by part.

        training    training FLOPs / rate + weight updates x 4 bytes x PASSES / bandwidth
        scoring     forward FLOPs / rate; evaluation likewise
        sampling    FLOPs of prompts / rate + decoding steps x seconds + tokens x seconds
        """
        updates = work.weight_updates * 4 * PASSES / self.bytes_per_second
        decoding = work.decoding_steps * self.decoding_step + work.tokens_sampled * self.decoded_token
        return {
            "training": work.training / self.training + updates,
            "scoring": work.scoring / self.forward,
            "sampling": work.prefill / self.forward + decoding,
            "evaluation": work.evaluation / self.forward,
        }

    def as_dict(self) -> dict[str, Any]:
        """The figures with their units."""
        return {
            "device": self.device,
            "training_gflop_per_second": self.training / 1e9,
            "forward_gflop_per_second": self.forward / 1e9,
            "memory_gb_per_second": self.bytes_per_second / 1e9,
            "decoding_step_seconds": self.decoding_step,
            "decoded_token_seconds": self.decoded_token,
            "uncertainty_factor": FACTOR,
        }


_known: dict[tuple[Any, ...], Speed] = {}


def speed_of(described: Any, config: ModelConfig) -> Speed:
    """The speed of a model with the precision, device and threads of a config; each is measured once in a process.

    Args:
        described: the transformers config of the model.
    """
    bf16 = uses_bf16(config)
    sizes = {name: value for name, value in described.to_dict().items() if name != "_name_or_path"}
    key = (json.dumps(sizes, sort_keys=True, default=str), config.dtype, bf16, config.use_cpu, config.num_threads)
    if key not in _known:
        with _threads(config.num_threads), torch.random.fork_rng():
            _known[key] = _measured(described, config, bf16)
    return _known[key]


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _few_layers(described: Any, layers: int) -> Any:
    """The config of a model of the same widths with few layers and a small vocabulary."""
    few = copy.deepcopy(described)
    for part in {id(part): part for part in (few, few.get_text_config())}.values():
        part.num_hidden_layers, part.vocab_size = layers, VOCABULARY
        part.pad_token_id = part.bos_token_id = part.eos_token_id = None
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[:layers]
    return few


def _measured(described: Any, config: ModelConfig, bf16: bool) -> Speed:
    text = described.get_text_config()
    with torch.device("meta"):
        whole = model_of_config(described)
    shape, count = ModelShape.of(whole), text.num_hidden_layers
    small = shape.matmul / count < SMALL
    layers = min(count, 2 if small else 1)
    device = torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")
    dtype = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    model = onto(device, model_of_config(_few_layers(described, layers), dtype=dtype))
    policy = Policy(model, inspect_model(model)).train()
    precision: Any = partial(torch.autocast, device.type, torch.bfloat16) if bf16 else nullcontext

    # 1. Forward and backward over trees of a prompt and two completions.
    example = Example([1] * CONTEXT, [[2] * 32, [3] * 32], [True, True], "", "")
    examples = [example] * (4 if small else 1)
    batch = pack(examples, layout=policy.reader.layout).to(device)
    own = ModelShape.of(model)

    def forward() -> Tensor:
        with precision():
            return policy(batch).logprobs.sum()

    parameters = list(model.parameters())
    passed = _time(lambda: torch.autograd.grad(forward(), parameters, allow_unused=True), device)
    trained = own.training_flops(*own.batch_counts(batch)) / passed
    policy.eval()
    with torch.no_grad():
        scored = own.batch_flops(batch) / _time(forward, device)

    # 2. Decoding steps of the layers, with one response and with several; then the head and the choice of a token.
    bandwidth = _bandwidth(device)
    alone, together = (_decoding_step(policy, rows, device, precision) / layers for rows in (1, ROWS))
    width, outputs = dtype.itemsize, text.vocab_size
    read = shape.matmul * width / bandwidth
    logits, uniforms = torch.zeros(ROWS, outputs, device=device), torch.full((ROWS,), 0.5, dtype=torch.float64)
    chosen = _time(lambda: pick(logits, uniforms.to(device)), device) / ROWS
    return Speed(
        device=device.type,
        training=trained,
        forward=scored,
        bytes_per_second=bandwidth,
        decoding_step=max(count * alone, read) + shape.head * width / bandwidth,
        decoded_token=count * max(0.0, together - alone) / (ROWS - 1) + 2 * shape.head / scored + chosen,
    )


def _decoding_step(policy: Policy, rows: int, device: torch.device, precision: Callable[[], Any]) -> float:
    """Seconds of one decoding step of the sampler with `rows` responses."""

    def drawn(steps: int) -> None:
        uniforms = torch.full((rows, steps), 0.5, dtype=torch.float64)
        read: dict[str, Any] = {"device": device, "cache_config": policy.model.config}
        with precision():
            sample(policy, [[1] * CONTEXT] * rows, uniforms, stop_ids=(), **read)

    short, long = (_time(partial(drawn, steps), device) for steps in (1, 1 + STEPS))
    return max(long - short, 1e-9) / STEPS


@cache
def _bandwidth(device: torch.device) -> float:
    """Bytes per second at which a matrix that no cache holds is read: 64 MB in fp32."""
    matrix = torch.ones(4096, 4096, device=device)
    vector = torch.ones(4096, device=device)
    return matrix.numel() * 4 / _time(lambda: torch.mv(matrix, vector), device)


def _time(work: Callable[[], Any], device: torch.device) -> float:
    """The least seconds of a few repetitions after a first one: those of a machine that does nothing else."""
    _waited(work, device)
    found: list[float] = []
    while len(found) < 3 or (len(found) < 9 and sum(found) < SECONDS):
        found.append(_waited(work, device))
    return min(found)


def _waited(work: Callable[[], Any], device: torch.device) -> float:
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
