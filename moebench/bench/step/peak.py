"""The peak that the speed of a step is compared with: the device's, or the measured rate of a plain product."""

import statistics
from dataclasses import dataclass

import torch

from moebench.bench.timing import time_call
from moebench.schema import TrainConfig
from moebench.training.utilization import find_peak_flops, select_kind

MEASURED_WIDTH = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the factors of the plain product, by device: large enough for its full rate."""
NUM_REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s in matrix products of one kind."""

    flops: float
    kind: str
    is_measured: bool
    """Whether it is the rate of a plain product here; else the maker's figure."""

    def describe(self) -> str:
        """Return the peak as text."""
        source = "the measured rate of a plain product here" if self.is_measured else "the maker's dense peak"
        return f"{self.flops / 1e12:.4g} TFLOP/s in {self.kind}, {source}"


def find_peak(train: TrainConfig, device: torch.device) -> Peak:
    """Return the peak of a device for the products of a cell; measure it where the device is not known."""
    kind, flops = select_kind(train), find_peak_flops(train, device)
    if flops is not None:
        return Peak(flops=flops, kind=kind, is_measured=False)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    return Peak(flops=_measure_rate(device, dtype), kind=kind, is_measured=True)


def _measure_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a square product in the present number of threads, median of a few."""
    width = MEASURED_WIDTH.get(device.type, 1024)
    factor_XX = torch.randn(width, width, device=device).to(dtype)
    durations_s = [time_call(lambda: factor_XX @ factor_XX, device) for _ in range(1 + NUM_REPEATS)]
    return 2 * width**3 / statistics.median(durations_s[1:])
