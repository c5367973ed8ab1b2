"""What a run refuses of the machine."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.training.accelerator import make_accelerator


@pytest.mark.parametrize(("devices", "processes"), [(1, 2), (2, 3)])
def test_more_processes_than_gpus_are_refused(lab, monkeypatch, devices, processes):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(BadInput, match=rf"found {processes} processes on {devices} GPUs?, .*--num-processes {devices}"):
        make_accelerator(lab.config("dpo", use_cpu=False))
    make_accelerator(lab.config("dpo", use_cpu=True))  # the CPU is divided between any number
