"""MFU: the table of devices, the FLOPs of a step by hand, and where a run records it."""

from pathlib import Path

import pytest
import torch
from support.training_cases import Run, tiny_config, write_text

from moebench.runs.journal import read_journal
from moebench.training.model import build_model, prepare_task
from moebench.training.utilization import compute_mfu, count_training_flops, find_device_peak, find_peak_flops


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA L40", 181.05e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA GH200 480GB", 989.4e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_a_known_device_has_its_dense_peak(name: str, bf16: float) -> None:
    peak = find_device_peak(name)
    assert peak is not None
    assert peak.bf16 == bf16
    assert peak.tf32 == pytest.approx(bf16 / 2, rel=0.02)
    assert peak.fp32 < peak.tf32 * 1.01


@pytest.mark.parametrize("name", ["NVIDIA H20", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L4000", "a new one", ""])
def test_the_peak_of_another_device_is_not_guessed(name: str) -> None:
    assert find_device_peak(name) is None


def test_a_device_without_bf16_units_has_no_peak_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")
    rates = [
        find_peak_flops(tiny_config(Path("-"), train={"precision": precision}).train, torch.device("cuda", 0))
        for precision in ("bf16", "fp32")
    ]
    assert rates == [None, 15.7e12]


def test_a_step_needs_three_times_the_forward_flops(tmp_path: Path) -> None:
    config = tiny_config(write_text(tmp_path), router={"name": "thor"})  # two passes
    task = prepare_task(config, tmp_path)
    model = build_model(config, task)
    # Width 8, 2 blocks of attention (24 + 8 outputs, scores over 8 positions) and one expert 8 -> 8 -> 8, head of 257.
    forward = 2 * (2 * 8 * 32 + 4 * 8 * 8 + 2 * 2 * 8 * 8) + 2 * 8 * 257
    assert count_training_flops(model, task, {}) == 2 * forward
    assert count_training_flops(model, task, {"load/flops_per_token": 1000.0}) == 2000
    assert compute_mfu(1e9, 1e5, 1e15) == pytest.approx(0.3)


def test_journal_and_result_have_it_where_the_peak_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(write_text(tmp_path), train={"steps": 4, "eval_every": 4})
    unknown = Run(config, tmp_path / "unknown")
    result = unknown()
    assert result is not None
    assert "mfu" not in result.throughput
    monkeypatch.setattr("moebench.training.callback.find_peak_flops", lambda train, device: 1e10)
    known = Run(config, tmp_path / "known")
    result = known()
    assert result is not None
    flops = 3 * result.cost["train_flops_per_token"]
    assert result.throughput["mfu"] == pytest.approx(flops * result.throughput["tokens_per_s"] / 1e10)
    points, _ = read_journal(tmp_path / "known" / "journal.jsonl")
    steps = [point.metrics for point in points if "train/mfu" in point.metrics]
    assert len(steps) == 4
    for metrics in steps:
        ratio = metrics["train/mfu"] / metrics["train/tokens_per_s"]
        assert ratio == pytest.approx(3 * metrics["train/load/flops_per_token"] / 1e10)
