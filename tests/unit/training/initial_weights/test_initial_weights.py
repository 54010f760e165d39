"""Weights of a parent: which are taken, that step 0 is the parent's function, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parent_runs import (
    PARENT,
    build_child,
    child_config,
    compute_logits,
    read_parent,
    train_parent,
    with_init,
)
from support.training_cases import Run, tiny_config, write_text

from moebench.errors import UsageError
from moebench.training.initial_weights.plan import CopyMethod
from moebench.training.model import build_initialised_model, prepare_task

EXACT = (
    *("all_experts", "domain", "dynmoe", "glam", "gshard", "hash", "lory", "mixtral", "multi_gate", "noisy_top_k"),
    *("null_experts", "sentence_level", "smear", "st_moe", "task_level", "thor", "top_k", "reinforce"),
)
"""Routers whose weights sum to 1 for every token."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def parent(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train_parent(tmp_path_factory.mktemp("results"), text)


@pytest.fixture(scope="module")
def results(parent: Run) -> Path:
    return parent.folder.parents[1]


@pytest.mark.parametrize("router", EXACT)
def test_copies_of_a_dense_network_start_at_its_function(router: str, parent: Run, results: Path, text: Path) -> None:
    config = child_config(text, router=router, allow_noncausal=True)
    child, loaded = build_child(config, results)
    expected = compute_logits(read_parent(parent), config, results)
    torch.testing.assert_close(compute_logits(child, config, results), expected, rtol=0, atol=1e-6)
    assert loaded is not None
    assert len(loaded.plan.of(CopyMethod.NETWORK)) == 4  # two matrices in each of two blocks
    assert all(".router." in name for name in loaded.plan.new)
    assert not loaded.plan.unused


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_biases_and_gates_of_networks_are_copied_too(activation: str, tmp_path: Path, text: Path) -> None:
    model = {"activation": activation, "ffn_bias": True}
    parent = train_parent(tmp_path, text, model=model)
    config = child_config(text, router="top_k", model=model)
    child, _ = build_child(config, tmp_path)
    expected = compute_logits(read_parent(parent), config, tmp_path)
    torch.testing.assert_close(compute_logits(child, config, tmp_path), expected, rtol=0, atol=1e-6)


def test_what_a_parent_lacks_starts_as_without_a_parent(results: Path, text: Path) -> None:
    config = child_config(text, router="top_k", init={"upcycle": {"copies": 3}})
    child, loaded = build_child(config, results)
    fresh = build_initialised_model(config, prepare_task(config, results)).state_dict()
    assert loaded is not None
    for name in loaded.plan.new:
        assert torch.equal(child.state_dict()[name], fresh[name])
    stack = "backbone.blocks.1.feed_forward.bank.w_in_EDF"
    assert torch.equal(child.state_dict()[stack][3], fresh[stack][3])
    assert not torch.equal(child.state_dict()[stack][2], fresh[stack][2])
    assert loaded.new_experts[stack] == (3,)
    assert child.new_experts == loaded.new_experts


def test_experts_draw_noise_of_their_own_from_the_seed(results: Path, text: Path) -> None:
    plain = child_config(text, router="top_k")
    stack = "backbone.blocks.0.feed_forward.bank.w_out_EFD"
    copies = build_child(plain, results)[0].state_dict()[stack]
    noisy = build_child(with_init(plain, noise=0.5), results)[0].state_dict()[stack]
    again = build_child(with_init(plain, noise=0.5), results)[0].state_dict()[stack]
    assert torch.equal(noisy, again)
    noise_EFD = noisy - copies
    assert not torch.equal(noise_EFD[0], noise_EFD[1])
    assert float(noise_EFD.std() / copies[0].std()) == pytest.approx(0.5, rel=0.2)  # 512 draws


def test_the_same_router_is_copied_with_its_state_and_another_is_new(tmp_path: Path, text: Path) -> None:
    experts = {"layout": {"num_experts": 4, "expert_width": None, "match": "none"}}
    train_parent(tmp_path, text, router="loss_free", **experts)
    same, loaded = build_child(child_config(text, router="loss_free"), tmp_path)
    assert loaded is not None
    assert not loaded.plan.new
    assert any("bias_E" in each.target for each in loaded.plan.taken)
    bias_E = same.state_dict()["backbone.blocks.0.feed_forward.router.bias_E"]
    assert bool(bias_E.abs().sum() > 0)  # moved by the loads of three steps
    other, loaded = build_child(child_config(text, router="top_k"), tmp_path)
    assert loaded is not None
    assert {name.rpartition(".")[2] for name in loaded.plan.new} == {"weight_ED"}
    assert {name.rpartition(".")[2] for name in loaded.plan.unused} == {"weight_ED", "bias_E"}
    stack = "backbone.blocks.0.feed_forward.bank.w_in_EDF"
    assert torch.equal(other.state_dict()[stack], same.state_dict()[stack])
    gate = "backbone.blocks.0.feed_forward.router.gate.weight_ED"
    copied, _ = build_child(with_init(child_config(text, router="top_k"), router="copy"), tmp_path)
    assert torch.equal(copied.state_dict()[gate], same.state_dict()[gate])
    zero, _ = build_child(with_init(child_config(text, router="top_k"), router="zero"), tmp_path)
    assert not bool(zero.state_dict()[gate].any())


