"""How an architecture of transformers writes its experts: configuration and weights, in both directions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from moebench.components import MAX_EXPERTS
from moebench.pretrained.decoders.config_keys import Choice, ConfigKeys
from moebench.pretrained.decoders.decoder import Decoder, ExpertBlocks, RoutingRule
from moebench.pretrained.decoders.placement import EveryBlock, Placement
from moebench.pretrained.decoders.weight_map import WeightMap, map_one, map_stack

NORMALISED_BY_KEY: Choice[bool] = {True: {"norm_topk_prob": True}, False: {"norm_topk_prob": False}}
Shape = tuple[int, ...]
GATED_WIDTH = "shared_expert_intermediate_size"
GATE_OF_0 = 0.5
"""The sigmoid of 0: what a gate with weights of 0 multiplies with."""


@dataclass(frozen=True, kw_only=True)
class ExpertFormat:
    """The experts of one architecture."""

    num_experts: str
    """Key of config.json, as are the next two."""
    width: str
    top_k: str = "num_experts_per_tok"
    placement: Placement = field(default_factory=EveryBlock)
    score: Literal["softmax", "sigmoid"] = "softmax"
    """sigmoid: with a selection bias, groups and a factor on the weights, as in DeepSeek-V3."""
    normalised: Choice[bool] = field(default_factory=lambda: NORMALISED_BY_KEY)
    router: str = "top_k"
    """The router of moebench with the training losses of this family."""
    shared: Literal["none", "added", "gated"] = "none"
    """added: `n_shared_experts` of the width of an expert. gated: one weighted by a sigmoid, which moebench does not
    have: the gate must be 0, which halves what is added."""
    module: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Names of an expert's three matrices."""

    def read(self, config: ConfigKeys, num_layers: int) -> ExpertBlocks:
        """Return the experts of a configuration; raise UsageError for what moebench does not compute."""
        width, num_experts = config.number(self.width), config.number(self.num_experts, MAX_EXPERTS)
        routing = RoutingRule(
            score=self.score,
            top_k=config.number(self.top_k),
            normalised=config.choose(self.normalised, "weights divided by their sum, or not"),
            router=self.router,
        )
        if self.score == "sigmoid":
            routing = RoutingRule(**vars(routing) | _read_groups(config))
        if routing.top_k > num_experts:
            raise config.refuse(self.top_k, f"at most {self.num_experts}={num_experts}")
        if routing.normalised and routing.top_k == 1 < num_experts:
            raise config.refuse(self.top_k, "at least 2 where weights are divided by their sum: one would always be 1")
        return ExpertBlocks(
            blocks=self.placement.read(config, num_layers),
            num_experts=num_experts,
            width=width,
            shared_width=self._read_shared_width(config, width),
            routing=routing,
        )

    def _read_shared_width(self, config: ConfigKeys, width: int) -> int:
        if self.shared == "none":
            return 0
        if self.shared == "added":
            return width * int(config.values.get("n_shared_experts") or 0)
        shared_width = int(config.values.get(GATED_WIDTH) or 0)
        if shared_width % width:
            raise config.refuse(GATED_WIDTH, f"a multiple of {self.width}={width}")
        return shared_width

    def find_problem(self, experts: ExpertBlocks, num_layers: int) -> str | None:
        """Return why an architecture cannot have these experts; None where it can."""
        routing = experts.routing
        if routing.score != self.score or (routing.has_bias and self.score != "sigmoid"):
            given = f"{routing.score} scores{' with a selection bias' if routing.has_bias else ''}"
            return f"the router has {given}"
        if routing.normalised not in self.normalised:
            return f"the weights of a token {'sum to 1' if routing.normalised else 'do not sum to 1'}"
        if experts.shared_width and self.shared == "none":
            return "it has a shared expert"
        if self.placement.write(experts.blocks, num_layers) is None:
            return f"the blocks {', '.join(map(str, experts.blocks))} of {num_layers} have experts"
        if routing.num_groups > 1 and experts.num_experts == routing.num_groups:
            return "groups have one expert each"
        return None

    def write(self, experts: ExpertBlocks, num_layers: int) -> dict[str, Any]:
        """Return the entries of config.json."""
        routing = experts.routing
        entries = {
            self.num_experts: experts.num_experts,
            self.width: experts.width,
            self.top_k: routing.top_k,
            **self.normalised[routing.normalised],
            **(self.placement.write(experts.blocks, num_layers) or {}),
        }
        if self.score == "sigmoid":
            groups = {"n_group": routing.num_groups, "topk_group": routing.kept_groups}
            entries |= {"routed_scaling_factor": routing.scale, **groups}
        if self.shared == "added":
            entries["n_shared_experts"] = experts.shared_width // experts.width
        if self.shared == "gated":
            entries[GATED_WIDTH] = experts.shared_width
        return entries

    def map_weights(self, ours: str, theirs: str, decoder: Decoder) -> Iterator[WeightMap]:
        """Yield the weights of one block with experts; `ours` and `theirs`: the names that its weights begin with."""
        experts, d_model = decoder.experts, decoder.model.d_model
        assert experts is not None
        number, width, prefix = experts.num_experts, experts.width, f"{theirs}.{self.module}"
        gate, up, down = self.projections
        yield map_one(f"{ours}.router.gate.weight_ED", (f"{prefix}.gate.weight", (number, d_model)))
        if self.score == "sigmoid":
            yield map_one(f"{ours}.router.bias_E", (f"{prefix}.gate.e_score_correction_bias", (number,)))
        inputs = [(gate, (width, d_model)), (up, (width, d_model))]
        yield map_stack(f"{ours}.bank.w_in_EDF", number, f"{prefix}.experts", inputs, "gate_up_proj")
        outputs = [(down, (d_model, width))]
        yield map_stack(f"{ours}.bank.w_out_EFD", number, f"{prefix}.experts", outputs, "down_proj")
        if experts.shared_width:
            maps = map_network(f"{ours}.shared", f"{prefix}.{self._shared_module}", d_model, experts.shared_width)
            for weight in maps:
                is_output = weight.name.endswith("w_out_FD")
                yield replace(weight, factor=1 / GATE_OF_0) if self.shared == "gated" and is_output else weight

    @property
    def _shared_module(self) -> str:
        return "shared_expert" if self.shared == "gated" else "shared_experts"

    def name_gate(self, theirs: str) -> str | None:
        """Return the weight that must be 0 in one block, because moebench has no gate there; None: there is none."""
        return f"{theirs}.{self.module}.shared_expert_gate.weight" if self.shared == "gated" else None

    def list_empty(self, theirs: str, decoder: Decoder) -> Mapping[str, Shape]:
        """Return the weights of one block that ours does not have: of no size, or 0."""
        d_model, gate = decoder.model.d_model, self.name_gate(theirs)
        empty: dict[str, Shape] = {gate: (1, d_model)} if gate else {}
        if self.shared == "none" or (decoder.experts is not None and decoder.experts.shared_width):
            return empty
        shared = f"{theirs}.{self.module}.{self._shared_module}"
        empty |= {f"{shared}.{name}.weight": (0, d_model) for name in ("gate_proj", "up_proj")}
        return {**empty, f"{shared}.down_proj.weight": (d_model, 0)}


def map_network(ours: str, theirs: str, d_model: int, width: int) -> Iterator[WeightMap]:
    """Yield the weights of a dense network with a gate."""
    rows = [(f"{theirs}.{name}.weight", (width, d_model)) for name in ("gate_proj", "up_proj")]
    yield map_one(f"{ours}.w_in_DF", *rows, is_transposed=True)
    yield map_one(f"{ours}.w_out_FD", (f"{theirs}.down_proj.weight", (d_model, width)), is_transposed=True)


def _read_groups(config: ConfigKeys) -> dict[str, Any]:
    scale = config.values.get("routed_scaling_factor")
    if not isinstance(scale, int | float) or scale <= 0:
        raise config.refuse("routed_scaling_factor", "a number above 0")
    groups = {"num_groups": config.number("n_group"), "kept_groups": config.number("topk_group")}
    return {"scale": float(scale), "has_bias": True, **groups}
