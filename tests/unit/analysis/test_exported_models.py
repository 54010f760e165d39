"""Exported models: logits in transformers are those of moebench; what transformers cannot express is refused."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.random_models import RandomRun, compute_logits, draw_tokens
from support.training_cases import write_text

import moebench
from moebench.errors import UsageError
from moebench.experts.layout import LAYOUTS
from moebench.pretrained.export.routing_rules import RULES
from moebench.routing.router import ROUTERS

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
SWIGLU = {"activation": "swiglu", "num_heads": 2, "num_kv_heads": 1}
TOLERANCE = 1e-5

DENSE: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {}),
    "all biases, tied": ("llama", {"attention_bias": "all", "ffn_bias": True, "tie_embeddings": True}),
    "tied without a scale": ("llama", {"tie_embeddings": True, "embedding_scale": 1.0}),
    "scales": ("llama", {"embedding_scale": 3.0, "residual_scale": 0.5, "norm_eps": 0.01}),
    "linear": ("llama", {"rope_scaling": "linear", "rope_factor": 4.0, "rope_theta": 500.0}),
    "ntk": ("llama", {"rope_scaling": "ntk", "rope_factor": 4.0}),
    "llama3": ("llama", {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_length": 16}),
    "gelu": ("arcee", {"activation": "gelu", "ffn_bias": True}),
    "biases of queries, keys and values": ("qwen2", {"attention_bias": "qkv"}),
    "norm of each head": ("qwen3", {"qk_norm": "head", "attention_bias": "all"}),
}
SPARSE: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"router": {"name": "mixtral"}}),
    "top_k of 4": ("mixtral", {"router": {"name": "top_k", "top_k": 4}}),
    "noisy_top_k": ("mixtral", {"router": "noisy_top_k"}),
    "not normalised": ("qwen2_moe", {"router": {"name": "top_k", "renormalise": False}}),
    "switch": ("qwen2_moe", {"router": "switch", "model": {"attention_bias": "qkv"}}),
    "some blocks": ("qwen2_moe", {"router": "mixtral", "layout": {"n": 2}}),
    "olmoe": ("olmoe", {"router": {"name": "olmoe", "top_k": 3}, "model": {"qk_norm": "full"}}),
    "olmoe, normalised, biases": (
        "olmoe",
        {"router": "mixtral", "model": {"qk_norm": "full", "attention_bias": "all"}},
    ),
    "one expert, norm of heads": (
        "qwen3_moe",
        {
            "router": {"name": "top_k", "top_k": 1, "renormalise": False},
            "model": {"qk_norm": "head"},
            "layout": {"n": 2},
        },
    ),
    "deepseek_moe": ("qwen2_moe", {"router": {"name": "deepseek_moe", "top_k": 2, "scale": 3.0}}),
    "v_moe": ("qwen2_moe", {"router": "v_moe"}),
    "gshard": ("mixtral", {"router": "gshard"}),
    "shared experts, softmax": (
        "qwen2_moe",
        {
            "router": "deepseek_moe",
            "layout": {"name": "fine_grained", "split": 1, "expert_width": 8, "num_experts": 8, "shared": 2},
        },
    ),
    "loss_free": ("glm4_moe", {"router": "loss_free", "model": {"qk_norm": "head", "residual_scale": 0.5}}),
    "deepseek_v3": (
        "glm4_moe",
        {
            "router": {"name": "deepseek_v3", "top_k": 3, "num_groups": 2, "kept_groups": 1},
            "layout": {"name": "fine_grained", "split": 1, "shared": 2, "blocks": [1], "expert_width": 8},
            "model": {"attention_bias": "qkv", "tie_embeddings": True},
        },
    ),
    "widths that transformers has to pad": ("mixtral", {"router": "mixtral", "layout": {"expert_width": 5}}),
    "shared width that is padded": (
        "glm4_moe",
        {"router": "loss_free", "layout": {"name": "fine_grained", "split": 2, "shared": 1, "expert_width": 3}},
    ),
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def load(folder: Path) -> Any:
    """Load a folder in transformers; fail for missing or unexpected weights."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def compare(run: RandomRun, folder: Path, model_type: str) -> None:
    token_BL = draw_tokens(run.task.vocab_size or 0)
    model = load(folder)
    assert model.config.model_type == model_type
    with torch.no_grad():
        theirs = model(token_BL).logits
    ours = compute_logits(run.model, token_BL)
    assert ours.std() > 0.2  # so that the tolerance is small beside the values
    torch.testing.assert_close(theirs, ours, rtol=0, atol=TOLERANCE)


