"""Options of layouts that do not fit the model or the router are refused in one line that names the key."""

from typing import Any

import pytest
from support.planned_layouts import backbone_of, config_of, cost

from moebench.errors import UsageError
from moebench.models.plan import plan_blocks


@pytest.mark.parametrize(
    ("layout", "router", "words"),
    [
        ({"name": "first_n", "n": 5}, "switch", r"layout.n must be from 1 to 4 \(model.num_layers=4\), got 5"),
        ({"name": "last_n", "n": 0}, "switch", "layout.n must be from 1 to 4 .*got 0"),
        (
            {"name": "last_n", "n": 3, "stride": 2},
            "switch",
            r"layout.n must be from 1 to 2 \(model.num_layers=4, layout.stride=2\), got 3",
        ),
        ({"name": "last_n", "stride": 5}, "switch", r"layout.stride must be from 1 to model.num_layers=4, got 5"),
        ({"name": "last_n", "stride": 0}, "switch", "layout.stride must be at least 1, got 0"),
        ({"name": "middle", "n": 9}, "switch", "layout.n must be from 1 to 4 .*got 9"),
        ({"name": "every_n", "n": 5}, "switch", "layout.n=5 leaves no block with experts: model.num_layers=4"),
        ({"name": "residual", "blocks": [4]}, "switch", "layout.blocks must name different blocks from 0 to 3"),
        ({"name": "residual", "blocks": [1, 1]}, "switch", r"layout.blocks .*got \[1, 1\]"),
        ({"name": "residual", "blocks": []}, "switch", "layout.blocks .*at least one"),
        ({"name": "listed", "blocks": [{"block": 7}]}, "switch", r"layout.blocks .*got \[7\]"),
        ({"name": "listed", "blocks": [{"block": 0, "depth": 0}]}, "switch", "layout.blocks: depth must be at least 1"),
        ({"name": "listed", "blocks": [{"num_experts": 4}]}, "switch", "block"),
        ({"name": "pyramid", "factor": 0}, "switch", "layout.factor must be between 1 and 1024, got 0"),
        ({"name": "pyramid", "top": 5}, "switch", "layout.top must be from 0 to the 4 blocks with experts, got 5"),
        ({"name": "fine_grained", "split": 0}, "top_k", "layout.split must be at least 1, got 0"),
        ({"name": "fine_grained", "shared": -1}, "top_k", "layout.shared must be between 0 and 16384, got -1"),
        ({"name": "fine_grained"}, "switch", "'switch' is fixed at 1 experts per token, and layout.split=4 asks for 4"),
        ({"name": "fine_grained"}, "hash", r"'hash' is fixed at 1 .*layout.split=1.*top_k: 1, renormalise: false"),
        ({"name": "fine_grained", "num_experts": 2}, {"name": "top_k", "top_k": 3}, "router.top_k=12 does not fit"),
        ({"name": "heterogeneous", "widths": []}, "switch", "layout.widths must be a list of numbers greater than 0"),
        ({"name": "heterogeneous", "depths": [0]}, "switch", "layout.depths must be a list of numbers greater than 0"),
        ({"name": "heterogeneous", "num_experts": 2}, "switch", "layout.widths names 3 sizes for layout.num_experts=2"),
        ({"name": "heterogeneous", "depth": 2}, "switch", "layout.depth must be 1 in layout 'heterogeneous'"),
        ({"name": "whole_model", "depth": 2}, "switch", "layout.depth must be 1 in layout 'whole_model'"),
        ({"name": "attention", "depth": 2}, "switch", "layout.depth must be 1 in layout 'attention'"),
        ({"name": "zero_computation", "copy": -1}, "switch", "layout.copy must be between 0 and 16384, got -1"),
        ({"name": "hierarchical", "groups": 3}, "switch", "layout.groups=3 does not divide layout.num_experts=16"),
        ({"name": "hierarchical", "groups": 16}, "top_k", r"router.top_k=2 .*num_experts=1 .*1 experts in each of"),
        ({"name": "prototypes", "groups": 0}, "switch", r"layout.groups=0 does not divide .*allowed: 1, 2, 4, 8, 16"),
        ({"name": "prototypes", "groups": 16}, "top_k", "here 1 experts in each of layout.groups=16"),
        ({"name": "attention", "feed_forward": "none"}, "switch", "layout.feed_forward: "),
        ({"name": "every_n", "match": "time"}, "switch", "layout.match: "),
        ({"name": "every_n", "depth": 0}, "switch", "layout.depth must be at least 1, got 0"),
        (
            {"name": "every_n", "total_params": 2.0},
            "switch",
            "layout.total_params=2 needs layout.match=params, got flops",
        ),
        ({"name": "every_n", "total_params": 0.0, "match": "params"}, "switch", "layout.total_params must be greater"),
        ({"name": "every_n", "expert_activation": "relu"}, "switch", "layout.expert_activation: "),
        ({"name": "every_n", "blocks": [1]}, "switch", "layout.blocks: layout 'every_n' has no key 'blocks'"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(layout: dict[str, Any], router: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        plan_blocks(config_of(layout, router))
    assert "\n" not in str(caught.value)


def test_nothing_left_for_the_network_is_refused_with_the_next_width_that_fits() -> None:
    layout = {"name": "attention", "num_experts": 8, "keys_values": "apart"}
    with pytest.raises(UsageError, match=r"^model\.ffn_width=64 leaves nothing for 8 experts per token") as caught:
        backbone_of(layout, "all_experts")
    assert "layout.match=none" in str(caught.value)
    named = int(str(caught.value).split("next that can: model.ffn_width=")[1].split(";")[0])
    assert cost(layout, "all_experts", ffn_width=named).flops_per_token > 0
    with pytest.raises(UsageError, match=rf"model.ffn_width={named - 1} "):
        backbone_of(layout, "all_experts", ffn_width=named - 1)
    assert cost({**layout, "match": "none"}, "all_experts").flops_per_token > 0
