"""Stages seed, branch and merge: all runs of a stage as the parents of one model."""

import json
from typing import Any

import pytest
from support.command_line import CommandLine, WarmCommandLine
from support.results_folder import Results

BRANCHES = {"task.data.held_out_domains": [["a"], ["b"]]}
EXPERTS: dict[str, Any] = {"router": "top_k", "init": {"from": "stage:branch", "combine": "experts"}}
ARMS: list[dict[str, Any]] = [
    {"label": "dense", "init": {"from": "stage:seed"}, "train": {"steps": 8}},
    {"label": "average", "init": {"from": "stage:branch", "combine": "average"}},
    {"label": "experts", **EXPERTS},
    {"label": "by domain", **EXPERTS, "router": "domain"},
]


def write(cli: CommandLine, arms: list[dict[str, Any]], num_experts: int = 2) -> None:
    stages = [
        {"name": "seed"},
        {"name": "branch", "base": {"train": {"skip_batches": 4}}, "grid": BRANCHES},
        {"name": "merge", "base": {"train": {"skip_batches": 12}}, "grid": {"arm": arms}},
    ]
    layout = {"name": "every_n", "num_experts": num_experts, "match": "none"}
    cli.write(
        stages=stages, grid={}, seeds=[0], baseline=None, base={"router": "dense", "layout": layout}, train={"steps": 4}
    )


@pytest.mark.slow
def test_branches_become_one_model(cli: CommandLine, warm: WarmCommandLine) -> None:
    write(cli, ARMS)
    run = warm.train(cli)
    assert run.code == 0, run.err
    assert "stage branch: 2 runs that later ones start from" in run.err
    results = Results(cli.folder / "results")
    branch = {domain: results.folder(f"held_out_domains=['{domain}']", 0).name for domain in "ab"}
    records = {
        arm["label"]: json.loads((results.folder(arm["label"], 0) / "init.json").read_text()) for arm in ARMS[1:]
    }
    in_order = f"run {branch['a']}, run {branch['b']}"
    assert records["average"]["parent"] == f"the mean of {in_order}"
    assert records["experts"]["parent"] == f"experts of {in_order}, all else averaged"
    # By name: the first domain, a, is that of the branch that holds out b.
    assert records["by domain"]["parent"] == f"experts of run {branch['b']}, run {branch['a']}, all else averaged"
    assert set(records["experts"]["combined"]) == {"averaged over the parents", "one parent in each expert"}
    assert list(records["experts"]["new"]) == ["backbone.blocks.*.feed_forward.router.gate.weight_ED"]
    again = warm.train(cli, "--json")
    assert (again.code, again.json["trained"]) == (0, [])


@pytest.mark.parametrize(
    ("arm", "num_experts", "message"),
    [
        ({"label": "one", "init": {"from": "stage:branch"}}, 2, "would start from 2 runs of stage branch"),
        ({"label": "three", **EXPERTS}, 3, "three: layout.num_experts must be a multiple of the 2 parents"),
        ({"label": "none", **EXPERTS, "router": "dense"}, 2, "none: init.combine: experts, and the model has none"),
        (
            {"label": "near", **EXPERTS, "init": {**EXPERTS["init"], "new_experts": "nearest"}},
            2,
            "near: init.new_experts must be random or mean with router 'top_k', got nearest",
        ),
    ],
)
def test_a_merge_that_cannot_work_is_refused_before_anything_is_trained(
    arm: dict[str, Any], num_experts: int, message: str, cli: CommandLine, warm: WarmCommandLine
) -> None:
    write(cli, [arm], num_experts)
    ended = warm(cli, "run", "./tiny.yaml", "--tracker", "none")
    assert ended.code == 2, ended.err
    assert message in ended.err
    assert ended.err.strip().count("\n") == 0
    assert not Results(cli.folder / "results").folders()