def merge(sections: Mapping[str, Any]) -> dict[str, Any]:
    return {**sections, "model": {**SWIGLU, **sections.get("model", {})}}


@pytest.mark.parametrize("case", DENSE)
def test_a_dense_model_has_the_same_logits_in_transformers(tmp_path: Path, text: Path, case: str) -> None:
    model_type, options = DENSE[case]
    run = RandomRun(tmp_path, text, **merge({"model": options, "router": "dense"}))
    assert run.export(tmp_path / "out").model_type == model_type
    compare(run, tmp_path / "out", model_type)


@pytest.mark.parametrize("case", SPARSE)
def test_a_sparse_model_has_the_same_logits_in_transformers(tmp_path: Path, text: Path, case: str) -> None:
    model_type, sections = SPARSE[case]
    run = RandomRun(tmp_path, text, **merge(sections))
    assert run.export(tmp_path / "out").model_type == model_type
    compare(run, tmp_path / "out", model_type)


@settings(max_examples=12)
@given(
    router=st.sampled_from(["mixtral", "olmoe", "switch", "loss_free", "deepseek_v3"]),
    top_k=st.integers(2, 4),
    qk_norm=st.sampled_from(["none", "head", "full"]),
    attention_bias=st.sampled_from(["none", "qkv", "all"]),
    scaling=st.sampled_from(["none", "linear", "ntk"]),
    flags=st.tuples(st.booleans(), st.booleans(), st.sampled_from([1, 2, 4])),
)
def test_any_options_give_the_same_logits_or_one_line(
    text: Path,
    tmp_path_factory: pytest.TempPathFactory,
    router: str,
    top_k: int,
    qk_norm: str,
    attention_bias: str,
    scaling: str,
    flags: tuple[bool, bool, int],
) -> None:
    """Any combination is exact in transformers, or refused with the options that are the reason."""
    root = tmp_path_factory.mktemp("any")
    ties, is_partial, kv_heads = flags
    model = {"num_heads": 4, "num_kv_heads": kv_heads, "qk_norm": qk_norm, "attention_bias": attention_bias}
    rope = {"rope_scaling": scaling, "rope_factor": 1.0 if scaling == "none" else 2.0}
    run = RandomRun(
        root,
        text,
        model={**SWIGLU, **model, **rope, "tie_embeddings": ties, "d_model": 16},
        router={"name": router, **({} if router == "switch" else {"top_k": top_k})},
        layout={"n": 2 if is_partial else 1},
    )
    try:
        exported = run.export(root / "out")
    except UsageError as error:
        reason = str(error)
    else:
        compare(run, root / "out", exported.model_type)
        return
    assert "no decoder of transformers computes it (not " in reason
    assert not (root / "out").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "router": ({"router": "hash"}, "router.name=hash: transformers has no such routing (it has that of top_k, "),
    "gelu": ({"router": "mixtral", "model": {"activation": "gelu"}}, "model.activation is gelu"),
    "layer norm": ({"router": "dense", "model": {"norm": "layernorm"}}, "model.norm=layernorm: "),
    "biases of experts": ({"router": "mixtral", "model": {"ffn_bias": True}}, "model.ffn_bias is True"),
    "capacity": (
        {"router": "mixtral", "layout": {"capacity_factor_eval": 1.0}},
        "layout.capacity_factor_eval=1: in transformers no expert has a capacity",
    ),
    "experts in attention": (
        {"router": {"name": "top_k", "top_k": 2}, "layout": {"name": "attention", "expert_width": None}},
        "layout.name=attention: experts in other places",
    ),
    "widths": ({"router": "mixtral", "layout": {"name": "heterogeneous", "expert_width": None}}, "experts that differ"),
    "two activations": (
        {"router": "mixtral", "layout": {"n": 2, "expert_activation": "gelu"}},
        "layout.expert_activation=gelu: experts and dense networks",
    ),
    "gate of shared experts": (
        {"router": "mixtral", "layout": {"name": "residual", "expert_width": 8}},
        "layout.name=residual: a gate",
    ),
    "groups": (
        {"router": {"name": "deepseek_moe", "top_k": 2, "num_groups": 2}},
        "router.kept_groups=1: groups are ranked by their best expert",
    ),
    "softmax with a bias": (
        {"router": {"name": "loss_free", "score": "softmax"}},
        "the router has softmax scores with a selection bias",
    ),
    "another task": ({"router": "mixtral", "task": {"name": "masked_language"}}, "task.name=masked_language: only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_transformers_cannot_express_is_refused_and_offered_as_safetensors(
    tmp_path: Path, text: Path, case: str
) -> None:
    sections, reason = REFUSED[case]
    run = RandomRun(tmp_path, text, **merge(sections))
    with pytest.raises(UsageError) as error:
        run.export(tmp_path / "out")
    message = str(error.value)
    assert message.startswith("--format hf: transformers cannot express run random: ")
    assert reason in message
    assert message.endswith("; --format safetensors writes its weights and configuration")
    assert not list(tmp_path.glob("*out*"))
    run.export(tmp_path / "out", format="safetensors")
    model, task = moebench.load_model(f"hf:{tmp_path / 'out'}", tmp_path)
    assert type(task) is type(run.task)
    stored = run.model.state_dict()
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())


