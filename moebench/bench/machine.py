"""The machine that a benchmark runs on: choose the device, prepare the process, describe both."""

from typing import Any

import torch

from moebench.allocator import keep_freed_memory
from moebench.bench.layer.peers.register import list_versions
from moebench.bench.layer.variants import has_bf16_units
from moebench.cores import available_cores
from moebench.errors import UsageError, build_unknown_error
from moebench.routing.kernels.backend import require_kernels
from moebench.runs.environment import collect_environment

DEVICES = ("auto", "cpu", "cuda")
KEPT = {"keep": "keeps freed memory", "training": "keeps freed memory up to 32 MB a block"}
"""Choices of `--allocator` that keep freed memory, and how a description of the machine names them."""
ALLOCATORS = (*KEPT, "default")


def choose_device(name: str) -> torch.device:
    """Return the device named by an option; raise UsageError when there is no such device."""
    if name not in DEVICES:
        raise build_unknown_error("--device", name, DEVICES)
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device: 'cuda' was given, but torch finds no CUDA device (allowed: auto, cpu)")
    on_gpu = name != "cpu" and torch.cuda.is_available()
    require_kernels(on_gpu=on_gpu)
    if not on_gpu:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())  # lightning needs the index


def prepare_machine(*, threads: int | None, allocator: str, device: torch.device) -> dict[str, Any]:
    """Set threads and allocator of this process; return a JSON-ready description of the machine."""
    if allocator not in ALLOCATORS:
        raise build_unknown_error("--allocator", allocator, ALLOCATORS)
    torch.set_num_threads(threads or available_cores())
    keeps_memory = allocator != "default" and keep_freed_memory(all_blocks=allocator == "keep")
    return collect_environment(torch.get_num_threads()) | {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "allocator": KEPT[allocator] if keeps_memory else "default",
        "bf16_units": has_bf16_units(device),
        "peers": list_versions(),
    }


def describe_machine(machine: dict[str, Any]) -> str:
    """Return the description of the machine as one line."""
    name = machine["device"] if machine["device"] != "cpu" else machine["processor"]
    return (
        f"{name}, {machine['threads']} threads on {machine['cores']} cores, torch {machine['torch']},"
        f" allocator: {machine['allocator']}"
    )
