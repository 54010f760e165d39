"""Shared embedding: one small network whose output every router reads (SpeechMoE, arXiv:2105.03036)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor, nn
from torch.nn import functional
from typing_extensions import override

from moebench.routing.features.feature import BatchView, Feature, FeatureLoss, TaskFactsView, TrainingPasses


class EmbeddingNetwork(nn.Module):
    """Two linear maps with a GELU between them, over the model's input vectors, and a head to learn by.

    The input vectors are detached: the losses of routers and head train this network and nothing below it.
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
        """Return forward FLOPs per token, without the head, which routing does not use."""
        return 2 * (self.first.weight.numel() + self.second.weight.numel())


@dataclass(frozen=True)
class SharedEmbedding(Feature):
    """Embedding of each token, [T, width], the same in all layers; trained by the task's loss through its own head."""

    width: int
    coefficient: float
    """Coefficient of the network's own loss."""
    description = "one network before all layers (router.embedding=shared)"
    module_name = "shared"

    @override
    def is_provided_by(self, facts: TaskFactsView) -> bool:
        return not facts.is_encoder_decoder

    @override
    def build_module(self, d_model: int, build_head: Callable[[int], nn.Module]) -> EmbeddingNetwork:
        return EmbeddingNetwork(d_model, self.width, build_head(self.width))

    @override
    def from_batch(self, batch: BatchView, x_BLD: Tensor, module: nn.Module | None) -> Tensor:
        assert module is not None
        e_BLD: Tensor = module(x_BLD)
        return e_BLD

    @override
    def compute_loss(self, passes: TrainingPasses, module: nn.Module | None) -> FeatureLoss:
        assert isinstance(module, EmbeddingNetwork)
        raw = passes.task_loss(module.head(module(passes.input_vectors())))
        return FeatureLoss(name="embedding", raw=raw, coefficient=self.coefficient)

    @override
    def count_training_flops(self, module: nn.Module | None, count: Callable[[nn.Module], int]) -> int:
        assert isinstance(module, EmbeddingNetwork)
        return count(module) + count(module.head)  # a second pass for its own loss, through its own head