def test_an_expert_is_added_to_those_of_the_parent(tmp_path: Path, text: Path) -> None:
    train_parent(tmp_path, text, router="top_k", layout={"expert_width": None, "match": "none"})
    config = child_config(text, router="top_k", layout={"num_experts": 5, "expert_width": None, "match": "none"})
    child, loaded = build_child(config, tmp_path)
    assert loaded is not None
    assert set(loaded.new_experts.values()) == {(4,)}
    assert len(loaded.plan.of(CopyMethod.ROWS)) == 6  # two stacks and a gate in each of two blocks
    assert child.state_dict()["backbone.blocks.0.feed_forward.router.gate.weight_ED"].shape[0] == 5
    fewer = child_config(text, router="top_k", layout={"num_experts": 3, "expert_width": None, "match": "none"})
    with pytest.raises(UsageError, match=r"layout.num_experts must be at least 4, got 3"):
        build_child(fewer, tmp_path)


def test_shared_networks_and_dense_blocks_get_a_copy(parent: Run, results: Path, text: Path) -> None:
    """In the residual layout the two networks are weighted by a softmax, so that equal ones are the parent's."""
    layout = {"name": "residual", "num_experts": 4, "expert_width": None, "match": "none"}
    config = child_config(text, router="top_k", layout=layout)
    child, loaded = build_child(config, results)
    assert loaded is not None
    assert any(".shared." in each.target for each in loaded.plan.of(CopyMethod.WHOLE))
    expected = compute_logits(read_parent(parent), config, results)
    torch.testing.assert_close(compute_logits(child, config, results), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model": {"d_model": 16}}, "model.d_model: 16 here, 8 in run 000000000000 of init.from (allowed: 8)"),
        ({"model": {"num_heads": 1}}, "model.num_heads: 1 here, 2 in run"),
        ({"model": {"num_layers": 3}}, "model.num_layers: 3 here, 2 in run"),
        ({"model": {"activation": "swiglu"}}, "model.activation: swiglu here, gelu in run"),
        ({"task": {"data": {"tokenizer": "bpe4096"}}}, "task.data.tokenizer: bpe4096 here, bytes in run"),
        ({"layout": {"expert_width": 8, "match": "flops"}}, "init.from: backbone.blocks.0.feed_forward.w_in_DF of run"),
        ({"init": {"upcycle": {"router": "copy"}}}, "init.upcycle.router: copy, but run 000000000000 has no"),
        ({"init": {"from": "run:111111111111"}}, "init.from: there is no run 111111111111 in"),
        ({"init": {"from": f"run:{PARENT}@2"}}, f"init.from: the run {PARENT} has no weights of step 2"),
    ],
)
def test_a_child_that_does_not_fit_is_refused_in_one_line(
    overrides: dict[str, Any], message: str, results: Path, text: Path
) -> None:
    config = child_config(text, router="top_k", **overrides)
    with pytest.raises(UsageError) as error:
        build_child(config, results)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_a_parent_that_is_not_done_or_damaged_is_refused(tmp_path: Path, text: Path) -> None:
    parent = train_parent(tmp_path, text)
    config = child_config(text, router="top_k")
    result = (parent.folder / "result.json").read_text()
    (parent.folder / "result.json").unlink()
    with pytest.raises(UsageError, match=r"the run 0{12} \(parent, seed 0\) is resumable, not done"):
        build_child(config, tmp_path)
    (parent.folder / "result.json").write_text(result)
    file = next(parent.checkpoints.glob("step_0000003.ckpt/*.distcp"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UsageError, match=r"init.from: .*damaged \(checksum of .* does not match"):
        build_child(config, tmp_path)


def test_a_run_records_what_it_took_and_repeats_after_a_stop(results: Path, text: Path, tmp_path: Path) -> None:
    config = child_config(text, router="top_k", train={"steps": 4})
    runs = [Run(config, tmp_path / name, results=results) for name in ("a", "b")]
    notes = runs[0](), runs[1](stop_at=2), runs[1]()
    assert notes[0] is not None
    assert notes[1] is None
    record = json.loads((tmp_path / "a" / "init.json").read_text())
    assert record["parent"] == f"run {PARENT}"
    assert record["taken"]["copied into each expert"] == {
        "backbone.blocks.*.feed_forward.bank.w_in_EDF": 2,
        "backbone.blocks.*.feed_forward.bank.w_out_EFD": 2,
    }
    assert record["new"] == {"backbone.blocks.*.feed_forward.router.gate.weight_ED": 2}
    states = [run.checkpoint(4)["state_dict"] for run in runs]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_dense_child_goes_on_with_all_weights(parent: Run, results: Path, text: Path) -> None:
    config = child_config(text, router="dense")
    child, loaded = build_child(config, results)
    assert loaded is not None
    assert not loaded.plan.new
    assert_equal(child.state_dict(), read_parent(parent).state_dict())


def test_a_child_that_takes_nothing_is_refused(results: Path, text: Path) -> None:
    from moebench.training.initial_weights.plan import plan_load

    class Stranger:
        label, settings, shapes, routing = "run x", {}, {"other": torch.Size([1])}, None

    with pytest.raises(UsageError, match="the model takes nothing from run x"):
        plan_load(tiny_config(text, router="dense"), {"weight": torch.Size([1])}, Stranger())


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
