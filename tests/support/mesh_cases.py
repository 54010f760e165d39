"""The cases that are trained on every mesh: one for each feature that could behave differently there."""

from typing import Any

from support.model_options import ALL_OPTIONS
from support.process_group import Shape
from support.training_cases import write_text

from moebench.config import merge_settings
from moebench.experts.layout import LAYOUTS
from moebench.routing.router import ROUTERS

TRAIN = {"steps": 3, "batch_size": 8, "learning_rate": 2e-3, "clip_norm": 0.5, "log_every": 2, "warmup_steps": 0}
BALANCED = {"name": "top_k", "losses": {"load_balance": 0.1, "z": 0.01, "importance": 0.05}}
EVERY_N = {"name": "every_n", "n": 1, "num_experts": 4, "expert_width": 8}
SHORT = (
    "top_2",
    "router gshard",
    "router expert_choice",
    "accumulate",
    "padded",
    "encoder-decoder",
    "muon",
)
"""Cases of the matrix that every test run trains."""


def case(**overrides: Any) -> dict[str, Any]:
    """Return the overrides of a tiny cell."""
    return merge_settings({"train": TRAIN, "router": BALANCED, "layout": EVERY_N, "allow_noncausal": True}, overrides)


def _layout(name: str) -> dict[str, Any]:
    number = 12 if name == "heterogeneous" else 16  # three kinds of four
    options: dict[str, Any] = {"name": name, "num_experts": number, "match": "none"}
    return case(layout=options, router={"name": "top_k", "losses": {"load_balance": 0.1, "parameter_penalty": 0.1}})


def _router(name: str) -> dict[str, Any]:
    return case(router={"name": name}, layout=EVERY_N | {"num_experts": 16})


def _capacity(drop_order: str, overflow: str = "drop", router: str = "top_k", **options: Any) -> dict[str, Any]:
    capacity = {
        "capacity_factor_train": 0.7,
        "capacity_factor_eval": 0.9,
        "drop_order": drop_order,
        "overflow": overflow,
    }
    return case(layout=EVERY_N | capacity, router={"name": router, **options})


def _model_options(**overrides: Any) -> dict[str, Any]:
    # Heads of width 4: a LayerNorm of two values is hardly more than their order, which amplifies rounding.
    model = ALL_OPTIONS | {"tie_embeddings": True, "num_heads": 2, "num_kv_heads": 1}
    return merge_settings(case(model=model, train={"z_loss": 0.01, "weight_decay": 0.5}), overrides)


def _list_model_options() -> dict[str, dict[str, Any]]:
    return {
        "model options": _model_options(),
        "model options in micro-batches of two passes": _model_options(
            router={"name": "thor"}, train={"accumulate": 2}
        ),
        "model options, heads of a varying number": _model_options(
            layout={"name": "moduleformer", "match": "none"}, router={"name": "top_p"}
        ),
        "model options, attention experts": _model_options(layout={"name": "attention", "match": "none"}),
        "model options, whole models": _model_options(layout={"name": "whole_model", "match": "none"}),
        "model options, padded": _model_options(task={"name": "padded"}, model={"tie_embeddings": False}),
        # Without positions, a bias of normed keys changes no weight: its gradient is rounding alone.
        "model options, encoder-decoder": _model_options(
            task={"name": "span_corruption", "sequence_length": 8, "eval_windows": 2}, model={"norm": "rmsnorm"}
        ),
    }


def matrix() -> dict[str, dict[str, Any]]:
    """Return every case by name."""
    cases = {"top_2": case(), "bf16": case(train={"precision": "bf16"}), "dense": _router("dense")}
    cases |= {f"router {entry.name}": _router(entry.name) for entry in ROUTERS.entries() if entry.name != "dense"}
    cases["router oracle"] |= {"task": {"name": "clustered"}}  # the others read text
    cases |= {f"layout {entry.name}": _layout(entry.name) for entry in LAYOUTS.entries()}
    cases |= {f"capacity {order}": _capacity(order) for order in ("position", "score", "random")}
    cases |= _list_model_options()
    return cases | {
        "budget of top_p": case(router={"name": "top_p"}, layout={"match": "measured_flops"}),
        "capacity of gshard": _capacity("router", router="gshard"),
        "capacity of expert choice": _capacity("router", router="expert_choice"),
        "reroute": _capacity("score", "reroute"),
        "pass": _capacity("position", "pass"),
        "accumulate": case(train={"accumulate": 2}),
        "accumulate 4 of a ragged batch": case(train={"accumulate": 4, "batch_size": 12}),
        "rewards in micro-batches": case(router={"name": "reinforce"}, train={"accumulate": 2}),
        "two passes over micro-batches": case(router={"name": "thor"}, train={"accumulate": 2}),
        "zero rows": case(train={"batch_size": 1}),
        "ragged": case(train={"batch_size": 3}),
        # One expert for all tokens: the other experts, and the processes that hold them, are idle.
        "idle experts": case(router={"name": "collapsed"}),
        "grouped expert choice": case(
            layout={"name": "prototypes", "groups": 2, "num_experts": 8, "match": "none"},
            router={"name": "expert_choice"},
        ),
        "hierarchical noise": case(
            layout={"name": "hierarchical", "groups": 4, "match": "none"}, router={"name": "noisy_top_k"}
        ),
        "shared and residual, recomputed": case(
            layout={"name": "residual", "num_experts": 8, "recompute": True, "match": "none"}, router={"name": "switch"}
        ),
        # Three groups on four processes, and a smaller group at the end of the evaluation.
        "groups of sequences": case(
            router={"name": "mixture_of_tokens", "group_size": 2}, train={"batch_size": 6}, task={"eval_windows": 3}
        ),
        "shared embedding": case(router={"name": "speech_moe", "embedding": "shared", "embedding_width": 4}),
        "padded": case(task={"name": "padded"}),
        "padded expert choice": case(task={"name": "padded"}, router={"name": "expert_choice"}),
        "padded, accumulated, with a capacity": _capacity("score")
        | {"task": {"name": "padded"}, "train": TRAIN | {"accumulate": 2}},
        "masked language": case(task={"name": "masked_language", "sequence_length": 8, "eval_windows": 2}),
        "encoder-decoder": case(task={"name": "span_corruption", "sequence_length": 8, "eval_windows": 2}),
        "deep experts": case(layout=EVERY_N | {"depth": 2}),
        "muon": case(
            layout={"name": "zero_computation", "num_experts": 8, "match": "none"},
            train={"optimizer": "muon", "accumulate": 2, "router_learning_rate": 1e-2},
        ),
    }


def fits(name: str, shape: Shape) -> bool:
    """Return whether a case can be trained on a mesh."""
    if shape.expert == 1:
        return True
    router = ROUTERS.get(name.removeprefix("router ")).item if name.startswith("router ") else None
    return name not in ("layout whole_model", "model options, whole models") and not (
        router and router.form.is_merged
    )  # both need all experts on every process


__all__ = ["SHORT", "case", "fits", "matrix", "write_text"]
