"""The architectures of transformers that moebench reads, and where those with experts have them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moebench.errors import UsageError, suggest

CONFIG = "config.json"


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture by the names of transformers."""

    model_type: str
    """`model_type` in config.json."""
    title: str
    architecture: str
    """Class of the model with its head."""
    router: str = ""
    """Class of its router modules, one in each MoE layer; empty: it has no experts."""
    num_experts: tuple[str, ...] = ()
    """Keys of config.json for the number of routed experts: the first one that is present counts."""
    num_layers: tuple[str, ...] = ("num_hidden_layers",)
    """Keys for the numbers of layers."""
    is_encoder_decoder: bool = False
    count_expert_layers: Callable[[Mapping[str, Any]], int] = lambda config: 0
    """Returns the number of MoE layers that a configuration has."""


def _count_all(config: Mapping[str, Any]) -> int:
    return read_number(config, "num_hidden_layers")


def _count_every_n(config: Mapping[str, Any]) -> int:
    """Qwen: every `decoder_sparse_step`-th layer, without those listed in `mlp_only_layers`."""
    num_layers, step = read_number(config, "num_hidden_layers"), int(config.get("decoder_sparse_step", 1))
    if not step:
        return 0
    dense: set[int] = {layer for layer in config.get("mlp_only_layers") or () if 0 <= layer < num_layers}
    return num_layers // step - sum((layer + 1) % step == 0 for layer in dense)  # no loop over layers: any number


def _count_after_first(config: Mapping[str, Any]) -> int:
    """DeepSeek: all layers after the first `first_k_dense_replace`."""
    return max(read_number(config, "num_hidden_layers") - int(config.get("first_k_dense_replace") or 0), 0)


def _count_of_halves(config: Mapping[str, Any]) -> int:
    return sum(int(config.get(f"num_sparse_{half}_layers", 3)) for half in ("encoder", "decoder"))


FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            model_type="mixtral",
            title="Mixtral",
            architecture="MixtralForCausalLM",
            router="MixtralTopKRouter",
            num_experts=("num_local_experts",),
            count_expert_layers=_count_all,
        ),
        Family(
            model_type="olmoe",
            title="OLMoE",
            architecture="OlmoeForCausalLM",
            router="OlmoeTopKRouter",
            num_experts=("num_experts", "num_local_experts"),
            count_expert_layers=_count_all,
        ),
        Family(
            model_type="qwen2_moe",
            title="Qwen2-MoE",
            architecture="Qwen2MoeForCausalLM",
            router="Qwen2MoeTopKRouter",
            num_experts=("num_experts", "num_local_experts"),
            count_expert_layers=_count_every_n,
        ),
        Family(
            model_type="qwen3_moe",
            title="Qwen3-MoE",
            architecture="Qwen3MoeForCausalLM",
            router="Qwen3MoeTopKRouter",
            num_experts=("num_experts", "num_local_experts"),
            count_expert_layers=_count_every_n,
        ),
        Family(
            model_type="deepseek_v2",
            title="DeepSeek-V2",
            architecture="DeepseekV2ForCausalLM",
            router="DeepseekV2TopkRouter",
            num_experts=("n_routed_experts", "num_experts", "num_local_experts"),
            count_expert_layers=_count_after_first,
        ),
        Family(
            model_type="deepseek_v3",
            title="DeepSeek-V3",
            architecture="DeepseekV3ForCausalLM",
            router="DeepseekV3TopkRouter",
            num_experts=("n_routed_experts", "num_experts", "num_local_experts"),
            count_expert_layers=_count_after_first,
        ),
        Family(
            model_type="glm4_moe",
            title="GLM-4-MoE",
            architecture="Glm4MoeForCausalLM",
            router="Glm4MoeTopkRouter",
            num_experts=("n_routed_experts", "num_local_experts"),
            count_expert_layers=_count_after_first,
        ),
        Family(
            model_type="switch_transformers",
            title="Switch Transformers",
            architecture="SwitchTransformersForConditionalGeneration",
            router="SwitchTransformersTop1Router",
            num_experts=("num_experts",),
            num_layers=("num_layers", "num_decoder_layers"),
            is_encoder_decoder=True,
            count_expert_layers=_count_of_halves,
        ),
    )
}
"""`model_type` -> architecture with experts."""
OWN_FORMAT = "moebench"
"""`model_type` of a model that moebench wrote with its own names of weights."""
PARENTS = {
    **FAMILIES,
    **{
        model_type: Family(model_type=model_type, title=title, architecture=architecture)
        for model_type, title, architecture in (
            ("llama", "Llama", "LlamaForCausalLM"),
            ("arcee", "Arcee", "ArceeForCausalLM"),
            ("qwen2", "Qwen2", "Qwen2ForCausalLM"),
            ("qwen3", "Qwen3", "Qwen3ForCausalLM"),
            (OWN_FORMAT, "moebench", "moebench"),
        )
    },
}
"""`model_type` -> architecture of what can be read without experts too."""


def find_family(config: Mapping[str, Any], file: str, *, requires_experts: bool = True) -> Family:
    """Return the architecture of a configuration; raise UsageError, which begins with `file`, for any other.

    Also refused: another head than the one that predicts tokens, and with `requires_experts` a model without experts.
    """
    model_type, architectures = config.get("model_type"), config.get("architectures") or []
    families = FAMILIES if requires_experts else PARENTS
    family = families.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        if requires_experts and not _mentions_experts(config):
            raise UsageError(f"{file}: the model_type {model_type!r} has no experts (known: {_list_known(families)})")
        near = suggest(str(model_type), families)
        raise UsageError(f"{file}: the model_type {model_type!r} is unknown.{near} Allowed: {_list_known(families)}")
    if architectures and family.architecture not in architectures:
        raise UsageError(f"{file}: the architecture {architectures!r} is unknown; allowed: {family.architecture}")
    if family.router:
        _require_experts(family, config, file)
    return family


def read_number(config: Mapping[str, Any], *keys: str) -> int:
    """Return the first of the keys that a configuration has; raise ValueError for a value that is no count."""
    key = next((key for key in keys if key in config), None)
    if key is None:
        raise ValueError(f"has no {keys[0]}")
    value = config[key]
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ValueError(f"{key} is {value!r}, not a number from 0 to {(1 << 31) - 1}")
    return value


def _require_experts(family: Family, config: Mapping[str, Any], file: str) -> None:
    try:
        num_experts = read_number(config, *family.num_experts)
        num_layers = family.count_expert_layers(config)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{file}: {error}") from error
    if num_experts < 1 or num_layers < 1:
        raise UsageError(
            f"{file}: this {family.title} model has no experts ({num_experts} experts in {num_layers} layers)"
        )


def _mentions_experts(config: Mapping[str, Any]) -> bool:
    return any("expert" in str(key).lower() or "moe" in str(key).lower() for key in config)


def _list_known(families: Mapping[str, Family]) -> str:
    return ", ".join(sorted(families))
