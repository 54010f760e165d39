"""Compatibility rules: every rule refuses what it names, and what it names alone."""

from typing import Any

import pytest
import torch

from moebench.compatibility import CELL_RULES, MODEL_RULES, Combination, check_cell, list_marks
from moebench.config import resolve
from moebench.errors import UsageError
from moebench.models.plan import plan_blocks

CAPACITY = {"capacity_factor_train": 1.0}
SHARED_EMBEDDING = {"name": "speech_moe", "embedding": "shared"}
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    (
        "refuse_total_params_without_matching",
        {"layout": {"total_params": 2.0}},
        "layout.total_params=2 needs layout.match=params, got flops",
    ),
    *[
        (
            "refuse_merging_unequal_experts",
            {"router": "lory", "layout": layout},
            f"router.name: 'lory' sums the parameters of experts, and those of layout '{layout}' are not",
        )
        for layout in ("heterogeneous", "zero_computation", "hierarchical", "attention", "whole_model")
    ],
    *[
        (
            "refuse_mixing_outside_feed_forward",
            {"router": "soft_moe", "layout": layout},
            f"router.name: 'soft_moe' mixes tokens into slots, and layout '{layout}' needs to know where each token",
        )
        for layout in ("attention", "whole_model", "prototypes")
    ],
    *[
        (
            "refuse_chain",
            {"router": "act", "layout": layout},
            f"router.name: 'act' sends tokens through one expert after another, and layout '{layout}' applies experts",
        )
        for layout in ("attention", "whole_model", "hierarchical")
    ],
    *[
        (
            "refuse_chain",
            {"router": "act", "layout": {key: 1.5}},
            f"layout.{key} must be null with router 'act', got 1.5: no step can be left out",
        )
        for key in ("capacity_factor_train", "capacity_factor_eval")
    ],
    *[
        (
            "refuse_feed_forward_options",
            {"layout": {"name": layout, "overflow": "pass"}},
            f"layout.overflow: 'pass' has no meaning in layout '{layout}' (allowed: drop, reroute)",
        )
        for layout in ("attention", "whole_model")
    ],
    (
        "refuse_feed_forward_options",
        {"layout": {"name": "whole_model", "expert_dropout": 0.1}},
        "layout.expert_dropout must be 0 in layout 'whole_model', got 0.1",
    ),
    (
        "refuse_router_options",
        {"router": {"name": "top_k", "top_k": 17}},
        "router.top_k=17 does not fit layout.num_experts=16 (allowed: 2 to 16)",
    ),
    (
        "refuse_router_options",
        {"router": "switch", "layout": "fine_grained"},
        "router.name: 'switch' is fixed at 1 experts per token, and layout.split=",
    ),
    ("refuse_losses", {"router": {"losses": {"load_balanc": 1.0}}}, "router.losses: 'load_balanc' is unknown."),
    ("refuse_losses", {"router": {"losses": {"z": -1.0}}}, "router.losses.z must be at least 0, got -1"),
    (
        "refuse_missing_gpu",
        {"train": {"device": "cuda"}},
        "train.device: 'cuda' was asked for, but torch finds no CUDA",
    ),
    (
        "refuse_rerouting_without_scores",
        {"router": "hash", "layout": CAPACITY | {"overflow": "reroute"}},
        "layout.overflow: 'reroute' needs scores, which router 'hash' does not make (allowed: drop, pass)",
    ),
    (
        "refuse_sharding",
        {"router": "lory", "parallel": {"expert": 2}},
        "parallel.expert=2: router 'lory' merges the parameters of all experts, so every process needs them",
    ),
    (
        "refuse_sharding",
        {"layout": {"num_experts": 6}, "parallel": {"expert": 4}},
        "parallel.expert=4 does not divide the 6 experts of layout 'every_n' (try 1, 2, 3, 6)",
    ),
    (
        "refuse_sharding",
        {"layout": {"name": "zero_computation", "num_experts": 7}, "parallel": {"expert": 2}},
        "parallel.expert=2 does not divide the 7 experts of one kind of layout 'zero_computation' (try 1, 7)",
    ),
    (
        "refuse_sharding",
        {"layout": "whole_model", "parallel": {"expert": 2}},
        "parallel.expert=2: the experts of layout 'whole_model' are whole models, which stay on every process",
    ),
    (
        "refuse_sharding",
        {"train": {"compile": True}, "parallel": {"expert": 2}},
        "train.compile: experts on parallel.expert=2 processes are not compiled (allowed: false)",
    ),
    (
        "refuse_divided_sequence_groups",
        {"router": {"name": "mixture_of_tokens", "group_size": 3}, "train": {"batch_size": 4}},
        "train.batch_size=4 does not divide into groups of 3 sequences, which router 'mixture_of_tokens' mixes",
    ),
    (
        "refuse_divided_sequence_groups",
        {"router": {"name": "mixture_of_tokens", "group_size": 4}, "train": {"batch_size": 6, "accumulate": 3}},
        "train.batch_size=6 in train.accumulate=3 parts does not divide into groups of 4 sequences, which router"
        " 'mixture_of_tokens' mixes (allowed: a multiple of 12,",
    ),
    *[
        (
            "refuse_experts_in_missing_half",
            {"layout": {"experts_in": half}},
            f"layout.experts_in: '{half}' is a half of an encoder-decoder model, which task 'language' does not train",
        )
        for half in ("encoder", "decoder")
    ],
    (
        "refuse_in_encoder_decoder",
        {"task": "span_corruption", "layout": "whole_model"},
        "layout.name: the experts of layout 'whole_model' are whole models, which do not read an encoder;",
    ),
    (
        "refuse_masked_documents",
        {"task": {"name": "span_corruption", "data": {"mask_documents": True}}},
        "task.data.mask_documents: true was given, but the decoder of task 'span_corruption' reads all documents",
    ),
    *[
        (
            "refuse_masked_documents",
            {"task": {"name": "language", "data": {"mask_documents": True}}, "router": router},
            f"task.data.mask_documents: true was given, but router '{router}' reads other tokens of the sequence",
        )
        for router in ("hash_bigram", "lory", "domain_posterior")
    ],
    (
        "refuse_masked_documents",
        {"task": {"name": "masked_language", "data": {"mask_documents": True}}, "layout": "whole_model"},
        "task.data.mask_documents: true was given, but in layout 'whole_model' tokens attend inside an expert",
    ),
    (
        "refuse_missing_features",
        {"router": "oracle"},
        "router.name: 'oracle' needs a label of each token, which task 'language' does not have (tasks that have",
    ),
    (
        "refuse_missing_features",
        {"task": "span_corruption", "router": SHARED_EMBEDDING},
        "router.name: 'speech_moe' needs one network before all layers (router.embedding=shared), which task 'span_",
    ),
    *[
        (
            "refuse_output_options",
            {"task": task, "model": {"tie_embeddings": True}},
            f"model.tie_embeddings: task '{task}' does not read and predict ids of one vocabulary (allowed: false)",
        )
        for task in ("vision", "speech", "clustered")
    ],
    (
        "refuse_output_options",
        {"task": "clustered", "train": {"z_loss": 1e-4}},
        "train.z_loss must be 0, got 0.0001: task 'clustered' predicts vectors without logits",
    ),
    ("refuse_leak", {"router": "expert_choice"}, "router.name: 'expert_choice' is not causal: "),
    (
        "refuse_leak",
        {"router": "gshard", "layout": CAPACITY},
        "router.name: 'gshard' is not causal with a capacity",
    ),
    (
        "refuse_leak",
        {"layout": CAPACITY | {"drop_order": "score"}},
        "layout.drop_order: 'score' lets later tokens push out earlier ones (try position); task 'language'",
    ),
    (
        "refuse_leak",
        {"layout": CAPACITY | {"overflow": "reroute"}},
        "layout.overflow: 'reroute' sends earlier tokens only where later ones leave a slot (try drop or pass); task",
    ),
]


