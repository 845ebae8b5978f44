"""Products in panels, which hosts without AVX-512 run: right for each kind of weights, and the same bits everywhere."""

from typing import Any

import numpy as np
import pytest
import torch

from tracehaul.engine.cpu.compiling import compiled
from tracehaul.engine.cpu.linear import straight
from tracehaul.engine.cpu.panels import panelled
from tracehaul.engine.cpu.phases import FULL, PANEL_BYTES, PANEL_STEPS
from tracehaul.engine.weights import rounded

OUTPUTS, LENGTH = 70, PANEL_STEPS + 96
"""Neither whole runs of outputs nor one panel."""
ROWS = (1, 2, 3, 4, 6, 7, 50)
KINDS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0), torch.int8: np.int8(0)}


@compiled
def in_panels(w: int, scales: int, x: int, rows: int, out: int, panel: int, kind: Any) -> None:
    panelled(w, scales, x, LENGTH * 4, rows, OUTPUTS, LENGTH, out, OUTPUTS * 4, panel, FULL, kind)


@compiled
def in_rows(w: int, x: int, rows: int, out: int, panel: int) -> None:
    straight(w, 0, x, LENGTH * 4, rows, OUTPUTS, LENGTH, out, OUTPUTS * 4, panel, FULL, FULL)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def multiplied(weights: torch.Tensor, scales: torch.Tensor | None, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Some rows, and what the panels make of them."""
    x, out = random(rows, LENGTH), torch.full((rows, OUTPUTS), torch.nan)
    panel = torch.empty(PANEL_BYTES + rows * 1024, dtype=torch.uint8)
    at = 0 if scales is None else scales.data_ptr()
    in_panels(weights.data_ptr(), at, x.data_ptr(), rows, out.data_ptr(), panel.data_ptr(), KINDS[weights.dtype])
    return x, out


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_they_are_those_of_torch(dtype: torch.dtype) -> None:
    weights, scales = random(OUTPUTS, LENGTH).to(torch.bfloat16), None
    numbers = weights.double()
    if dtype == torch.int8:
        weights, scales = rounded(weights)
        assert scales is not None
        numbers = weights.double() * scales[:, None].double()
    for rows in ROWS:
        x, out = multiplied(weights.to(dtype), scales, rows)
        expected = x.double() @ numbers.T
        assert (out - expected).abs().max() < 1e-5 * expected.abs().max()


def test_their_bits_are_those_of_a_host_with_avx512_and_depend_on_no_other_row() -> None:
    weights = random(OUTPUTS, LENGTH)
    panel = torch.empty(64 * LENGTH, dtype=torch.uint8)
    for rows in ROWS:
        x, out = multiplied(weights, None, rows)
        other = torch.full_like(out, torch.nan)
        in_rows(weights.data_ptr(), x.data_ptr(), rows, other.data_ptr(), panel.data_ptr())
        assert torch.equal(out, other)
        assert torch.equal(multiplied(weights, None, 1)[1][0], out[0])
