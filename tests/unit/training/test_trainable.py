"""`train.trainable`: what is frozen stays bit for bit, has no state in the optimizer, and costs less."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.case_selection import combine_axes
from support.parent_runs import WIDE, build_child, child_config, train_parent
from support.training_cases import Run, tiny_config, write_text
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from moebench.errors import UsageError
from moebench.experts.fused_experts import FusedExperts
from moebench.models.storageless import build_without_storage
from moebench.training.backward_cost import measure_trained_part
from moebench.training.evaluation import batch_context
from moebench.training.model import build_initialised_model, build_model, prepare_task
from moebench.training.module import CellModule
from moebench.training.optimizer.groups import describe_parameters
from moebench.training.trainable import GROUPS, freeze_parameters

STACK = "backbone.blocks.0.feed_forward.bank.w_in_EDF"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.mark.parametrize(
    ("trainable", "optimizer"),
    combine_axes(
        ["experts", "routers", "shared"],
        ["adamw", "muon"],
        quick=[("experts", "muon"), ("routers", "adamw"), ("shared", "adamw")],
    ),
)
def test_only_the_named_groups_change(trainable: str, optimizer: str, text: Path, tmp_path: Path) -> None:
    train = {"steps": 2, "trainable": trainable, "optimizer": optimizer, "eval_every": 2}
    run = Run(tiny_config(text, router="loss_free", train=train), tmp_path)
    model = build_initialised_model(run.config, prepare_task(run.config, tmp_path))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = run()
    assert result is not None
    checkpoint = run.checkpoint(2)
    groups = {role.name: role.group for role in describe_parameters(model)}
    for name, group in groups.items():
        is_equal = torch.equal(before[name], checkpoint["state_dict"][f"model.{name}"])
        assert is_equal == (group not in GROUPS[trainable]), name
    bias = "backbone.blocks.0.feed_forward.router.bias_E"
    assert torch.equal(before[bias], checkpoint["state_dict"][f"model.{bias}"]) == (trainable != "routers")
    trained = sum(value.numel() for name, value in model.named_parameters() if groups[name] in GROUPS[trainable])
    share = trained / sum(value.numel() for value in model.parameters())
    assert result.cost["trained_share"] == pytest.approx(share)
    assert 1 < result.cost["train_factor"] < 3


def test_new_experts_alone_change(text: Path, tmp_path: Path) -> None:
    experts = {"layout": {"num_experts": 4, "expert_width": None, "match": "none"}}
    train_parent(tmp_path, text, router="top_k", **experts)
    layout = {"num_experts": 5, "expert_width": None, "match": "none"}
    train = {"steps": 2, "trainable": "new_experts", "eval_every": 2}
    run = Run(child_config(text, router="top_k", layout=layout, train=train), tmp_path / "child", results=tmp_path)
    before = build_child(run.config, tmp_path)[0].state_dict()
    assert run() is not None
    after = run.checkpoint(2)["state_dict"]
    for name, value in before.items():
        if ".bank." in name:
            assert torch.equal(value[:4], after[f"model.{name}"][:4]), name
            assert not torch.equal(value[4], after[f"model.{name}"][4]), name
        else:
            assert torch.equal(value, after[f"model.{name}"]), name


def test_frozen_parameters_have_no_optimizer_state(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, router="top_k", train={"trainable": "routers"})
    task = prepare_task(config, tmp_path)
    module = CellModule(config, build_initialised_model(config, task), task)
    settings: Any = module.configure_optimizers()
    parameters = [parameter for group in settings["optimizer"].param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in parameters} == {
        id(parameter) for name, parameter in module.model.named_parameters() if ".router." in name
    }


def test_a_model_with_nothing_to_train_is_refused(text: Path, tmp_path: Path) -> None:
    config = tiny_config(text, router="dense", train={"trainable": "experts"})
    task = prepare_task(config, tmp_path)
    with pytest.raises(UsageError, match=r"train.trainable: 'experts' leaves nothing to train"):
        CellModule(config, build_initialised_model(config, task), task)


def test_gradients_are_counted_down_to_the_lowest_trained_block(text: Path, tmp_path: Path) -> None:
    def measure(**train: Any) -> float:
        config = tiny_config(text, router="top_k", train=train, **{**WIDE, "layout": {"name": "last_n", "n": 1}})
        task = prepare_task(config, tmp_path)
        with build_without_storage():
            model = build_model(config, task)
        return measure_trained_part(model, config.train, task.sequence_length).factor

    assert measure() == 3
    # Experts are in the last of two blocks: nothing flows back through the first.
    assert 1 < measure(trainable="experts") < measure(trainable="shared") < 3


def hide_from_counters(method: Callable[..., Any]) -> Callable[..., Any]:
    def compute(*arguments: Any) -> Any:
        with _disable_current_modes():
            return method(*arguments)

    return compute


@pytest.mark.parametrize(
    "layout", [{"name": "every_n", "n": 1}, {"name": "every_n", "n": 2}, {"name": "last_n", "n": 1}]
)
@pytest.mark.parametrize("trainable", ["experts", "routers"])
def test_the_counted_backward_pass_is_what_autograd_computes(
    trainable: str, layout: dict[str, Any], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("forward", "backward"):  # which products of the kernels the counter sees depends on the machine
        monkeypatch.setattr(FusedExperts, name, hide_from_counters(getattr(FusedExperts, name)))
    config = tiny_config(
        text,
        router="top_k",
        train={"trainable": trainable},
        task={"sequence_length": 32},
        model={"d_model": 32, "num_layers": 4, "ffn_width": 64},
        layout={**WIDE["layout"], "num_experts": 4, **layout},
    )
    task = prepare_task(config, tmp_path)
    model = build_initialised_model(config, task)
    freeze_parameters(model, config.train)
    batch = task.train_batch(2, 0, 0)
    tokens, bank = batch.input_BL.numel(), 2 * 2 * 2 * 32 * 64  # two experts of two matrices for each token
    counters = [FlopCounterMode(display=False) for _ in range(2)]
    with sdpa_kernel(SDPBackend.MATH), counters[0]:
        output, _ = model(batch, batch_context(batch, training=True, seed=0))
        loss = task.loss(output, batch).mean()
    with counters[1]:
        loss.backward()
    # The kernels of experts: forward, and all gradients of each bank.
    kernels = tokens * bank * len(model.backbone.moe_layers())
    forward, backward = (counter.get_total_flops() for counter in counters)
    forward, backward = forward + kernels, backward + 2 * kernels
    factor = measure_trained_part(model, config.train, task.sequence_length).factor
    assert factor == pytest.approx(1 + backward / forward, rel=0.005)
