"""Products in bfloat16 on a CPU: oneDNN keeps the code of few of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rlhf_pipeline.training.precision import has_fast_bf16

PROGRAM = """
import torch
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.training.accelerator import make_accelerator

make_accelerator(SftConfig(model_name_or_path="m", dataset_name="d", output_name="n", use_cpu=True, bf16=True))
weight = torch.ones(64, 64, dtype=torch.bfloat16)
for rows in [*range(500, 800), 500]:
    torch.ones(rows, 64, dtype=torch.bfloat16) @ weight
"""


@pytest.mark.check
@pytest.mark.skipif(not has_fast_bf16(use_cpu=True), reason="this CPU does not multiply bfloat16 by oneDNN")
@pytest.mark.parametrize(("given", "compiled"), [({}, 2), ({"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1024"}, 1)])
def test_a_product_is_forgotten_after_three_hundred_others_unless_the_user_keeps_more(given, compiled) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ONEDNN")}
    environment = clean | {"ONEDNN_VERBOSE": "profile_create"} | given
    ran = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    missed = [line for line in ran.stdout.splitlines() if "create:cache_miss" in line and ",500x64:64x64" in line]
    assert len(missed) == compiled
