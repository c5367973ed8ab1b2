"""A signal to one of several processes: all stop after the same update, whenever it comes."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import torch

from rlhf_pipeline.training.session import _agree_to_stop


def test_a_signal_that_comes_while_the_processes_agree_is_not_lost() -> None:
    run = SimpleNamespace(stopped_by=None, device="cpu")

    def gather(mine: torch.Tensor) -> torch.Tensor:
        run.stopped_by = int(signal.SIGTERM)  # behind the reading of `mine`
        return torch.cat([mine, torch.zeros_like(mine)])

    run.accelerator = SimpleNamespace(num_processes=2, gather=gather)
    assert _agree_to_stop(run) is None  # the other process goes on, so this one must too
    assert _agree_to_stop(run) == signal.SIGTERM
