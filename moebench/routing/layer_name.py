"""The name of an MoE layer in records, journals and metrics."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class LayerName:
    """Position of an MoE layer in its model; as text "3", "3.attention", "encoder.3" or "encoder.3.attention"."""

    block: int = 0
    """Index of the block within its stack, from 0."""
    half: Literal["encoder", "decoder"] | None = None
    """Stack of an encoder-decoder model; None: the model has one stack."""
    part: Literal["feed_forward", "attention"] = "feed_forward"

    def __str__(self) -> str:
        block = str(self.block) if self.half is None else f"{self.half}.{self.block}"
        return block if self.part == "feed_forward" else f"{block}.{self.part}"

    @property
    def seed_part(self) -> int | str:
        """Part of the seed of the layer's generators: seeds derive from `repr`, so a plain index stays a number."""
        is_plain = self.half is None and self.part == "feed_forward"
        return self.block if is_plain else str(self)
