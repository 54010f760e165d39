"""Read the decisions of the routers of a model of transformers, by hooks on its router modules.

In transformers 5.24 the router modules of Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and DeepSeek-V3 return
`(logits, weights, experts)` of all positions of a batch, in one row each:

- logits [T, E], before softmax or sigmoid, before DeepSeek-V3's selection bias, and before the limit to groups;
- weights [T, K] of the chosen experts, normalised where `norm_topk_prob` says so (always in Mixtral), times
  DeepSeek's `routed_scaling_factor`;
- experts [T, K], the choice itself: after bias and groups.

`output_router_logits=True` returns the first of these alone, from the same call. The choice cannot be read from it
where there is a bias or a limit to groups, so it is not derived from logits here. Switch's router returns
`(dispatch, probability, logits)`: dispatch [B, L, E] is one-hot, and all 0 for a token beyond the capacity, which is
per sequence; probability [B, L, 1] is that of the first choice, dropped or not, in the type of the model. The choice of
a dropped token is the largest of the probabilities, which this type has rounded.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moebench.errors import UsageError
from moebench.routing.layer_name import LayerName
from moebench.seeds import make_generator


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterDecisions:
    """The decisions of one router on T positions."""

    expert_TK: Tensor
    """int64, before capacity."""
    is_kept_TK: Tensor
    """False where an assignment was dropped for capacity."""
    weight_TK: Tensor
    """fp32: what the output of each expert is multiplied by."""
    logits_TE: Tensor
    """fp32, before anything that the router does with them."""


@dataclass(kw_only=True)
class LayerDecisions:
    """What hooks collect of one layer."""

    choices: list[RouterDecisions] = field(default_factory=list)
    random: list[RouterDecisions] = field(default_factory=list)
    """Of the same router with other weights, on the same input."""


@contextmanager
def record_routers(
    routers: Mapping[LayerName, nn.Module], *, with_random: bool = False, seed: int = 0
) -> Iterator[dict[LayerName, LayerDecisions]]:
    """Record every call of the routers while the context is open.

    `with_random`: also what each router would choose with its weights drawn again (`randomise_router`).
    """
    records = {layer: LayerDecisions() for layer in routers}
    random = {layer: randomise_router(router, seed, str(layer)) for layer, router in routers.items() if with_random}
    hooks = [
        router.register_forward_hook(_make_hook(records[layer], random.get(layer))) for layer, router in routers.items()
    ]
    try:
        yield records
    finally:
        for hook in hooks:
            hook.remove()


def randomise_router(router: nn.Module, seed: int, name: str) -> nn.Module:
    """Return a copy of a router whose weights are normal, with the standard deviation of its own; biases are 0.

    It has the input, the selection rule and the scale of the logits of the router, and nothing learned in training.
    """
    copied = copy.deepcopy(router)
    generator = make_generator("randomised router", seed, name)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.dim() < 2:
                parameter.zero_()
                continue
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn * parameter.float().std())
        for buffer in copied.buffers():  # DeepSeek-V3's selection bias
            buffer.zero_()
    copied._forward_hooks.clear()  # those of the copied router record into its model's outputs
    return copied


def _make_hook(record: LayerDecisions, random: nn.Module | None) -> Any:
    def read(router: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        record.choices.append(read_choice(router, output))
        if random is not None:
            record.random.append(read_choice(random, random(*arguments)))

    return read


def read_choice(router: nn.Module, output: Any) -> RouterDecisions:
    """Return the decisions in the output of a router; raise UsageError for a form that is not known."""
    if not isinstance(output, tuple) or len(output) != 3 or not all(isinstance(value, Tensor) for value in output):
        raise UsageError(_describe_form(router))
    first, second, third = output
    if first.dtype.is_floating_point == third.dtype.is_floating_point:
        raise UsageError(_describe_form(router))
    if third.dtype.is_floating_point:
        choice = _read_dispatch(first, second, third)
    else:
        is_kept_TK = torch.ones_like(third, dtype=torch.bool)
        choice = RouterDecisions(
            expert_TK=third.long(), is_kept_TK=is_kept_TK, weight_TK=second.float(), logits_TE=first.float()
        )
    if choice.expert_TK.shape != choice.weight_TK.shape or len(choice.expert_TK) != len(choice.logits_TE):
        raise UsageError(_describe_form(router))
    if not bool((choice.expert_TK < choice.logits_TE.shape[-1]).all()):
        raise UsageError(_describe_form(router))
    return choice


def _read_dispatch(dispatch_BLE: Tensor, weight_BL1: Tensor, logits_BLE: Tensor) -> RouterDecisions:
    """Return the decisions of Switch's router."""
    dispatch_TE, logits_TE = dispatch_BLE.flatten(0, -2), logits_BLE.flatten(0, -2)
    is_kept_T = dispatch_TE.sum(-1) > 0
    score_TE = logits_TE.softmax(-1).to(weight_BL1.dtype)
    expert_T = torch.where(is_kept_T, dispatch_TE.argmax(-1), score_TE.argmax(-1))
    return RouterDecisions(
        expert_TK=expert_T.unsqueeze(1),
        is_kept_TK=is_kept_T.unsqueeze(1),
        weight_TK=weight_BL1.flatten(0, -2).float(),
        logits_TE=logits_TE.float(),
    )


def _describe_form(router: nn.Module) -> str:
    import transformers

    return (
        f"transformers {transformers.__version__}: {type(router).__name__} returns another form than in version 5.24"
        " (allowed: transformers==5.24)"
    )
