"""A training step on a GPU: what the host waits for, the loss in chunks, TF32, recomputation, attention, MFU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, Watched, assert_same_runs, tiny_config, write_text
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from moebench.config import merge_settings
from moebench.models.attention import Attention, AttentionStyle
from moebench.models.positions import Rotary
from moebench.runs.journal import read_journal
from moebench.tasks.deferred_logits import DeferredLogits
from moebench.training.callback import CellCallback
from moebench.training.divergence import NonFiniteError
from moebench.training.model import prepare_task
from moebench.training.optimizer.clipping import clip_in_update
from moebench.training.precision import matrix_precision
from moebench.training.utilization import find_device_peak

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning"),
    # On a CPU alone: the norm of bf16 rows by fp32 weights has no fused kernel.
    pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def cell(text: Path, device: torch.device, **changes: Any) -> Any:
    """Return a cell whose steps between the first and the last are not logged."""
    train = {"device": device.type, "precision": "bf16", "log_every": 100, "eval_every": 100, "steps": 12}
    model = {"d_model": 32, "ffn_width": 64}
    layout = {"expert_width": 32}
    return tiny_config(text, **merge_settings({"train": train, "model": model, "layout": layout}, changes))


@contextmanager
def count_waits(device: torch.device, counted: list[str]) -> Iterator[None]:
    """Collect the warnings of torch for each operation that waits for the device, in steps 5 to 8."""
    begin, end = CellCallback.on_train_batch_start, CellCallback.on_train_batch_end
    catcher = warnings.catch_warnings(record=True)
    caught: list[Any] = []

    def start_step(callback: CellCallback, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == 4:
            caught.append(catcher.__enter__())
            warnings.simplefilter("always")
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("warn")
        begin(callback, trainer, module, batch, index)

    def end_step(callback: CellCallback, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        end(callback, trainer, module, outputs, batch, index)
        if index == 7:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            catcher.__exit__(None, None, None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CellCallback, "on_train_batch_start", start_step)
        patch.setattr(CellCallback, "on_train_batch_end", end_step)
        yield
    counted.extend(
        f"{warning.filename.rpartition('/moebench/')[2]}:{warning.lineno}"
        for warning in caught[0]
        if "called a synchronizing CUDA operation" in str(warning.message)
    )


@pytest.mark.parametrize("router", ["dense", "switch", "top_k", "loss_free", "gshard", "expert_choice", "soft_moe"])
def test_the_host_waits_for_nothing_in_a_step_that_is_not_logged(
    router: str, text: Path, device: torch.device, tmp_path: Path
) -> None:
    waits: list[str] = []
    with count_waits(device, waits):
        run = Run(cell(text, device, router=router, allow_noncausal=True), tmp_path)
        assert run() is not None
    assert waits == []


@pytest.mark.parametrize("changes", [{"spike_policy": "skip"}, {"optimizer": "muon"}], ids=["skip", "muon"])
def test_where_the_host_decides_it_waits_once(
    changes: dict[str, Any], text: Path, device: torch.device, tmp_path: Path
) -> None:
    waits: list[str] = []
    with count_waits(device, waits):
        assert Run(cell(text, device, router="switch", train=changes), tmp_path)() is not None
    assert len(waits) <= 4, waits  # four steps; waiting for an event is not counted


def test_a_run_of_steps_that_are_not_logged_resumes_bit_for_bit(
    text: Path, device: torch.device, tmp_path: Path
) -> None:
    config = cell(text, device, router="loss_free", train={"checkpoint_every": 4})
    complete, parts = Run(config, tmp_path / "whole"), Run(config, tmp_path / "parts")
    assert complete() is not None
    assert parts(stop_at=6) is None
    assert parts() is not None
    assert_same_runs(complete, parts)


class Spoiled(Watched):
    """Spoils the loss of the batch with a number, which batches carry in the first weight."""

    def train_batch(self, *args: Any, **kwargs: Any) -> Any:
        batch = super().train_batch(*args, **kwargs)
        batch.weight_BP[0, 0] = 1000 + self.numbers[-1]
        return batch

    def find_number(self, batch: Any) -> int:
        return int(batch.weight_BP[0, 0]) - 1000


@pytest.mark.parametrize("at", [5, 12])
def test_a_loss_that_is_not_finite_is_found_and_not_learnt(
    at: int, text: Path, device: torch.device, tmp_path: Path
) -> None:
    config = cell(text, device, router="loss_free", train={"checkpoint_every": 4})
    task = Spoiled(prepare_task(config, tmp_path), lambda loss_BP: loss_BP * float("nan"), at=at)
    run = Run(config, tmp_path, task=task)
    with pytest.raises(NonFiniteError, match=rf"loss is nan at step {at}; no update was made; batch {at - 1} of"):
        run()
    saved = run.checkpoint((at - 1) // 4 * 4)
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_clipping_in_the_update(value: float, device: torch.device) -> None:
    ended = []
    for in_update in (True, False):
        parameters = [torch.nn.Parameter(torch.full((64, 3), 0.5, device=device)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.linspace(-5, 5, 192, device=device).view(64, 3)
        optimizer = torch.optim.AdamW(parameters, fused=True, eps=0.1)
        if in_update:
            norm = clip_in_update(optimizer, parameters, 1.0, torch.tensor(value, device=device))
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        if in_update or value == value:
            optimizer.step()
        ended.append([norm, *parameters])
    for ours, theirs in zip(*ended, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def cross_entropy(device: torch.device, is_chunked: bool, is_bf16: bool, sizes: tuple[int, int, int]) -> list[Tensor]:
    """Return the loss of each token and the gradients of its mean."""
    num_tokens, vocab, width = sizes
    source = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(num_tokens, width, device=device, generator=source).requires_grad_()
    weight_VD = (torch.randn(vocab, width, device=device, generator=source) * width**-0.5).requires_grad_()
    target_T = torch.randint(vocab, (num_tokens,), device=device, generator=source)
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=is_bf16):
        if is_chunked:
            loss_T = DeferredLogits(x_TD, weight_VD, num_tokens * vocab // 5).compute_cross_entropy(target_T)
        else:
            logits_TV = functional.linear(x_TD, weight_VD).float()
            loss_T = functional.cross_entropy(logits_TV, target_T, reduction="none")
    return [loss_T.detach(), *torch.autograd.grad(loss_T.mean(), [x_TD, weight_VD])]


@pytest.mark.parametrize("is_bf16", [False, True], ids=["fp32", "bf16"])
def test_the_loss_in_chunks_is_that_of_all_logits(is_bf16: bool, device: torch.device) -> None:
    sizes = (300, 1001, 64)
    chunked, full = (cross_entropy(device, each, is_bf16, sizes) for each in (True, False))
    torch.testing.assert_close(
        chunked[0], full[0], rtol=1e-5, atol=4e-2 if is_bf16 else 1e-5
    )  # in bf16: one rounding of a logit
    for ours, theirs in zip(chunked[1:], full[1:], strict=True):
        assert (ours - theirs).norm() <= (1e-2 if is_bf16 else 1e-5) * theirs.norm()


def test_50k_words_and_16k_tokens_need_less_than_2_gb(device: torch.device) -> None:
    if device.type != "cuda":
        pytest.skip("measured on a GPU")
    source = torch.Generator(device).manual_seed(0)
    x_TD = torch.randn(16384, 1024, device=device, generator=source).requires_grad_()
    weight_VD = (torch.randn(50257, 1024, device=device, generator=source) / 32).requires_grad_()
    target_T = torch.randint(50257, (16384,), device=device, generator=source)
    for leaf in (x_TD, weight_VD):
        leaf.grad = torch.zeros_like(leaf)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss_T = DeferredLogits(x_TD, weight_VD).compute_cross_entropy(target_T)
    loss_T.mean().backward()
    used = torch.cuda.max_memory_allocated() - before
    print(f"linear cross-entropy: {used / 1e9:.2f} GB on top of inputs and gradients")
    assert used < 2e9


def test_a_cell_trains_in_chunks_recomputed_and_in_tf32(text: Path, device: torch.device, tmp_path: Path) -> None:
    losses = {}
    choices: dict[str, dict[str, Any]] = {
        "plain": {},
        "chunked": {"cross_entropy": "chunked"},
        "recompute": {"recompute": "blocks"},
        "tf32": {"tf32": True},
    }
    for name, train in choices.items():
        changes = {"train": {"precision": "fp32", **train}, "router": "top_k"}
        result = Run(cell(text, device, **changes), tmp_path / name)()
        assert result is not None
        losses[name] = result.metrics["bits_per_byte"]
    assert losses["recompute"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["chunked"] == pytest.approx(losses["plain"], rel=1e-3)
    assert losses["tf32"] == pytest.approx(losses["plain"], rel=2e-2)


def test_tf32_rounds_products(device: torch.device, text: Path) -> None:
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("needs a GPU with TF32")
    x = torch.randn(512, 512, device=device, generator=torch.Generator(device).manual_seed(0))
    exact = (x.double() @ x.double()).float()
    with matrix_precision(cell(text, device, train={"tf32": True}).train, device):
        rounded = x @ x
    assert (x @ x - exact).norm() < 1e-5 * exact.norm()
    assert 1e-5 * exact.norm() < (rounded - exact).norm() < 1e-2 * exact.norm()


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_causal_attention_in_bf16_is_flash_attention(num_kv_heads: int, device: torch.device) -> None:
    style = AttentionStyle(d_model=256, num_heads=4, num_kv_heads=num_kv_heads, rotary=Rotary(), out_scale=1.0)
    attention = Attention(style, causal=True)
    attention.init_weights(torch.Generator().manual_seed(0))
    attention.to(device)
    x_BLD = torch.randn(2, 128, 256, device=device, generator=torch.Generator(device).manual_seed(0)).requires_grad_()
    results = []
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        with torch.autocast(device.type, dtype=torch.bfloat16), sdpa_kernel(backend):  # it raises where it cannot be
            y_BLD = attention(x_BLD)
            (grad_BLD,) = torch.autograd.grad(y_BLD.float().square().sum(), x_BLD)
        results.append((y_BLD.float(), grad_BLD))
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).norm() <= 2e-2 * theirs.norm()


def test_steps_are_timed_by_the_device_and_mfu_is_recorded(text: Path, device: torch.device, tmp_path: Path) -> None:
    run = Run(cell(text, device, router="top_k", train={"log_every": 3}), tmp_path)
    result = run()
    assert result is not None
    durations = run.checkpoint(12)["callbacks"]["CellCallback"]["seconds"]
    assert len(durations) == 12
    assert all(duration > 0 for duration in durations)
    points, _ = read_journal(tmp_path / "journal.jsonl")
    logged = [point.metrics for point in points if "train/tokens_per_s" in point.metrics]
    is_known = device.type == "cuda" and find_device_peak(torch.cuda.get_device_name(device)) is not None
    assert [0 < metrics.get("train/mfu", 0.0) < 1 for metrics in logged] == [is_known] * len(logged)
    assert (0 < result.throughput.get("mfu", 0.0) < 1) == is_known
