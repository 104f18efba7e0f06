"""What the tests of kernels share: where they run, and random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

import interpreter

__all__ = ["DTYPES", "ON_CPU", "ON_CUDA", "Allow", "assert_close", "randn"]

Allow = Callable[[Iterable[Tensor]], None]
"""Says which tensors kernels find by addresses in others."""


# Triton is a compiler or an interpreter for as long as a process lives.
ON_CPU = [pytest.mark.skipif(not interpreter.is_chosen(), reason="Triton is no interpreter here")]
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def randn(
    *shape: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Equal but for rounding, of the largest number; places that were poisoned were to stay so."""
    actual, expected = actual.double().cpu(), expected.double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    largest = float(expected.nan_to_num().abs().max())
    assert float((actual - expected).nan_to_num().abs().max()) <= TOLERANCE[dtype] * largest
