"""The options of the transformer around the experts: the section `model` of a configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from moebench.errors import require
from moebench.ranges import BELOW_1, POSITIVE_FINITE, Range, at_least_1_up_to, check_ranges


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The transformer around the experts: pre-norm blocks with rotary positions.

    By default with RMSNorm, without biases and without dropout. docs/model.md names published models by these keys.
    """

    RANGES: ClassVar[Mapping[str, Range]] = {
        **dict.fromkeys(("d_model", "num_heads", "num_kv_heads"), at_least_1_up_to(2**16)),
        "num_layers": at_least_1_up_to(1000),
        "ffn_width": at_least_1_up_to(2**20),
        "rope_factor": Range(low=1, includes_high=False),
        "rope_original_length": at_least_1_up_to(2**30),
        **dict.fromkeys(("rope_theta", "rope_low_frequency", "rope_high_frequency"), POSITIVE_FINITE),
        **dict.fromkeys(("norm_eps", "embedding_scale", "residual_scale"), POSITIVE_FINITE),
        **dict.fromkeys(("attention_dropout", "residual_dropout", "embedding_dropout"), BELOW_1),
    }

    d_model: int = 64
    """Width of the residual stream."""
    num_layers: int = 2
    """Number of transformer blocks."""
    num_heads: int = 2
    """Number of attention heads; d_model / num_heads must be an even whole number."""
    num_kv_heads: int | None = None
    """Number of key and value heads, each shared by num_heads / num_kv_heads query heads (grouped-query attention,
    arXiv:2305.13245); null: num_heads."""
    ffn_width: int = 128
    """Hidden width per token: of the dense feed-forward network, and of a token's active experts together."""
    activation: Literal["gelu", "swiglu"] = "gelu"
    """Activation of dense networks and of experts, unless layout.expert_activation is set."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of attention projections, experts included: of queries, keys and values (Qwen2, arXiv:2407.10671), or of
    the output too (GPT-2)."""
    ffn_bias: bool = False
    """Biases of both projections of dense networks and of every expert; they start at 0."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm before each part of a block and after the last block: RMSNorm (arXiv:1910.07467) with a gain, or LayerNorm
    (arXiv:1607.06450) with a gain and a bias."""
    norm_eps: float | None = None
    """Added to the mean square or variance in norms; null: the precision's machine epsilon in RMSNorm, 1e-5 in
    LayerNorm."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """Norm of queries and keys before positions: of each head (Qwen3, arXiv:2505.09388), or of all heads together
    (OLMo 2, arXiv:2501.00656)."""
    tie_embeddings: bool = False
    """Use the token embedding as output projection too (arXiv:1608.05859), for tasks that predict tokens. The table
    starts with standard deviation d_model^-1/2 instead of 1 for the embedding and 0 for the projection."""
    embedding_scale: float | None = None
    """Factor on embedded inputs; null: 1, and sqrt(d_model) with tie_embeddings (arXiv:1706.03762, section 3.4; Gemma,
    arXiv:2403.08295)."""
    residual_scale: float = 1.0
    """Factor on what each part of a block adds to the residual stream (Granite's residual_multiplier; depth scaling,
    arXiv:2310.02244)."""
    attention_dropout: float = 0.0
    """Dropout probability of attention weights in training; above 0, attention is computed without a fused kernel."""
    residual_dropout: float = 0.0
    """Dropout probability of what each part of a block adds to the residual stream, in training (arXiv:1706.03762,
    section 5.4). Hidden units inside experts have layout.expert_dropout."""
    embedding_dropout: float = 0.0
    """Dropout probability of embedded inputs, in training."""
    rope_theta: float = 10000.0
    """Base of the rotary position angles."""
    rope_scaling: Literal["none", "linear", "ntk", "llama3"] = "none"
    """Scaling of rotary angles by rope_factor. linear: all angles divided (arXiv:2306.15595); ntk: a larger base, so
    that the slowest angle is divided and the fastest kept (arXiv:2309.00071, section 3.1); llama3: slow angles divided,
    fast ones kept, interpolated between (Llama 3.1, arXiv:2407.21783)."""
    rope_factor: float = 1.0
    """Ratio of the longest sequence to that for which the unscaled angles are meant."""
    rope_original_length: int | None = None
    """With rope_scaling=llama3: the length that the unscaled angles are meant for."""
    rope_low_frequency: float = 1.0
    """With rope_scaling=llama3: angles that turn fewer times over rope_original_length are divided by rope_factor."""
    rope_high_frequency: float = 4.0
    """With rope_scaling=llama3: angles that turn more often over rope_original_length are kept."""

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        is_even = self.d_model % self.num_heads == 0 and self.d_model // self.num_heads % 2 == 0
        allowed = f"a divisor of d_model={self.d_model} with an even quotient"
        require(is_even, "model.num_heads", self.num_heads, allowed)
        divides = self.num_heads % (self.num_kv_heads or self.num_heads) == 0
        require(divides, "model.num_kv_heads", self.num_kv_heads, f"a divisor of num_heads={self.num_heads}, or null")
        self._check_rope()

    def _check_rope(self) -> None:
        """Raise UsageError for options of a scaling of positions that is not chosen, or that it needs."""
        scaling, is_llama3 = self.rope_scaling, self.rope_scaling == "llama3"
        has_effect = scaling != "none" or self.rope_factor == 1
        require(has_effect, "model.rope_factor", self.rope_factor, "1 with model.rope_scaling=none")
        length = self.rope_original_length
        require(not is_llama3 or length is not None, "model.rope_original_length", length, "a length with llama3")
        require(is_llama3 or length is None, "model.rope_original_length", length, f"null with rope_scaling={scaling}")
        low, high = self.rope_low_frequency, self.rope_high_frequency
        require(low < high, "model.rope_high_frequency", high, f"greater than model.rope_low_frequency={low:g}")
