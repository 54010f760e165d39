"""Muon: equal to torch.optim.Muon on one matrix, to a decomposition in fp64, and to a loop over experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moebench.routing.linear_map import INPUT_FIRST, OUTPUT_FIRST, LinearMap
from moebench.training.optimizer import muon
from moebench.training.optimizer.muon import Muon, orthogonalize

RATE, DECAY = 0.02, 0.1


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_muon(maps: Mapping[Tensor, LinearMap], **options: Any) -> Muon:
    group = {"params": list(maps), "lr": RATE, "weight_decay": DECAY, "uses_muon": True}
    return Muon([group], maps, **({"momentum": 0.95, "scaling": "original", "fused": True} | options))


def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, grad: Tensor | None) -> None:
    parameter.grad = grad
    optimizer.step()


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(24, 10), (10, 24), (16, 16), (1, 7)])
def test_one_matrix_equals_torch(shape: tuple[int, int], scaling: str) -> None:
    ours, theirs = (nn.Parameter(random_tensor(*shape, seed=9)) for _ in range(2))
    optimizer = make_muon({ours: OUTPUT_FIRST}, scaling=scaling, precision=torch.bfloat16)
    reference = torch.optim.Muon([theirs], lr=RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn=scaling)
    for seed in range(4):
        grad = random_tensor(*shape, seed=seed)
        step(optimizer, ours, grad)
        step(reference, theirs, grad.clone())
    # Products in bf16, in other kernels: 8 bits of the update, whose elements are at most the rate times the scale.
    size = RATE * muon.SCALINGS[scaling](*shape)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * 2**-8 * size)
    assert torch.equal(optimizer.state[ours]["momentum_buffer"], reference.state[theirs]["momentum_buffer"])


def apply_to_singular_values(matrix: Tensor) -> np.ndarray:
    """Return U p(S) V^T in fp64, p being five times s <- 3.4445 s - 4.775 s^3 + 2.0315 s^5 from S / |S|."""
    u, s, vt = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return np.asarray((u * s) @ vt)


@pytest.mark.parametrize("shape", [(8, 8), (8, 40), (32, 64)])
def test_orthogonalization_equals_the_polynomial_of_singular_values(shape: tuple[int, int]) -> None:
    matrix_NXY = random_tensor(3, *shape)
    for ours, matrix in zip(orthogonalize(matrix_NXY), matrix_NXY, strict=True):
        np.testing.assert_allclose(ours.numpy(), apply_to_singular_values(matrix), atol=2e-5)


def test_singular_values_become_about_1() -> None:
    # Known ones: from 0.05 to 1 of the norm.
    u, _, vt = torch.linalg.svd(random_tensor(12, 30), full_matrices=False)
    values = torch.linspace(0.05, 1, 12)
    made = torch.linalg.svdvals(orthogonalize((u * values @ vt)[None])[0])
    assert made.min() > 0.68
    assert made.max() < 1.21


def test_bf16_differs_by_its_precision() -> None:
    matrix = random_tensor(1, 16, 48)
    exact, rounded = orthogonalize(matrix), orthogonalize(matrix.bfloat16()).float()
    assert (exact - rounded).norm() / exact.norm() < 0.02


def test_a_gradient_of_0_leaves_the_weights() -> None:
    weight = nn.Parameter(random_tensor(3, 4, 6))
    before = weight.detach().clone()
    optimizer = make_muon({weight: INPUT_FIRST})
    step(optimizer, weight, torch.zeros_like(weight))
    torch.testing.assert_close(weight.detach(), before * (1 - RATE * DECAY))


def test_an_expert_without_tokens_goes_on_in_the_direction_of_its_momentum() -> None:
    weight = nn.Parameter(torch.zeros(1, 4, 6))
    optimizer = make_muon({weight: INPUT_FIRST})
    step(optimizer, weight, random_tensor(1, 4, 6))
    first = weight.detach().clone()
    step(optimizer, weight, torch.zeros_like(weight))
    decayed = first * (1 - RATE * DECAY)
    torch.testing.assert_close(weight.detach() - decayed, first)


@pytest.mark.parametrize("scaling", ["original", "match_rms_adamw"])
def test_a_stack_equals_a_loop_over_experts(scaling: str) -> None:
    stack = nn.Parameter(random_tensor(5, 12, 20))
    experts = [nn.Parameter(each.detach().clone()) for each in stack]
    stacked = make_muon({stack: INPUT_FIRST}, scaling=scaling)
    apart = make_muon(dict.fromkeys(experts, INPUT_FIRST), scaling=scaling)
    for seed in range(3):
        grad = random_tensor(5, 12, 20, seed=seed) * torch.tensor([1e-4, 1, 0, 3, 10]).view(-1, 1, 1)
        for expert, its_grad in zip(experts, grad, strict=True):
            expert.grad = its_grad.clone()
        apart.step()
        step(stacked, stack, grad)
    torch.testing.assert_close(stack.detach(), torch.stack([each.detach() for each in experts]), rtol=0, atol=1e-6)


def test_orientation_is_that_of_the_map() -> None:
    # x @ W and x @ W^T: the same matrix stored in two ways is updated alike, though its scale depends on the shape.
    ours, transposed = nn.Parameter(random_tensor(6, 30)), nn.Parameter(random_tensor(6, 30).T.contiguous())
    grad = random_tensor(6, 30, seed=1)
    step(make_muon({ours: INPUT_FIRST}), ours, grad)
    step(make_muon({transposed: OUTPUT_FIRST}), transposed, grad.T.contiguous())
    torch.testing.assert_close(ours.T, transposed)
    updates = ours.detach() - random_tensor(6, 30) * (1 - RATE * DECAY)
    scale = float(torch.linalg.matrix_norm(updates, ord=2)) / RATE
    assert scale == pytest.approx(5**0.5, rel=0.25)  # 30 outputs of 6 inputs


def test_parts_are_matrices_of_their_own() -> None:
    # Grouped queries: 8 outputs of queries, 4 of keys and 4 of values, from 6 inputs.
    fused = nn.Parameter(random_tensor(16, 6))
    apart = [nn.Parameter(each.detach().clone()) for each in fused.split([8, 4, 4])]
    optimizers = (
        make_muon({fused: replace(OUTPUT_FIRST, out_parts=(8, 4, 4))}),
        make_muon(dict.fromkeys(apart, OUTPUT_FIRST)),
    )
    fused.grad = random_tensor(16, 6, seed=1)
    for parameter, grad in zip(apart, fused.grad.split([8, 4, 4]), strict=True):
        parameter.grad = grad.clone()
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(fused.detach(), torch.cat([each.detach() for each in apart]))


def test_batches_of_limited_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def train() -> list[Tensor]:
        weights = [nn.Parameter(random_tensor(2, 6, 4, seed=seed)) for seed in range(5)]
        optimizer = make_muon(dict.fromkeys(weights, INPUT_FIRST))
        for weight in weights:
            weight.grad = weight.detach().clone()
        optimizer.step()
        return [weight.detach() for weight in weights]

    together = train()
    monkeypatch.setattr(muon, "MAX_BATCH_ELEMENTS", 100)  # two parameters of 48 elements
    torch.testing.assert_close(train(), together)


def test_other_groups_are_updated_by_adamw() -> None:
    matrix, ours, theirs = (nn.Parameter(random_tensor(4, 4)) for _ in range(3))
    groups = [
        {"params": [matrix], "uses_muon": True},
        {"params": [ours], "uses_muon": False, "lr": 0.1, "weight_decay": 0.3},
    ]
    optimizer = Muon(groups, {matrix: OUTPUT_FIRST}, momentum=0.9, scaling="original", fused=True, betas=(0.8, 0.9))
    reference = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.3, fused=True, betas=(0.8, 0.9))
    for seed in range(3):
        matrix.grad = random_tensor(4, 4, seed=seed + 9)
        grad = random_tensor(4, 4, seed=seed)
        step(optimizer, ours, grad)
        step(reference, theirs, grad.clone())
    assert torch.equal(ours, theirs)
    assert optimizer.state[ours].keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert optimizer.state[matrix].keys() == {"momentum_buffer"}


def test_parameters_without_a_gradient_stay_as_they_are() -> None:
    weight = nn.Parameter(random_tensor(4, 4))
    optimizer = make_muon({weight: OUTPUT_FIRST})
    step(optimizer, weight, None)
    assert torch.equal(weight, random_tensor(4, 4))
    assert not optimizer.state[weight]


def test_the_closure_runs_before_the_update_and_with_gradients() -> None:
    weight = nn.Parameter(random_tensor(4, 4))
    optimizer = make_muon({weight: OUTPUT_FIRST})

    def closure() -> Tensor:
        loss = weight.square().sum()
        loss.backward()
        return loss.detach()

    assert optimizer.step(closure) == pytest.approx(float(random_tensor(4, 4).square().sum()))
    assert not torch.equal(weight, random_tensor(4, 4))
