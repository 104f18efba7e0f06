"""Tests of kernels run on a CUDA device, and where there is none under Triton's interpreter."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import interpreter
from interpreter import Launches
from kernel_fixtures import ON_CPU, ON_CUDA, Allow

if importlib.util.find_spec("triton") is None:  # it is made for Linux
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(
    params=[pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=ON_CUDA)],
)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where kernels run; they compute in float32 what is float32."""
    if request.param == "cuda":
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def launches(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Launches | None:
    """Those of the interpreter; None on a GPU."""
    return interpreter.install(monkeypatch) if device.type == "cpu" else None


@pytest.fixture
def allow(launches: Launches | None) -> Allow:
    """Nothing has to be allowed on a GPU."""
    return launches.allow if launches is not None else lambda tensors: None
