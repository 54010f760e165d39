"""Experts for new domains: which weights they start from, and that training them alone changes nothing else."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.parent_runs import WIDE, build_child, child_config, read_parent, train_parent
from support.training_cases import Run

from moebench.errors import UsageError
from moebench.schema import CellConfig
from moebench.training.evaluation import batch_context
from moebench.training.initial_weights.new_experts import NUM_BATCHES, fill_new_experts
from moebench.training.model import build_initialised_model, prepare_task

NAMES = ("ab", "klm", "xyz")
STACK = "backbone.blocks.0.feed_forward.bank.w_in_EDF"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three domains of ten documents."""
    file = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = [{"text": f"{name} {i} " * 20, "domain": name} for i in range(10) for name in NAMES]
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return file


@pytest.fixture(scope="module")
def parent(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with an expert for each of two domains; `klm` was held out."""
    layout = {**WIDE["layout"], "num_experts": 2}
    data = {"data": {"held_out_domains": ["klm"]}}
    return train_parent(tmp_path_factory.mktemp("results"), text, router="domain", layout=layout, task=data)


def adapted(text: Path, choice: str, name: str = "domain", **overrides: Any) -> CellConfig:
    """Return a cell that continues with `klm` alone, and has an expert for it after those of its parent."""
    options = {
        "router": {"name": name, "domains": ["ab", "xyz", "klm"]},
        "layout": {**WIDE["layout"], "num_experts": 3},
        "task": {"data": {"held_out_domains": ["ab", "xyz"]}},
        "init": {"new_experts": choice},
    }
    return child_config(text, **{**options, **overrides})


def test_training_a_new_expert_alone_keeps_the_other_domains_to_the_bit(
    parent: Run, text: Path, tmp_path: Path
) -> None:
    results = parent.folder.parents[1]
    config = adapted(text, "nearest", train={"trainable": "new_experts", "learning_rate": 0.05})
    result = Run(config, tmp_path / "child", results=results)()
    assert result is not None
    task = prepare_task(parent.config, tmp_path)
    before = Run(parent.config, parent.folder)()
    assert before is not None
    for domain in ("ab", "xyz"):
        name = f"bits_per_byte/{domain}"
        assert result.metrics[name] == before.metrics[name]
    assert result.metrics["bits_per_byte/klm"] < before.metrics["bits_per_byte/klm"]
    assert task.domains == ("ab", "xyz", "klm")  # there the new domain is last, here it is first
    assert prepare_task(config, tmp_path).domains == ("klm", "ab", "xyz")


@pytest.mark.parametrize("router", ["domain", "domain_posterior"])
def test_the_nearest_expert_has_the_lowest_loss_on_the_text_of_the_domain(
    router: str, parent: Run, text: Path, tmp_path: Path
) -> None:
    config = adapted(text, "nearest", router)
    model, _ = build_child(config, parent.folder.parents[1])
    task = prepare_task(config, tmp_path)
    before = model.state_dict()[STACK].clone()
    copied = fill_new_experts(config, model, task)
    # Slowly: the parent itself, one sequence at a time, as if it were of each of its domains.
    trained, losses = read_parent(parent), [0.0, 0.0]
    for step in range(NUM_BATCHES):
        batch = task.train_batch(config.train.batch_size, config.seed, step)
        for index in range(2):
            labelled = replace(batch, domain_B=torch.full_like(batch.domain_B, index))
            with torch.no_grad():
                output, _ = trained.eval()(labelled, batch_context(labelled, training=False, seed=0))
                losses[index] += task.loss(output, labelled).sum().item()
    nearest = losses.index(min(losses))
    assert copied[2].startswith(f"expert {nearest} of {('ab', 'xyz')[nearest]}, ")
    nats = min(losses) / (NUM_BATCHES * config.train.batch_size * 8)
    assert float(copied[2].split(", ")[1].removesuffix(" nats")) == pytest.approx(nats, abs=1e-4)
    after = model.state_dict()[STACK]
    assert torch.equal(after[2], before[nearest])
    assert torch.equal(after[:2], before[:2])


def test_the_mean_of_the_experts_with_any_router(text: Path, tmp_path: Path) -> None:
    layout = {**WIDE["layout"], "num_experts": 2}
    train_parent(tmp_path, text, router="top_k", layout=layout)
    config = child_config(text, router="top_k", layout={**layout, "num_experts": 4}, init={"new_experts": "mean"})
    model, loaded = build_child(config, tmp_path)
    fresh = build_initialised_model(config, prepare_task(config, tmp_path)).state_dict()
    assert loaded is not None
    assert loaded.new_experts[STACK] == (2, 3)
    gate = "backbone.blocks.0.feed_forward.router.gate.weight_ED"
    assert torch.equal(model.state_dict()[gate][2:], fresh[gate][2:])  # rows of new experts are drawn
    assert not torch.equal(model.state_dict()[gate][:2], fresh[gate][:2])
    assert torch.equal(model.state_dict()[STACK][2:], fresh[STACK][2:])
    copied = fill_new_experts(config, model, prepare_task(config, tmp_path))
    stack = model.state_dict()[STACK]
    torch.testing.assert_close(stack[2], (stack[0] + stack[1]) / 2)
    assert torch.equal(stack[2], stack[3])
    assert copied == {2: "the mean of the others", 3: "the mean of the others"}


@pytest.mark.parametrize("domains", [["xyz", "ab", "klm"], ["xyz", "klm"], ["ab", "xyz"]])
def test_experts_follow_their_domains_in_any_order_and_can_be_left_out(
    domains: list[str], parent: Run, text: Path
) -> None:
    held_out = [name for name in ("ab", "xyz") if "klm" in domains] or ["klm"]
    layout, data = {**WIDE["layout"], "num_experts": len(domains)}, {"data": {"held_out_domains": held_out}}
    config = adapted(text, "random", layout=layout, task=data)
    config = replace(config, router=replace(config.router, domains=domains))
    child, loaded = build_child(config, parent.folder.parents[1])
    assert loaded is not None
    before, after = (model.state_dict() for model in (read_parent(parent), child))
    for name in (STACK, "backbone.blocks.1.feed_forward.router.count_E"):
        for expert, domain in enumerate(domains):
            if domain != "klm":
                assert torch.equal(after[name][expert], before[name][["ab", "xyz"].index(domain)])
    assert loaded.new_experts.get(STACK, ()) == tuple(number for number, name in enumerate(domains) if name == "klm")


def test_experts_of_other_domains_are_refused(parent: Run, text: Path) -> None:
    results = parent.folder.parents[1]
    message = "the experts here are those of {}, and run 000000000000 has those of ab, xyz .allowed: some or all"
    for domains in (["klm", "ab", "xyz"], []):  # a new one first; the list is left out: the domains of training
        config = adapted(text, "random")
        config = replace(config, router=replace(config.router, domains=domains))
        with pytest.raises(UsageError, match=message.format(", ".join(domains or ["klm"]))):
            build_child(config, results)


def test_nearest_needs_a_domain_for_each_expert(parent: Run, text: Path) -> None:
    config = adapted(text, "nearest", layout={**WIDE["layout"], "num_experts": 4})
    model, _ = build_child(config, parent.folder.parents[1])
    with pytest.raises(UsageError, match="nearest, and expert 3 has no domain with text of training"):
        fill_new_experts(config, model, prepare_task(config, parent.folder))
