"""How a model of transformers is probed."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class PretrainedOptions:
    """The text that a model of transformers reads, and how it reads it."""

    data: str | None = None
    """File, folder or prepared folder of text; None: the test split of the embedded text."""
    dtype: str = "auto"
    """Type of the weights: float32, bfloat16, float16, or auto: as they are stored."""
    batch_size: int = 4
    """Sequences that are in the model at a time."""
    sequence_length: int = 256
    """Tokens of a sequence, at most."""
    max_tokens: int = 16_384
    """Tokens of text, at most."""
