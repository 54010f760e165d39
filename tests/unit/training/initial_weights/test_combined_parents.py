"""Several parents in one child: means by hand, experts against a slow oracle, exact functions at step 0, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.branches import Branch, draw_branches, merge
from support.parent_runs import WIDE, compute_logits
from support.training_cases import tiny_config, write_text

from moebench.config import cell_id, resolve
from moebench.errors import UsageError
from moebench.training.evaluation import batch_context
from moebench.training.initial_weights.branch_domains import assign_parents
from moebench.training.initial_weights.record import describe_loaded, summarise_loaded
from moebench.training.model import build_initialised_model, prepare_task

STACKS = {"bank.w_in_EDF": "w_in_DF", "bank.w_out_EFD": "w_out_FD"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def branches(text: Path, cache: Path) -> list[Branch]:
    return draw_branches(text, cache)


@pytest.mark.parametrize(("weights", "shares"), [([], (0.5, 0.5)), ([3, 1], (0.75, 0.25))])
def test_an_average_is_the_weighted_mean_of_all_weights(
    weights: list[float], shares: tuple[float, float], branches: list[Branch], text: Path, cache: Path
) -> None:
    init = {"combine": "average", "combine_weights": weights}
    _, model, loaded = merge(text, cache, branches, init, router="dense")
    for name, value in model.state_dict().items():
        expected = sum(share * branch.state[name].double() for share, branch in zip(shares, branches, strict=True))
        assert torch.equal(value, expected.float())
    assert set(loaded.combined.values()) == {"averaged over the parents"}
    assert not loaded.plan.new


@pytest.mark.parametrize(
    ("parents", "child", "is_averaged"),
    [
        (("top_k", "top_k"), "top_k", True),
        (("switch", "top_k"), "switch", False),
        (("top_k", "switch"), "switch", False),
        (("loss_free", "top_k"), "top_k", False),
        (("top_k", "top_k"), "switch", False),
    ],
)
def test_routers_are_averaged_where_all_parents_and_the_child_have_one(
    parents: tuple[str, str], child: str, is_averaged: bool, text: Path, cache: Path
) -> None:
    configs = [
        tiny_config(text, router=router, seed=seed, layout={**WIDE["layout"], "num_experts": 2})
        for seed, router in enumerate(parents)
    ]
    sparse = [
        Branch(config.router.name, config, build_initialised_model(config, prepare_task(config, cache)))
        for config in configs
    ]
    config, model, loaded = merge(text, cache, sparse, {"combine": "average"}, router=child)
    initial = build_initialised_model(config, prepare_task(config, cache)).state_dict()
    routers = [name for name in initial if ".router." in name]
    assert routers
    for name, value in model.state_dict().items():
        if name in routers and not is_averaged:
            assert name in loaded.plan.new
            assert torch.equal(value, initial[name])
        else:
            assert loaded.combined[name] == "averaged over the parents"
            assert torch.equal(value, ((sparse[0].state[name].double() + sparse[1].state[name]) / 2).float())


@pytest.mark.parametrize("num_experts", [2, 4])
def test_experts_are_the_networks_of_the_parents_in_their_order(
    num_experts: int, branches: list[Branch], text: Path, cache: Path
) -> None:
    layout = {**WIDE["layout"], "num_experts": num_experts}
    _, model, loaded = merge(text, cache, branches, {"combine": "experts"}, router="top_k", layout=layout)
    for name, value in model.state_dict().items():
        ending = next((ending for ending in STACKS if name.endswith(ending)), None)
        if ".router." in name:
            assert name in loaded.plan.new
        elif ending:
            source = name.replace(ending, STACKS[ending])
            assert loaded.combined[name] == "one parent in each expert"
            for expert in range(num_experts):
                assert torch.equal(value[expert], branches[expert % 2].state[source])
        else:
            assert loaded.combined[name] == "averaged over the parents"
            assert torch.equal(value, ((branches[0].state[name].double() + branches[1].state[name]) / 2).float())
    assert not loaded.plan.unused
    record = describe_loaded(loaded, {name: value.shape for name, value in model.state_dict().items()})
    assert record["combined"]["one parent in each expert"] == {
        f"backbone.blocks.*.feed_forward.{ending}": 2 for ending in STACKS
    }
    assert "experts of branch 0, branch 1" in summarise_loaded(record)


def test_a_shared_network_is_the_mean_of_the_parents_networks(branches: list[Branch], text: Path, cache: Path) -> None:
    layout = {"name": "residual", "num_experts": 2, **WIDE["layout"]}
    _, model, _ = merge(text, cache, branches, {"combine": "experts"}, router="switch", layout=layout)
    shared = {name: value for name, value in model.state_dict().items() if ".shared." in name}
    assert shared
    for name, value in shared.items():
        of_parents = [branch.state[name.replace(".shared.", ".")].double() for branch in branches]
        assert torch.equal(value, ((of_parents[0] + of_parents[1]) / 2).float())


@pytest.mark.parametrize(
    ("router", "layout"),
    [("top_k", "every_n"), ("all_experts", "every_n"), ("domain", "every_n"), ("domain", "whole_model")],
)
def test_equal_parents_are_merged_to_their_function(
    router: str, layout: str, branches: list[Branch], text: Path, cache: Path
) -> None:
    equal = [branches[0], Branch("again", branches[1].config, branches[0].model)]
    options = {"name": layout, "num_experts": 2, **WIDE["layout"]}
    _, model, _ = merge(text, cache, equal, {"combine": "experts"}, router=router, layout=options)
    expected = compute_logits(branches[0].model, branches[0].config, cache)
    torch.testing.assert_close(compute_logits(model, branches[0].config, cache), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["every_n", "whole_model"])
@pytest.mark.parametrize("is_reversed", [False, True])
def test_each_domain_has_the_model_of_its_branch_where_the_shared_parts_are_equal(
    layout: str, is_reversed: bool, text: Path, cache: Path
) -> None:
    branches = draw_branches(text, cache, is_shared_equal=True)
    if layout == "whole_model":  # blocks differ whole; embedding, last norm and head are equal
        other = draw_branches(text, cache)[1]
        blocks = {name: value for name, value in other.state.items() if ".blocks." in name}
        branches[1].model.load_state_dict({**branches[0].state, **blocks})
        branches[1] = Branch("branch 1", branches[1].config, branches[1].model)
    options = {"name": layout, "num_experts": 2, **WIDE["layout"]}
    given = branches[::-1] if is_reversed else branches  # an expert is that of its domain, whatever the order
    config, model, _ = merge(text, cache, given, {"combine": "experts"}, router="domain", layout=options)
    task = prepare_task(config, cache)
    for batch in task.eval_batches("test", 1):
        (domain,) = batch.domain_B.tolist()
        ctx = batch_context(batch, training=False, seed=0)
        with torch.no_grad():
            merged, _ = model.eval()(batch, ctx)
            expected, _ = branches[domain].model.eval()(batch, ctx)
            other, _ = branches[1 - domain].model.eval()(batch, ctx)
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)
        assert not torch.allclose(merged, other, atol=1e-2)


def test_experts_follow_domains_by_name() -> None:
    def settings(*held_out: str) -> dict[str, Any]:
        return {"task": {"data": {"held_out_domains": list(held_out)}}}

    config = resolve({"layout": {"num_experts": 3}})
    parents = [settings("b", "c"), settings("a", "c"), settings("a", "b")]  # of a, of b, of c
    assert assign_parents(config, parents) == [0, 1, 2]
    assert assign_parents(config, parents, ("c", "a", "b")) == [2, 0, 1]
    random_split = [settings("x"), settings("x"), settings("x")]
    assert assign_parents(config, random_split, ("c", "a", "b")) == [0, 1, 2]
    two = resolve({"layout": {"num_experts": 2}})
    groups = [settings("b", "d"), settings("a", "c")]  # of a and c, of b and d
    assert assign_parents(two, groups, ("b", "a", "d", "c")) == [1, 0]
    with pytest.raises(UsageError, match="expert 0 is that of a, b, on which 0 parents were trained"):
        assign_parents(two, groups, ("a", "c", "b", "d"))
    with pytest.raises(UsageError, match="a multiple of the 3 parents"):
        assign_parents(two, parents)


@pytest.mark.parametrize(
    ("overrides", "init", "message"),
    [
        ({"router": "dense"}, {"combine": "experts"}, "init.combine: experts, and the model has none"),
        (
            {"router": "top_k", "layout": {"expert_width": 8, "num_experts": 2}},
            {"combine": "experts"},
            "has the shape",
        ),
        ({"router": "switch", "layout": {**WIDE["layout"], "num_experts": 3}}, {"combine": "experts"}, "a multiple of"),
        (
            {"router": "switch", "layout": {"name": "attention", "num_experts": 2}},
            {"combine": "experts"},
            "is of an expert that is no single network",
        ),
        ({"router": "dense"}, {"combine": "average", "combine_weights": [1, 2, 3]}, "init.combine_weights"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    overrides: dict[str, Any], init: dict[str, Any], message: str, branches: list[Branch], text: Path, cache: Path
) -> None:
    with pytest.raises(UsageError) as error:
        merge(text, cache, branches, init, **overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_parents_of_other_shapes_and_sparse_parents_are_refused(
    branches: list[Branch], text: Path, cache: Path
) -> None:
    wider = tiny_config(text, router="dense", model={"ffn_width": 32}, **WIDE)
    other = Branch("wide", wider, build_initialised_model(wider, prepare_task(wider, cache)))
    with pytest.raises(UsageError, match=r"has the shape \[8, 16\] in branch 0 and \[8, 32\] in wide"):
        merge(text, cache, [branches[0], other], {"combine": "average"}, router="dense")
    sparse = tiny_config(text, router="top_k", **WIDE)
    expert_models = [Branch("sparse", sparse, build_initialised_model(sparse, prepare_task(sparse, cache)))] * 2
    with pytest.raises(UsageError, match=r"^init.combine: experts, and sparse has experts already \(allowed: dense"):
        merge(text, cache, expert_models, {"combine": "experts"}, router="top_k")
    for parents in ([branches[0], expert_models[0]], [expert_models[0], branches[0]]):
        with pytest.raises(UsageError, match=r"^init.combine: sparse has experts and branch 0 has none \(allowed"):
            merge(text, cache, parents, {"combine": "experts"}, router="top_k")


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"from": ["run:ab", "run:cd"]}, "init.from must be one parent, or init.combine"),
        ({"combine": "average"}, "init.combine must be null where init.from is null"),
        ({"from": "run:ab", "combine": "average", "combine_weights": [0]}, "init.combine_weights must be positive"),
        ({"from": "run:ab", "combine_weights": [1]}, "init.combine_weights must be none where"),
        ({"from": ["run:ab", "run:cd"], "combine": "experts", "upcycle": {"noise": 0.1}}, "init.combine must be"),
        ({"from": ["run:ab", "run:cd"], "combine": "sum"}, "init.combine: 'sum' was given"),
    ],
)
def test_sections_that_contradict_themselves(init: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        resolve({"init": init})
    assert str(error.value).startswith(message)


def test_each_option_and_the_order_of_parents_are_in_the_id() -> None:
    given = {"from": ["run:0123456789ab", "run:ba9876543210"], "combine": "average"}
    changes: list[dict[str, Any]] = [
        {},
        {"from": given["from"][::-1]},
        {"combine": "experts"},
        {"combine_weights": [1, 2]},
        {"new_experts": "mean"},
    ]
    assert len({cell_id(resolve({"init": {**given, **change}}), "data") for change in changes}) == len(changes)
