"""Numbers of rows that are rounded up where a new one is expensive."""

from __future__ import annotations

import pytest
import torch

from rlhf_pipeline.algorithms.rows import product_dtype, rows_computed

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("rows", "computed"),
    [(0, 0), (1, 16), (16, 16), (17, 32), (256, 256), (257, 288), (512, 512), (513, 576), (1000, 1024), (1025, 1152)],
)
def test_there_are_eight_to_an_octave(rows, computed):
    assert rows_computed(rows, CPU, torch.bfloat16) == computed


def test_few_numbers_and_few_rows_too_many():
    found = [rows_computed(rows, CPU, torch.bfloat16) for rows in range(128, 4097)]
    assert len({*found}) == 5 * 8 + 1
    assert all(rows <= computed <= rows * 9 / 8 + 1 for rows, computed in zip(range(128, 4097), found, strict=True))


@pytest.mark.parametrize(("device", "dtype"), [(GPU, torch.bfloat16), (CPU, torch.float32), (CPU, torch.float64)])
def test_elsewhere_no_row_is_added(device, dtype):
    assert rows_computed(1001, device, dtype) == 1001


def test_the_type_of_a_product_is_that_of_autocast():
    assert product_dtype(CPU, torch.float32) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert product_dtype(CPU, torch.float32) == torch.bfloat16
        assert product_dtype(CPU, torch.float64) == torch.float64