def plain_cases() -> dict[str, dict[str, Any]]:
    """Return each router in a plain layout, and each layout with a plain router."""
    routers = {f"router {name}": {"router": name, "layout": {"expert_width": 8}} for name in ROUTERS.names()}
    layouts = {
        f"layout {name}": {"router": {"name": "top_k"}, "layout": {"name": name, "expert_width": None}}
        for name in LAYOUTS.names()
    }
    return routers | layouts


WITH_TABLES = ("hash", "remoe", "routing_networks_wpl", "domain_posterior")
"""Routers with whole numbers, scalars or other modules among their weights."""


def is_quick(case: str) -> bool:
    kind, _, name = case.partition(" ")
    return kind == "layout" or name in (*RULES, *WITH_TABLES)


@pytest.mark.parametrize(
    "case", [case if is_quick(case) else pytest.param(case, marks=pytest.mark.slow) for case in plain_cases()]
)
def test_every_model_is_written_with_our_names_and_for_transformers_or_refused(
    tmp_path: Path, text: Path, case: str
) -> None:
    sections = plain_cases()[case]
    model = {**SWIGLU, "d_model": 16, "ffn_width": 120}
    layout = {"num_experts": 16, **sections["layout"]}
    run = RandomRun(tmp_path, text, router=sections["router"], layout=layout, model=model, allow_noncausal=True)
    run.export(tmp_path / "own", format="safetensors")
    loaded = moebench.load_model(f"hf:{tmp_path / 'own'}", tmp_path)[0].state_dict()
    stored = run.model.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in stored.items())
    try:
        exported = run.export(tmp_path / "out")
    except UsageError as error:
        reason = str(error)
    else:
        compare(run, tmp_path / "out", exported.model_type)
        return
    assert reason.startswith("--format hf: transformers cannot express run random: ")
