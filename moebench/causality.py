"""Causality of a cell: whether it must be causal, and how a token's output depends on later tokens."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moebench.compatibility import Combination


def must_be_causal(c: "Combination") -> bool:
    """Return whether the task predicts from the past in a half that has experts."""
    return c.task.causal and not (c.task.is_encoder_decoder and c.config.layout.experts_in == "encoder")


def find_leak(c: "Combination") -> str | None:
    """Return how a token's output depends on later tokens, None if it does not."""
    drop_order = c.config.layout.drop_order
    not_causal = f"router.name: '{c.config.router.name}' is not causal"
    if not c.router.facts.causality.causal:
        return f"{not_causal}: {c.router.facts.causality.reason}"
    if c.never_drops:
        return None
    if c.router.facts.causality.batch_dependent and not c.router.facts.causality.draws_in_evaluation:
        return f"{not_causal} with a capacity: slots depend on other sequences, which see later tokens (no capacity)"
    if drop_order in ("score", "priority", "random"):
        return f"layout.drop_order: '{drop_order}' lets later tokens push out earlier ones (try position)"
    if c.config.layout.overflow == "reroute":
        return "layout.overflow: 'reroute' sends earlier tokens only where later ones leave a slot (try drop or pass)"
    if drop_order == "router" and not c.router.facts.causality.is_causal(with_capacity=True):
        return f"{not_causal} with a capacity and its own order of dropping (try layout.drop_order=position)"
    return None
