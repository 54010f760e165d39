"""The architectures of transformers that moebench reads and writes, the plainest first."""

from dataclasses import replace

from moebench.pretrained.decoders.architecture import GELU, Architecture
from moebench.pretrained.decoders.config_keys import Choice
from moebench.pretrained.decoders.expert_format import ExpertFormat
from moebench.pretrained.decoders.placement import AfterFirst, ListedBlocks

ALL_BIASES: Choice[str] = {"none": {"attention_bias": False}, "all": {"attention_bias": True}}
"""Of queries, keys, values and the output, or none."""
NETWORK_BIASES: Choice[bool] = {False: {"mlp_bias": False}, True: {"mlp_bias": True}}
QWEN_EXPERTS = ExpertFormat(num_experts="num_experts", width="moe_intermediate_size", placement=ListedBlocks())

_DENSE = (
    Architecture(model_type="llama", class_name="LlamaForCausalLM", attention_bias=ALL_BIASES, ffn_bias=NETWORK_BIASES),
    Architecture(  # Llama without the gate of its networks
        model_type="arcee",
        class_name="ArceeForCausalLM",
        activation=GELU,
        attention_bias=ALL_BIASES,
        ffn_bias=NETWORK_BIASES,
    ),
    Architecture(
        model_type="qwen2",
        class_name="Qwen2ForCausalLM",
        attention_bias={"qkv": {}},
        fixed={"use_sliding_window": False},
    ),
    Architecture(
        model_type="qwen3",
        class_name="Qwen3ForCausalLM",
        attention_bias=ALL_BIASES,
        qk_norm={"head": {}},
        fixed={"use_sliding_window": False},
    ),
)
_SPARSE = (
    Architecture(
        model_type="mixtral",
        class_name="MixtralForCausalLM",
        attention_bias={"none": {}},
        fixed={"sliding_window": None},
        experts=ExpertFormat(
            num_experts="num_local_experts",
            width="intermediate_size",
            normalised={True: {}},
            router="mixtral",
            module="block_sparse_moe",
            projections=("w1", "w3", "w2"),
        ),
    ),
    Architecture(
        model_type="olmoe",
        class_name="OlmoeForCausalLM",
        attention_bias=ALL_BIASES,
        qk_norm={"full": {}},
        fixed={"clip_qkv": None},
        experts=ExpertFormat(num_experts="num_experts", width="intermediate_size", router="olmoe"),
    ),
    Architecture(
        model_type="qwen2_moe",
        class_name="Qwen2MoeForCausalLM",
        attention_bias={"none": {"qkv_bias": False}, "qkv": {"qkv_bias": True}},
        fixed={"use_sliding_window": False},
        experts=replace(QWEN_EXPERTS, shared="gated"),
    ),
    Architecture(
        model_type="qwen3_moe",
        class_name="Qwen3MoeForCausalLM",
        attention_bias=ALL_BIASES,
        qk_norm={"head": {}},
        fixed={"use_sliding_window": False},
        experts=QWEN_EXPERTS,
    ),
    Architecture(  # GLM-4.5: the router of DeepSeek-V3 beside the attention of Llama
        model_type="glm4_moe",
        class_name="Glm4MoeForCausalLM",
        attention_bias={"none": {"attention_bias": False}, "qkv": {"attention_bias": True}},
        qk_norm={"none": {"use_qk_norm": False}, "head": {"use_qk_norm": True}},
        experts=ExpertFormat(
            num_experts="n_routed_experts",
            width="moe_intermediate_size",
            placement=AfterFirst(),
            score="sigmoid",
            router="deepseek_v3",
            shared="added",
        ),
    ),
)
ARCHITECTURES = {architecture.model_type: architecture for architecture in (*_DENSE, *_SPARSE)}
"""`model_type` -> architecture."""
LATENT = "its attention compresses keys and values (kv_lora_rank), which moebench does not compute"
NOT_COMPUTED = {
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "switch_transformers": "it is an encoder and a decoder with relative positions, which moebench does not compute",
}
"""`model_type` of architectures that `probe` reads -> why moebench cannot continue to train them."""
