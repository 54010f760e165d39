"""Which blocks have experts: the keys of config.json of each family."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from moebench.pretrained.decoders.config_keys import ConfigKeys


class Placement(Protocol):
    """How config.json says which blocks have experts."""

    def read(self, config: ConfigKeys, num_layers: int) -> tuple[int, ...]:
        """Return the blocks with experts, ascending."""

    def write(self, blocks: Sequence[int], num_layers: int) -> Mapping[str, Any] | None:
        """Return the entries for these blocks; None where there are none."""


class EveryBlock:
    """All blocks have experts."""

    def read(self, config: ConfigKeys, num_layers: int) -> tuple[int, ...]:
        """Return all blocks."""
        return tuple(range(num_layers))

    def write(self, blocks: Sequence[int], num_layers: int) -> Mapping[str, Any] | None:
        """Return no entry, and None where a block is dense."""
        return {} if len(blocks) == num_layers else None


class ListedBlocks:
    """Qwen: every `decoder_sparse_step`-th block, without those in `mlp_only_layers`."""

    def read(self, config: ConfigKeys, num_layers: int) -> tuple[int, ...]:
        """Return the blocks that are dense for neither reason."""
        step, dense = config.number("decoder_sparse_step"), config.values.get("mlp_only_layers") or ()
        return tuple(block for block in range(num_layers) if (block + 1) % step == 0 and block not in dense)

    def write(self, blocks: Sequence[int], num_layers: int) -> Mapping[str, Any] | None:
        """Return the list of dense blocks."""
        dense = [block for block in range(num_layers) if block not in set(blocks)]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


class AfterFirst:
    """DeepSeek and GLM: all blocks after the first `first_k_dense_replace`."""

    def read(self, config: ConfigKeys, num_layers: int) -> tuple[int, ...]:
        """Return the blocks after the dense ones."""
        return tuple(range(max(int(config.values.get("first_k_dense_replace") or 0), 0), num_layers))

    def write(self, blocks: Sequence[int], num_layers: int) -> Mapping[str, Any] | None:
        """Return the number of dense blocks, and None where they are not the first ones."""
        first = num_layers - len(blocks)
        return {"first_k_dense_replace": first} if list(blocks) == list(range(first, num_layers)) else None
