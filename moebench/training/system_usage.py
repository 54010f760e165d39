"""How much of the machine a process uses, for the system metrics of a run; no result depends on it."""

import contextlib

import psutil
import torch

GIB = 2**30


class SystemUsage:
    """Measures this process, and its GPU if it has one; never raises and never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._process = psutil.Process()
        self._process.cpu_percent()  # the first call starts the interval

    def measure(self) -> dict[str, float]:
        """Return the metrics `system/...`, CPU time as a mean since the last call; what cannot be read is left out."""
        metrics: dict[str, float] = {}
        with contextlib.suppress(psutil.Error, OSError):
            metrics["system/cpu_percent"] = self._process.cpu_percent()
            metrics["system/memory_gib"] = self._process.memory_info().rss / GIB
            metrics["system/machine_memory_percent"] = psutil.virtual_memory().percent
        if self.device.type == "cuda":
            metrics["system/gpu_memory_gib"] = torch.cuda.memory_reserved(self.device) / GIB
            # Without nvidia-ml-py, or a driver that answers it, there is no number.
            with contextlib.suppress(Exception):
                metrics["system/gpu_percent"] = float(torch.cuda.utilization(self.device))
        return metrics
