"""Width scaling: factors by hand, and the coordinate check that activations keep their size at every width."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training_cases import tiny_config, write_text
from torch import Tensor, nn

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.experts.layer import MoELayer
from moebench.models.transformer import Block
from moebench.schema import CellConfig
from moebench.tasks.task import Task
from moebench.training.evaluation import batch_context
from moebench.training.model import Model, build_base_model, build_initialised_model, prepare_task
from moebench.training.optimizer.build import build_optimizer
from moebench.training.optimizer.groups import describe_parameters
from moebench.training.optimizer.mup import compute_width_factors, refuse_shared_embedding, shrink_widths

NUM_STEPS = 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def wide_config(text: Path, width: int, **overrides: Any) -> CellConfig:
    """Return a model whose widths are all proportional to d_model; heads have 16."""
    model = {
        "d_model": width,
        "num_heads": width // 16,
        "ffn_width": 2 * width,
        "num_layers": 1,
        "activation": "swiglu",
    }
    layout = {"n": 1, "num_experts": 4, "expert_width": width}
    return tiny_config(text, model=model, layout=layout, router={"name": "top_k", "losses": {}}, **overrides)


def compute_factors(config: CellConfig, folder: Path) -> dict[str, tuple[float, float]]:
    """Return the factors of the learning rate and of the initial weights by parameter."""
    task = prepare_task(config, folder)
    model = build_initialised_model(config, task)
    factors = compute_width_factors(config, describe_parameters(model), build_base_model(config, task))
    return {name: (factor.learning_rate, factor.initial_scale) for name, factor in factors.items()}


HIDDEN = ("qkv.weight", "out.weight", "w_in_EDF", "w_out_EFD")


@pytest.mark.parametrize(
    ("train", "hidden"),
    [
        ({}, 1 / 4),
        # 0.2 sqrt(max(n_out, n_in)) would double the updates.
        ({"optimizer": "muon"}, 1 / 2),
        # sqrt(max(1, n_out / n_in)) does not change with the width.
        ({"optimizer": "muon", "muon_scaling": "original"}, 1),
    ],
    ids=["adamw", "muon", "muon, original"],
)
def test_factors_of_four_times_the_width(text: Path, tmp_path: Path, train: dict[str, Any], hidden: float) -> None:
    factors = compute_factors(wide_config(text, 256, train={"mup_base_width": 64, **train}), tmp_path)
    for name, factor in factors.items():
        if name.endswith(HIDDEN):
            assert factor == pytest.approx((hidden, 1)), name
        elif name == "head.weight" or name.endswith("gate.weight_ED"):
            assert factor == (1 / 4, 1 / 2), name
        else:
            assert factor == (1, 1), name


def test_widths_that_do_not_grow_do_not_scale(text: Path, tmp_path: Path) -> None:
    # The hidden width of the router is 6 in the base too: its second gate reads nothing that grows.
    overrides = {"router": {"name": "mlp_top_k", "hidden_width": 6}, "train": {"mup_base_width": 4}}
    factors = compute_factors(tiny_config(text, **overrides), tmp_path)
    assert factors["backbone.blocks.0.feed_forward.router.hidden_gate.weight_ED"] == (1 / 2, 2**-0.5)
    assert factors["backbone.blocks.0.feed_forward.router.gate.weight_ED"] == (1, 1)


@pytest.mark.parametrize("router", ["multi_gate", "soft_moe", "autonomy_of_experts"])
def test_gates_without_stated_maps_read_the_width(text: Path, tmp_path: Path, router: str) -> None:
    options = {"router": router, "train": {"mup_base_width": 4}, "allow_noncausal": True}
    factors = compute_factors(tiny_config(text, **options), tmp_path)
    name = next(name for name in factors if name.endswith(("weight_EGD", "slot_EPD", "down_EDR")))
    assert factors[name] == (1 / 2, 2**-0.5)


def test_embeddings_of_a_router_are_no_gates(text: Path, tmp_path: Path) -> None:
    factors = compute_factors(tiny_config(text, router="task_level", train={"mup_base_width": 4}), tmp_path)
    assert factors["backbone.blocks.0.feed_forward.router.embedding_GD"] == (1, 1)


def test_the_product_of_rate_and_decay_is_that_of_the_base(text: Path, tmp_path: Path) -> None:
    config = wide_config(text, 128, train={"mup_base_width": 64, "learning_rate": 1e-2, "weight_decay": 0.1})
    task = prepare_task(config, tmp_path)
    optimizer = build_optimizer(config, build_initialised_model(config, task), task)
    settings = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert settings == {(1e-2, 0.1), (1e-2, 0.0), (5e-3, 0.2)}


def test_the_base_itself_is_not_scaled(text: Path, tmp_path: Path) -> None:
    plain, base = (wide_config(text, 64, train=train) for train in ({}, {"mup_base_width": 64}))
    assert set(compute_factors(base, tmp_path).values()) == {(1, 1)}
    task = prepare_task(plain, tmp_path)
    ours, theirs = (build_initialised_model(config, task).state_dict() for config in (base, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_gates_start_smaller_by_the_root_of_the_ratio(text: Path, tmp_path: Path) -> None:
    def build(**train: Any) -> dict[str, Tensor]:
        config = wide_config(text, 256, train=train)
        return build_initialised_model(config, prepare_task(config, tmp_path)).state_dict()

    plain, scaled = build(), build(mup_base_width=64)
    name = "backbone.blocks.0.feed_forward.router.gate.weight_ED"
    torch.testing.assert_close(scaled[name], plain[name] / 2)
    assert torch.equal(scaled["embedding.weight"], plain["embedding.weight"])


def test_thresholds_start_where_the_smaller_logits_are(text: Path, tmp_path: Path) -> None:
    def threshold(**train: Any) -> float:
        config = tiny_config(text, router="expert_threshold", train=train)
        model = build_initialised_model(config, prepare_task(config, tmp_path))
        return float(model.state_dict()["backbone.blocks.0.feed_forward.router.threshold_E"][0])

    assert threshold(mup_base_width=4) == pytest.approx(threshold() * 2**-0.5)


def test_the_base_has_all_widths_divided() -> None:
    config = resolve(
        {
            "model": {"d_model": 256, "num_heads": 8, "ffn_width": 1000},
            "layout": {"expert_width": 96},
            "train": {"mup_base_width": 64},
        }
    )
    base = shrink_widths(config)
    assert (base.model.d_model, base.model.num_heads, base.model.ffn_width) == (64, 2, 250)
    assert base.layout.expert_width == 24


def test_a_base_width_that_splits_a_head_is_refused() -> None:
    with pytest.raises(UsageError, match=r"a multiple of the width of a head, 32, got 48"):
        resolve({"model": {"d_model": 64, "num_heads": 2}, "train": {"mup_base_width": 48}})


def test_tied_embeddings_are_refused() -> None:
    with pytest.raises(UsageError, match=r"train\.mup_base_width.*null with model\.tie_embeddings"):
        resolve({"model": {"tie_embeddings": True}, "train": {"mup_base_width": 32}})


def test_an_output_that_shares_the_embedding_is_refused() -> None:
    embedding, head = nn.Embedding(4, 8), nn.Linear(8, 4, bias=False)
    refuse_shared_embedding(head, embedding)
    head.weight = embedding.weight
    with pytest.raises(UsageError, match=r"train\.mup_base_width must be null"):
        refuse_shared_embedding(head, embedding)


def train_and_measure(config: CellConfig, task: Task) -> dict[str, float]:
    """Train for a few steps on one batch; return the root mean square of activations at the end, by their kind."""
    model = build_initialised_model(config, task)
    optimizer = build_optimizer(config, model, task)
    batch = task.train_batch(4, 0, 0)
    sizes: dict[str, float] = {}
    for step in range(NUM_STEPS + 1):
        handles = _watch(model, sizes) if step == NUM_STEPS else []
        output, _ = model(batch, batch_context(batch, training=True, seed=0, step=step))
        sizes["logits"] = _root_mean_square(output)
        if step < NUM_STEPS:
            optimizer.zero_grad()
            task.loss(output, batch).mean().backward()
            optimizer.step()
        for handle in handles:
            handle.remove()
    return sizes


def _watch(model: Model, sizes: dict[str, float]) -> list[Any]:
    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def measure(_: nn.Module, __: Any, output: Any) -> None:
            sizes[name] = _root_mean_square(output[0] if isinstance(output, tuple) else output)

        return measure

    handles = []
    for module in model.modules():
        if isinstance(module, Block):
            handles += [
                module.register_forward_hook(hook("stream")),
                module.attention.register_forward_hook(hook("attention")),
            ]
        elif isinstance(module, MoELayer):
            handles += [module.register_forward_hook(hook("experts"))]
            handles += [gate.register_forward_hook(hook("gate")) for gate in module.router.children()]
    return handles


def _root_mean_square(value: Tensor) -> float:
    return math.sqrt(float(value.detach().double().square().mean()))


def measure_growth(text: Path, folder: Path, widths: Sequence[int], **train: Any) -> dict[str, float]:
    """Return the largest size of each activation over the smallest one, over all widths."""
    configs = [wide_config(text, width, train={"learning_rate": 0.01, **train}) for width in widths]
    task = prepare_task(configs[0], folder)
    sizes = [train_and_measure(config, task) for config in configs]
    return {name: max(each[name] for each in sizes) / min(each[name] for each in sizes) for name in sizes[0]}


@pytest.mark.parametrize(
    ("optimizer", "widths"),
    [
        ("adamw", (64, 128, 256, 512)),
        ("muon", (64, 128, 256)),
        pytest.param("muon", (64, 128, 256, 512), marks=pytest.mark.slow),
    ],
)
def test_coordinate_check(text: Path, tmp_path: Path, optimizer: str, widths: Sequence[int]) -> None:
    """Activations after some steps have nearly the same size at every width with muP, and not without."""
    scaled = measure_growth(text, tmp_path, widths, optimizer=optimizer, mup_base_width=widths[0])
    assert max(scaled.values()) < 2.2, scaled  # of the gate, whose initial logits become smaller with the width
    plain = measure_growth(text, tmp_path, widths, optimizer=optimizer)
    assert max(plain.values()) > 2.8, plain
