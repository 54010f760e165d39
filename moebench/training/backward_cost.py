"""FLOPs and parameters of training where only some parameters are updated (`train.trainable`)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moebench.experts.layer import MoELayer
from moebench.models.transformer import Block, Transformer
from moebench.schema import TrainConfig
from moebench.training.model import Model
from moebench.training.optimizer.groups import ParameterRole, describe_parameters
from moebench.training.trainable import GROUPS
from moebench.training.utilization import BACKWARD_FACTOR


@dataclass(frozen=True, kw_only=True)
class TrainedPart:
    """What a step computes and keeps besides the forward pass."""

    factor: float = BACKWARD_FACTOR
    """FLOPs of forward and backward pass over those of the forward pass."""
    share: float = 1.0
    """Parameters that have a gradient and a state in the optimizer, over all."""


ALL = TrainedPart()


def measure_trained_part(model: Model, train: TrainConfig, sequence_length: int) -> TrainedPart:
    """Return the cost of the backward pass and the trained share of the parameters; the model may be without storage.

    Gradients reach down to the lowest block that has a trained parameter, and are computed for the inputs of all maps
    there and above, and for the weights of the trained ones. In that block nothing below its experts and its router has
    a gradient, where only these are trained. Kernels compute the gradients of all experts of a bank, and of their
    inputs. Of an encoder-decoder, and of experts that are stacks of blocks, the gradients reach everything.
    """
    if train.trainable == "all":
        return ALL
    roles = describe_parameters(model)
    groups = GROUPS[train.trainable]
    trained = {id(role.parameter) for role in roles if role.group in groups}
    num_trained = sum(role.parameter.numel() for role in roles if id(role.parameter) in trained)
    share = num_trained / sum(role.parameter.numel() for role in roles)
    return TrainedPart(factor=_count_factor(model, roles, trained, sequence_length), share=share)


def _count_factor(model: Model, roles: Sequence[ParameterRole], trained: set[int], length: int) -> float:
    backbone = model.backbone
    if not isinstance(backbone, Transformer) or not all(isinstance(block, Block) for block in backbone.blocks):
        return float(BACKWARD_FACTOR)
    rows = {
        id(parameter): layer.rows_per_token / layer.bank.num_experts
        for layer in backbone.moe_layers()
        for parameter in layer.bank.parameters()
    }
    maps = {id(role.parameter) for role in roles if not role.is_vector and role.group != "embeddings"}
    is_reached = any(id(parameter) in trained for parameter in model.embedding.parameters())
    forward = backward = 0.0
    for block in backbone.blocks:
        assert isinstance(block, Block)
        flops = float(block.flops_per_token(length))
        matrices = [parameter for parameter in block.parameters() if id(parameter) in maps]
        products = {id(p): 2 * p.numel() * rows.get(id(p), 1.0) for p in matrices}
        forward += flops
        if not is_reached and any(id(parameter) in trained for parameter in block.parameters()):
            is_reached = True
            ends = _list_lowest_matrices(block, trained)
            if ends is not None:
                weights = sum(products.get(id(parameter), 0.0) for parameter in ends)
                backward += weights + sum(products.get(id(p), 0.0) for p in ends if id(p) in rows)
                continue
        if is_reached:
            of_weights = sum(count for key, count in products.items() if key in trained or key in rows)
            of_inputs = sum(products.values())
            backward += of_inputs + of_weights + 2 * max(flops - of_inputs, 0.0)
    head = sum(2 * parameter.numel() for parameter in _list_matrices(model.head))
    is_head_trained = any(id(parameter) in trained for parameter in model.head.parameters())
    forward += head
    backward += head * (is_reached + is_head_trained)
    return (forward + backward) / forward


def _list_lowest_matrices(block: Block, trained: set[int]) -> list[nn.Parameter] | None:
    """Return the parameters of the lowest trained block whose gradients are computed; None where it is all of them.

    They are those of its experts and its trained ones, if these are all of the layer's experts and router.
    """
    layer = block.feed_forward
    if not isinstance(layer, MoELayer):
        return None
    experts, router = [*layer.bank.parameters()], [*layer.router.parameters()]
    trained_here = [parameter for parameter in block.parameters() if id(parameter) in trained]
    if not {id(parameter) for parameter in trained_here} <= {id(parameter) for parameter in (*experts, *router)}:
        return None
    return [*experts, *(parameter for parameter in router if id(parameter) in trained)]


def _list_matrices(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.dim() >= 2]
