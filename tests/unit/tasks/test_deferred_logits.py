"""The loss of logits that are never held as a whole: values, gradients, memory, and whole cells that train with it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, Watched, tiny_config, write_text
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moebench.tasks.deferred_logits import DeferredLogits, compute_log_z
from moebench.training.model import build_model, prepare_task

BATCH, LENGTH, WIDTH, VOCAB = 3, 11, 8, 53
SOME_TOKENS = 7
"""Of a chunk: the 33 tokens are not a multiple of it."""


def draw_logits() -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    x_BLD = torch.randn(BATCH, LENGTH, WIDTH, generator=source)
    weight_VD = torch.randn(VOCAB, WIDTH, generator=source)
    return x_BLD, weight_VD, torch.randint(VOCAB, (BATCH, LENGTH), generator=source)


def compute_plain(x_BLD: Tensor, weight_VD: Tensor, target_BL: Tensor) -> tuple[Tensor, Tensor]:
    logits_BLV = functional.linear(x_BLD, weight_VD).float()
    loss_T = functional.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), reduction="none")
    return loss_T.view_as(target_BL), logits_BLV.logsumexp(-1)


def compute_chunked(x_BLD: Tensor, weight_VD: Tensor, target_BL: Tensor) -> tuple[Tensor, Tensor]:
    logits = DeferredLogits(x_BLD, weight_VD, VOCAB * SOME_TOKENS)
    return logits.compute_cross_entropy(target_BL), logits.compute_log_z()


def differentiate(
    compute: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]], *, is_bf16: bool = False, z_loss: float = 0.1
) -> list[Tensor]:
    """Return loss, log Z and the gradients of an unevenly weighted loss with a z-loss."""
    x_BLD, weight_VD, target_BL = draw_logits()
    x_BLD.requires_grad_()
    weight_VD.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bf16):
        loss_BL, log_z_BL = compute(x_BLD, weight_VD, target_BL)
        count_BL = torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) % 3  # some are not counted
        total = (count_BL * loss_BL).sum() / count_BL.sum() + z_loss * log_z_BL.square().mean()
    return [loss_BL.detach(), log_z_BL.detach(), *torch.autograd.grad(total, [x_BLD, weight_VD])]


def test_it_is_the_loss_of_all_logits_and_so_are_its_gradients() -> None:
    for ours, theirs in zip(differentiate(compute_chunked), differentiate(compute_plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_under_autocast_products_are_in_bf16_and_sums_in_fp32() -> None:
    chunked, plain = (differentiate(compute, is_bf16=True) for compute in (compute_chunked, compute_plain))
    exact = differentiate(compute_plain)
    for ours, theirs in zip(chunked[:2], plain[:2], strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # of the same bf16 logits
    for ours, theirs, fp32 in zip(chunked[2:], plain[2:], exact[2:], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - fp32).norm() <= 1.1 * (theirs - fp32).norm() <= 0.02 * fp32.norm()


def test_it_is_torchs_own_where_that_exists() -> None:
    theirs: Any = getattr(functional, "linear_cross_entropy", None)
    if theirs is None:
        pytest.skip(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=SOME_TOKENS)

    def compute(x_BLD: Tensor, weight_VD: Tensor, target_BL: Tensor) -> tuple[Tensor, Tensor]:
        target_T = target_BL.flatten()
        loss_T = theirs(x_BLD.flatten(0, 1), weight_VD, target_T, reduction="none", options=options)
        return loss_T.view_as(target_BL), torch.zeros(())

    both = (differentiate(each, z_loss=0.0) for each in (compute_chunked, compute))
    for index, (ours, reference) in enumerate(zip(*both, strict=True)):
        if index != 1:  # it has no log Z
            torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-5)


def test_log_z_and_the_most_likely_token_without_a_target() -> None:
    x_BLD, weight_VD, _ = draw_logits()
    logits_BLV = functional.linear(x_BLD, weight_VD)
    deferred = DeferredLogits(x_BLD, weight_VD, VOCAB * SOME_TOKENS)
    torch.testing.assert_close(compute_log_z(deferred), compute_log_z(logits_BLV))
    assert torch.equal(deferred.argmax(), logits_BLV.argmax(-1))
    assert torch.equal(deferred.project(), logits_BLV)
    assert not deferred.requires_grad


class LargestTensor(TorchDispatchMode):
    """Records the largest number of elements of a tensor that an operation returns."""

    num_elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.num_elements = max(self.num_elements, value.numel())
        return result


def test_no_tensor_has_more_logits_than_a_chunk() -> None:
    with LargestTensor() as chunked:
        differentiate(compute_chunked)
    with LargestTensor() as plain:
        differentiate(compute_plain)
    assert plain.num_elements == BATCH * LENGTH * VOCAB
    assert chunked.num_elements == VOCAB * WIDTH  # the weights and their gradient; chunks have 7 tokens at most


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


TASKS: dict[str, dict[str, Any]] = {
    "language": {"train": {"z_loss": 1e-2}},
    "tied": {"model": {"tie_embeddings": True}},
    "micro-batches": {"train": {"accumulate": 2}},
    "masked_language": {"task": {"name": "masked_language", "rate": 0.5}},
    "span_corruption": {"task": {"name": "span_corruption", "noise_density": 0.5}},
    "two passes": {"router": {"name": "thor"}},
    "a head of a feature": {"router": {"name": "speech_moe"}},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "masked_language" else name for name in TASKS]
)
def test_a_cell_trains_as_with_all_logits(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moebench.tasks.deferred_logits.CHUNK_LOGITS", 1000)  # 3 tokens of the 257 bytes
    ended = []
    for choice in ("full", "chunked"):
        options = dict(TASKS[name])
        options["train"] = {"steps": 4, "eval_every": 4, **options.get("train", {}), "cross_entropy": choice}
        run = Run(tiny_config(text, **options), tmp_path / choice)
        assert run() is not None
        ended.append(run.points())
    for (step, full), (same_step, chunked) in zip(*ended, strict=True):
        assert step == same_step
        assert chunked == pytest.approx(full, rel=2e-5, abs=1e-6)


def test_auto_keeps_all_logits_of_a_small_batch(text: Path, tmp_path: Path) -> None:
    limits = []
    for choice in ("full", "auto", "chunked"):
        config = tiny_config(text, train={"cross_entropy": choice})
        limits.append(build_model(config, prepare_task(config, tmp_path)).head.max_logits)
    assert limits == [None, 2**28, 0]


def test_a_task_with_a_loss_of_its_own_gets_all_logits(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, train={"cross_entropy": "chunked"})
    task = Watched(prepare_task(config, tmp_path))
    assert build_model(config, task).head.max_logits is None
