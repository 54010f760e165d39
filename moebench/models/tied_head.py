"""The output projection that is the table of the token embedding."""

from torch import Tensor, nn
from torch.nn import functional

from moebench.tasks.deferred_logits import ModelOutput, defer_logits
from moebench.tasks.language import TokenEmbedding


class TiedHead(nn.Module):
    """Projection to the vocabulary by the embedding's table (Press and Wolf, arXiv:1608.05859), without parameters."""

    max_logits: int | None = None
    """As of `TokenHead`."""

    def __init__(self, embedding: TokenEmbedding, num_outputs: int) -> None:
        """`num_outputs`: the first ids of the table; ids after them, such as a mask, are inputs alone."""
        super().__init__()
        # In a tuple, the module is no child: the table belongs to the embedding alone, so that optimizer, clipping and
        # checkpoints have it once, and it is still this one after they have set it.
        self._embedding = (embedding,)
        self.num_outputs = num_outputs

    def forward(self, x_BLD: Tensor) -> ModelOutput:
        """Return the logits of each position."""
        weight_VD = self._embedding[0].weight[: self.num_outputs]
        return defer_logits(x_BLD, weight_VD, self.max_logits) or functional.linear(x_BLD, weight_VD)

    def flops_per_token(self, length: int) -> int:
        """Return the forward FLOPs of one token."""
        return 2 * self.num_outputs * self._embedding[0].embedding_dim

    def values_per_token(self, length: int) -> int:
        """Return the inputs and outputs of the matrix product."""
        return self.num_outputs + self._embedding[0].embedding_dim


def tie(embedding: nn.Module, head: nn.Module) -> TiedHead:
    """Return the head that uses the embedding's table, which is initialised for both uses."""
    assert isinstance(embedding, TokenEmbedding)
    assert isinstance(head, nn.Linear)
    embedding.init_std = embedding.embedding_dim**-0.5
    return TiedHead(embedding, head.out_features)
