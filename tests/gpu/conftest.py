"""The device of these tests: CUDA, or the value of MOEBENCH_TEST_DEVICE (`cpu` tries the tests themselves)."""

import os

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    name = os.environ.get("MOEBENCH_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return torch.device(name)