@pytest.mark.parametrize(("rule", "raw", "message"), REFUSALS, ids=[rule for rule, *_ in REFUSALS])
def test_rule_refuses_in_one_line(
    monkeypatch: pytest.MonkeyPatch, rule: str, raw: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = resolve(raw)
    with pytest.raises(UsageError) as refusal:
        check_cell(config)
    assert str(refusal.value).startswith(message)
    assert "\n" not in str(refusal.value)
    refusing = [each.__name__ for each in (*MODEL_RULES, *CELL_RULES) if next(each(Combination.of(config)), None)]
    assert refusing[0] == rule


def test_every_rule_has_a_case() -> None:
    assert [rule.__name__ for rule in (*MODEL_RULES, *CELL_RULES)] == list(dict.fromkeys(rule for rule, *_ in REFUSALS))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        pytest.param(raw, message, id=rule)
        for rule, raw, message in REFUSALS
        if rule in {each.__name__ for each in MODEL_RULES}
    ],
)
def test_model_is_not_planned_for_what_a_model_rule_refuses(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refusal:
        plan_blocks(resolve(raw))
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize(
    "raw",
    [
        {"router": "dense", "layout": {"name": "whole_model", "overflow": "pass"}},
        {"router": "dense", "layout": "whole_model", "task": "span_corruption", "parallel": {"expert": 2}},
        {"layout": {"name": "zero_computation", "num_experts": 6}, "parallel": {"expert": 2}},  # and 1 that copies
        {"router": "lory", "parallel": {"data": 2}},
        {"router": "hash", "layout": {"overflow": "reroute"}},  # dropless: nothing is rerouted
        {"router": "hash", "layout": CAPACITY | {"overflow": "pass"}},
        {"router": "oracle", "task": "clustered"},
        {"router": "act", "layout": {"capacity_factor_train": float("inf")}},
    ],
    ids=str,
)
def test_compatible_combination_is_accepted(raw: dict[str, Any]) -> None:
    check_cell(resolve(raw))


@pytest.mark.parametrize(
    ("router", "layout", "is_causal"),
    [
        ("switch", {}, True),
        ("switch", CAPACITY, True),
        ("switch", CAPACITY | {"drop_order": "position"}, True),
        ("switch", CAPACITY | {"drop_order": "score"}, False),
        ("switch", CAPACITY | {"drop_order": "priority"}, False),
        ("switch", CAPACITY | {"drop_order": "random"}, False),
        ("switch", {"drop_order": "score"}, True),  # dropless: the order does not matter
        ("switch", {"capacity_factor_train": float("inf"), "drop_order": "score"}, True),
        ("switch", CAPACITY | {"overflow": "pass"}, True),
        ("switch", CAPACITY | {"overflow": "reroute"}, False),
        ("switch", {"capacity_factor_eval": 1.0, "overflow": "reroute", "drop_order": "position"}, False),
        ("switch", {"overflow": "reroute"}, True),  # dropless: nothing is rerouted
        ("gshard", {}, True),
        ("gshard", CAPACITY, False),
        ("gshard", {"capacity_factor_eval": 1.0}, False),
        ("gshard", {"capacity_factor_eval": 1.0, "drop_order": "position"}, True),
        ("expert_choice", {}, False),
        ("expert_choice", CAPACITY | {"drop_order": "position"}, False),
        ("soft_moe", {}, False),
        ("dense", {}, True),
        ("dense", CAPACITY | {"overflow": "reroute", "drop_order": "score"}, True),
    ],
)
def test_noncausal_cell_is_refused_or_marked(router: str, layout: dict[str, Any], is_causal: bool) -> None:
    config = resolve({"router": router, "layout": layout})
    assert list_marks(config) == (() if is_causal else ("non-causal",))
    if is_causal:
        check_cell(config)
        return
    with pytest.raises(
        UsageError, match=r"^(router.name: .* is not causal|layout.(drop_order|overflow): ).*allow_noncausal=true"
    ):
        check_cell(config)
    check_cell(resolve({"router": router, "layout": layout, "allow_noncausal": True}))


def test_refusal_names_the_option_that_is_not_causal() -> None:
    config = resolve({"router": "switch", "layout": CAPACITY | {"drop_order": "score"}})
    with pytest.raises(UsageError) as refusal:
        check_cell(config)
    # Not the router: its own reason ("routed by its own vector") would contradict the refusal.
    assert "drop_order" in str(refusal.value)


@pytest.mark.parametrize("router", ["hash", "random"])
def test_rerouting_without_scores_is_refused_even_where_noncausal_is_allowed(router: str) -> None:
    layout = CAPACITY | {"overflow": "reroute"}
    with pytest.raises(UsageError, match=rf"^layout\.overflow: 'reroute' needs scores, which router '{router}' does"):
        check_cell(resolve({"router": router, "layout": layout, "allow_noncausal": True}))
    check_cell(resolve({"router": router, "layout": layout | {"overflow": "pass"}}))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_expert_dropout_out_of_range_is_refused(rate: float) -> None:
    with pytest.raises(UsageError, match=rf"layout\.expert_dropout must be at least 0 and below 1, got {rate}"):
        resolve({"layout": {"expert_dropout": rate}})
