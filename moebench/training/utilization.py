"""The peak of a device in dense matrix products, and the share of it that training reaches (MFU).

Model FLOPs utilization (PaLM, arXiv:2204.02311, appendix B): the FLOPs that the model needs for the tokens of a second
over those that the device can do. FLOPs count forward and backward pass, active experts alone, attention over the whole
sequence, and neither recomputed activations nor the optimizer.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from moebench.schema import TrainConfig
from moebench.tasks.task import Task
from moebench.training.model import Model, compute_model_cost

Kind = Literal["bf16", "tf32", "fp32"]
"""Precision of matrix products."""
BACKWARD_FACTOR = 3
"""FLOPs of a forward and a backward pass over those of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class DevicePeak:
    """FLOP/s of dense matrix products of a device, without structured sparsity; None: it has no such units."""

    bf16: float | None
    """With sums in fp32."""
    tf32: float | None
    fp32: float


def _teraflops(bf16: float | None, tf32: float | None, fp32: float) -> DevicePeak:
    return DevicePeak(bf16=bf16 and bf16 * 1e12, tf32=tf32 and tf32 * 1e12, fp32=fp32 * 1e12)


PEAKS: Sequence[tuple[str, DevicePeak]] = (
    # Data sheets of the maker; those of NVIDIA since Ampere state twice the dense values ("with sparsity"). The
    # bf16 values of H100, H200 and A100 were compared with a second source, the others were not.
    (r"\bGB200\b", _teraflops(2500, 1250, 80)),
    (r"\bB200\b", _teraflops(2250, 1125, 75)),  # NVIDIA HGX B200
    (r"\bH200 NVL\b", _teraflops(835.5, 417.5, 60)),
    (r"\b(H200|GH200)\b", _teraflops(989.4, 494.7, 66.9)),
    (r"\bH100 PCIe\b", _teraflops(756, 378, 51)),
    (r"\bH100 NVL\b", _teraflops(835.5, 417.5, 60)),
    (r"\bH100\b", _teraflops(989.4, 494.7, 66.9)),  # NVIDIA H100 white paper, table 2: SXM5
    (r"\bA100\b", _teraflops(312, 156, 19.5)),  # NVIDIA A100 white paper, table 1: SXM4 and PCIe
    (r"\bA40\b", _teraflops(149.7, 74.8, 37.4)),
    (r"\bA30\b", _teraflops(165, 82, 10.3)),
    (r"\bA10\b", _teraflops(125, 62.5, 31.2)),
    (r"\bL40S\b", _teraflops(362, 183, 91.6)),
    (r"\bL40\b", _teraflops(181.05, 90.5, 90.5)),  # NVIDIA L40 data sheet: 362.1 "with sparsity"
    (r"\bRTX A6000\b", _teraflops(154.8, 77.4, 38.7)),  # NVIDIA RTX A6000 data sheet: 309.7 "with sparsity"
    (r"\bL4\b", _teraflops(121, 60, 30.3)),
    (r"\bRTX 4090\b", _teraflops(165.2, 82.6, 82.6)),  # NVIDIA Ada white paper, appendix A
    (r"\bRTX 3090\b", _teraflops(71, 35.6, 35.6)),  # NVIDIA GA102 white paper, appendix A
    (r"\bV100-SXM2\b", _teraflops(None, None, 15.7)),
    (r"\bV100-PCIE\b", _teraflops(None, None, 14)),
    (r"\bT4\b", _teraflops(None, None, 8.1)),
    (r"\bMI300X\b", _teraflops(1307.4, 653.7, 163.4)),  # AMD Instinct MI300X data sheet
)
"""Pattern of the name that torch gives -> peak; the first that matches counts."""
PART_OF_A_DEVICE = re.compile(r"\bMIG\b")


def find_device_peak(name: str) -> DevicePeak | None:
    """Return the peak of the device that torch calls `name`; None: it is not known, or the device is a part of one."""
    if PART_OF_A_DEVICE.search(name):
        return None
    return next((peak for pattern, peak in PEAKS if re.search(pattern, name)), None)


def select_kind(train: TrainConfig) -> Kind:
    """Return the kind of most matrix products of a cell on a GPU."""
    if train.precision == "bf16":
        return "bf16"
    return "tf32" if train.tf32 else "fp32"


def find_peak_flops(train: TrainConfig, device: torch.device) -> float | None:
    """Return the FLOP/s that a device has for the products of a cell; None where that is not known: never a guess."""
    if device.type != "cuda":
        return None
    peak = find_device_peak(torch.cuda.get_device_name(device))
    rates = {} if peak is None else {"bf16": peak.bf16, "tf32": peak.tf32, "fp32": peak.fp32}
    return rates.get(select_kind(train))


def count_training_flops(model: Model, task: Task, executed: Mapping[str, float]) -> float:
    """Return the active FLOPs of the forward pass per token in training: all passes, and what only training computes.

    `executed`: metrics with `load/flops_per_token` as executed; without it, as planned.
    """
    planned = compute_model_cost(model, task.sequence_length, task.decoder_length)
    flops = executed.get("load/flops_per_token", planned.flops_per_token)
    return planned.train_passes * flops + planned.training_only_flops


def compute_mfu(forward_flops: float, tokens_per_s: float, peak_flops: float) -> float:
    """Return the MFU; `forward_flops`: of a token; `peak_flops`: FLOP/s of all devices that train together."""
    return BACKWARD_FACTOR * forward_flops * tokens_per_s / peak_flops
