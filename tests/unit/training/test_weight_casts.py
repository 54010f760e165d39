"""Weights in the precision of autocast: cast once for each update, with the numbers of a cast at each use."""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import Run, assert_same_tree, tiny_config, write_text
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from moebench.experts import weight_casts
from moebench.experts.feed_forward import ExpertBank
from moebench.experts.grouped import cast_for_autocast
from moebench.experts.weight_casts import WeightCasts, cast_weight, share_casts
from moebench.routing.linear_map import INPUT_FIRST
from moebench.training.model import build_initialised_model, prepare_task
from moebench.training.module import CellModule
from moebench.training.optimizer.muon import Muon

BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


class CastCount(TorchDispatchMode):
    """Counts casts to bf16 by the shape of the tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") is BF16:
            self.shapes[args[0].shape] += 1
        return func(*args, **(kwargs or {}))

    def of(self, weights: Sequence[Tensor]) -> set[int]:
        """Return the numbers of casts of weights of these shapes, per weight."""
        num_equal = Counter(weight.shape for weight in weights)
        return {self.shapes[shape] // number for shape, number in num_equal.items()}


def cast_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebench.experts.bank.cast_weight", lambda parameter, local: cast_for_autocast(local)[0])


CELLS: dict[str, dict[str, Any]] = {
    "micro-batches": {"router": "top_k", "train": {"accumulate": 2, "recompute": "blocks", "weight_decay": 0.1}},
    "muon": {
        "router": "switch",
        "layout": {"name": "residual", "num_experts": 4, "match": "none", "recompute": True},
        "train": {"optimizer": "muon", "router_learning_rate": 1e-2},
    },
    "two passes": {"router": "thor", "train": {"accumulate": 2}},
    "merged": {"router": "smear", "allow_noncausal": True, "layout": {"recompute": True}},
    "biases": {"router": "top_k", "model": {"ffn_bias": True}, "layout": {"expert_dropout": 0.1}},
    "dense": {"router": "dense", "train": {"keep_checkpoints": [2]}},
    "attention": {"router": "top_k", "layout": {"name": "attention", "match": "none"}},
    "frozen experts": {"router": "top_k", "train": {"trainable": "routers"}},
}
QUICK = ("micro-batches", "muon", "dense")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CELLS]
)
def test_a_cell_trains_to_the_bits_of_casts_at_each_use(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = dict(CELLS[name])
    options["train"] = {"steps": 5, "eval_every": 2, **options.get("train", {}), "precision": "bf16"}
    ended = []
    for is_cast_at_each_use in (False, True):
        if is_cast_at_each_use:
            cast_at_each_use(monkeypatch)
        run = Run(tiny_config(text, **options), tmp_path / str(is_cast_at_each_use))
        assert run() is not None
        ended.append(run)
    assert_same_tree(*(run.checkpoint(5)["state_dict"] for run in ended))
    assert ended[0].points() == ended[1].points()


def test_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(text: Path, tmp_path: Path) -> None:
    train = {"steps": 5, "eval_every": 2, "precision": "bf16", "checkpoint_every": 2}
    whole, stopped = (Run(tiny_config(text, router="top_k", train=train), tmp_path / name) for name in ("a", "b"))
    assert whole() is not None
    assert stopped(stop_at=3) is None
    assert stopped() is not None
    assert_same_tree(*(run.checkpoint(5)["state_dict"] for run in (whole, stopped)))


@pytest.mark.parametrize(("accumulate", "recompute"), [pytest.param(1, "none", marks=pytest.mark.slow), (2, "blocks")])
def test_each_stack_is_cast_once_for_each_update(
    accumulate: int, recompute: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"steps": 3, "eval_every": 3, "accumulate": accumulate, "recompute": recompute, "precision": "bf16"}
    # Of shapes that no vectors have.
    config = tiny_config(text, router="top_k", layout={"num_experts": 6, "expert_width": 5}, train=train)
    task = prepare_task(config, tmp_path)
    layers = build_initialised_model(config, task).backbone.moe_layers()
    stacks = [parameter for layer in layers for parameter in layer.bank.parameters()]
    assert len(stacks) == 4
    with CastCount() as casts:
        Run(config, tmp_path / "once", task)()
    assert casts.of(stacks) == {3 + 1}  # three steps, and two evaluations after the last one
    cast_at_each_use(monkeypatch)
    with CastCount() as casts:
        Run(config, tmp_path / "each", task)()
    num_passes = accumulate * (2 if recompute == "blocks" else 1)
    assert casts.of(stacks) == {3 * num_passes + 2}  # of one batch each


def read(casts: WeightCasts, parameter: Tensor) -> Tensor:
    with share_casts(casts), torch.autocast("cpu", dtype=BF16):
        return cast_weight(parameter, parameter)


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def update_by_muon(weight: nn.Parameter) -> None:
    group = {"params": [weight], "uses_muon": True, "lr": 0.1, "weight_decay": 0.0}
    step(Muon([group], {weight: INPUT_FIRST}, momentum=0.9, scaling="original"))


def load(weight: nn.Parameter) -> None:
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": torch.ones_like(weight)})


@torch.no_grad()
def write_part(weight: nn.Parameter) -> None:
    weight.detach()[torch.tensor([1])] = 3.0


def replace(weight: nn.Parameter) -> None:
    weight.data = torch.ones_like(weight)


WRITES: dict[str, Callable[[nn.Parameter], Any]] = {
    **{
        f"AdamW {options}": lambda weight, options=options: step(torch.optim.AdamW([weight], lr=0.1, **options))
        for options in ({"foreach": True}, {"foreach": False})
    },
    "Muon": update_by_muon,
    "load_state_dict": load,
    "write to a part": write_part,
    "initialisation": lambda weight: nn.init.normal_(weight, std=2.0),
    "replaced storage": replace,
}


@pytest.mark.parametrize("name", WRITES)
def test_a_copy_is_made_again_after_any_write(name: str) -> None:
    weight, casts = nn.Parameter(torch.randn(3, 4, 5)), WeightCasts()
    before = read(casts, weight)
    assert read(casts, weight).data_ptr() == before.data_ptr()
    WRITES[name](weight)
    after = read(casts, weight)
    assert torch.equal(after, weight.to(BF16))
    assert not torch.equal(after, before)
    assert torch.equal(read(casts, weight), weight.to(BF16))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_updates_of_a_cell_drop_all_copies(optimizer: str, text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, router="top_k", train={"optimizer": optimizer})
    task = prepare_task(config, tmp_path)
    module = CellModule(config, build_initialised_model(config, task), task)
    configured: Any = module.configure_optimizers()
    for weight in [parameter for layer in module.layers for parameter in layer.bank.parameters()]:
        read(module.weight_casts, weight)
        step(configured["optimizer"])  # fused, which torch does not count
        assert len(module.weight_casts._copies) == 0
        assert torch.equal(read(module.weight_casts, weight), weight.to(BF16))


def test_copies_are_dropped_on_request() -> None:
    weight, casts = nn.Parameter(torch.ones(2, 2)), WeightCasts()
    read(casts, weight)
    weight.data.fill_(2.0)  # not counted by torch
    casts.clear()
    assert torch.equal(read(casts, weight), torch.full((2, 2), 2.0, dtype=BF16))
    assert len(casts._copies) == 1


def test_uses_have_gradients_of_their_own_in_fp32() -> None:
    weight, casts = nn.Parameter(torch.full((1, 1), 1.0)), WeightCasts()
    with share_casts(casts), torch.autocast("cpu", dtype=BF16):
        first, second = (cast_weight(weight, weight) for _ in range(2))
    # 256 + 1 is 256 in bf16.
    (256 * first.float() + second.float()).sum().backward()
    assert weight.grad is not None
    assert (weight.grad.dtype, weight.grad.item()) == (torch.float32, 257.0)
    with torch.no_grad():
        assert not read(casts, weight).requires_grad
    assert read(casts, weight).requires_grad  # also where the copy was made without gradients
    frozen = nn.Parameter(torch.ones(1), requires_grad=False)
    assert not read(casts, frozen).requires_grad


def test_nothing_is_kept_without_autocast_or_outside_of_a_scope() -> None:
    weight, casts = nn.Parameter(torch.ones(2, 2)), WeightCasts()
    with share_casts(casts):
        assert cast_weight(weight, weight) is weight
    with torch.autocast("cpu", dtype=BF16):
        assert cast_weight(weight, weight).data_ptr() != cast_weight(weight, weight).data_ptr()
    assert len(casts._copies) == 0
    with share_casts(), torch.autocast("cpu", dtype=BF16):
        first = cast_weight(weight, weight)
        with share_casts():  # those in use
            assert cast_weight(weight, weight).data_ptr() == first.data_ptr()
    assert weight_casts._IN_USE == []


def test_copies_are_in_no_module(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, router="top_k", train={"precision": "bf16"})
    task = prepare_task(config, tmp_path)
    module = CellModule(config, build_initialised_model(config, task), task)
    names = set(module.state_dict())
    bank = module.layers[0].bank
    attributes = dict(vars(bank))
    module.evaluate("test")
    assert isinstance(bank, ExpertBank)
    assert len(module.weight_casts._copies) >= 4
    assert set(module.state_dict()) == names
    assert vars(bank) == attributes
