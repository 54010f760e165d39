"""One small network whose output every router reads beside its layer's input (SpeechMoE, arXiv:2105.03036)."""

from torch import Generator, Tensor, nn
from torch.nn import functional


class SharedEmbedding(nn.Module):
    """Two linear maps with a GELU between them, of the model's first vectors, and a head of its own to learn by.

    It reads the first vectors without a gradient: what it learns from its own loss and from the routers stays in it.
    """

    def __init__(self, d_model: int, width: int, head: nn.Module) -> None:
        """`head`: the task's, for vectors of `width`; used in training alone."""
        super().__init__()
        self.first = nn.Linear(d_model, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        self.head = head

    def init_weights(self, generator: Generator) -> None:
        """Draw normal weights with variance 1 / fan-in."""
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5, generator=generator)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the embedding, [B, L, width]."""
        e_BLD: Tensor = self.second(functional.gelu(self.first(x_BLD.detach())))
        return e_BLD

    def flops_per_token(self, length: int) -> int:
        """Forward FLOPs of one token: what routing costs; the head, which only training uses, is not counted."""
        return 2 * (self.first.weight.numel() + self.second.weight.numel())
