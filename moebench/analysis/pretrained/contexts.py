"""Top contexts of the experts of a model of transformers, in its own tokens."""

from moebench.analysis.pretrained.probe import PretrainedProbe
from moebench.analysis.pretrained.report import describe_model, require_layer
from moebench.analysis.specialisation.contexts import TokenText, build_context_table, describe_expert
from moebench.reporting.report import Report

NOTE = (
    "the highest weights of each expert, at most one in a sequence; ⟦⟧ the token; ␣ space, ↵ end of line, � a character"
    " that the sequence cuts; domain: of the text"
)


def build_pretrained_contexts(probe: PretrainedProbe, layer: str | None) -> Report:
    """Return the contexts of every expert of a layer, by default the last one; raise UsageError for another name."""
    require_layer(probe, layer)
    chosen = next(each for each in reversed(probe.collection.layers) if layer is None or str(each.name) == layer)
    stack, name = chosen.name.half, str(chosen.name)
    routed, text = probe.to_routed_tokens(stack), read_text(probe, stack)
    experts = [describe_expert(expert, routed.layers[name], text) for expert in range(chosen.num_experts)]
    return Report(
        heading=describe_model(probe),
        tables=tuple(build_context_table(expert, name) for expert in experts),
        notes=(NOTE,),
        values={"layer": name, "experts": [expert.to_dict() for expert in experts]},
    )


def read_text(probe: PretrainedProbe, stack: str | None) -> TokenText:
    """Return the counted tokens of a stack as text."""
    counted, names = probe.collection.select_tokens(stack), probe.names
    special = {token: names.name(token).encode() for token in set(counted.token_N.tolist()) if not names.pieces[token]}
    domains = probe.collection.text.domains
    return TokenText(
        id_T=counted.token_N.numpy(),
        sequence_T=counted.sequence_N.numpy(),
        domain_S=[domains[index] for index in probe.collection.text.domain_B.tolist()],
        pieces=[special.get(token, piece) for token, piece in enumerate(names.pieces)],
    )
