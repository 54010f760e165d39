"""System metrics of a process."""

import psutil
import pytest
import torch

from moebench.metrics import find_metric
from moebench.training.system_usage import SystemUsage


def test_cpu_and_memory_are_measured_under_declared_names() -> None:
    metrics = SystemUsage(torch.device("cpu")).measure()
    assert set(metrics) == {"system/cpu_percent", "system/memory_gib", "system/machine_memory_percent"}
    assert 0.01 < metrics["system/memory_gib"] < 100
    assert all(find_metric(name) for name in metrics)


def test_what_cannot_be_read_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SystemUsage(torch.device("cpu"))

    def refuse(self: psutil.Process) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(psutil.Process, "memory_info", refuse)
    assert set(usage.measure()) == {"system/cpu_percent"}
