"""The rules of a router that are checked where it is built and where it routes; breaking one is a one-line error."""

import inspect

import torch

from moebench.errors import UsageError
from moebench.plugin_errors import describe_error
from moebench.routing.logit_router import LogitRouter
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.router import ROUTERS, Form, Router, RouterBuildContext, RouterConfig
from moebench.routing.values import AnyRouting, ChainRouting, Routing

ROUTING_OF_FORM: dict[Form, type] = {
    Form.LIST: Routing,
    Form.DENSE: Routing,
    Form.SOFT: SoftRouting,
    Form.MERGED: MergeRouting,
    Form.CHAIN: ChainRouting,
}
"""What `forward` returns, by the router's form."""


class RouterContractError(UsageError):
    """A router does something else than its file declares."""


def build_router(router_class: type[Router], config: RouterConfig, context: RouterBuildContext) -> Router:
    """Build a router.

    Raises RouterContractError, which names the router's file, when its `__init__` fails or makes parameters that are
    not fp32.
    """
    try:
        router = router_class(config, context)
    except UsageError:
        raise
    except Exception as error:
        raise RouterContractError(
            f"{label_router(config.name)}: __init__: {describe_error(error)}{_meta_hint(error)}"
        ) from error
    for name, parameter in router.named_parameters():
        if parameter.dtype != torch.float32:
            raise RouterContractError(
                f"{label_router(config.name)}: parameter '{name}' must be float32, got {parameter.dtype}"
            )
    return router


def check_router_class(router_class: type[Router], config: RouterConfig, num_experts: int) -> None:
    """Raise RouterContractError unless a router's form losses and experts per token are what shared code can read."""
    if not isinstance(router_class.form, Form):
        raise RouterContractError(
            f"{label_router(config.name)}: form must be a member of Form, such as Form.LIST, got {router_class.form!r}"
        )
    if router_class.forward is Router.forward:
        raise RouterContractError(f"{label_router(config.name)}: its class must define forward(x_TD, ctx)")
    if router_class.forward is LogitRouter.forward and LogitRouter.assign is getattr(router_class, "assign", None):
        raise RouterContractError(
            f"{label_router(config.name)}: its class must define score_tokens(x_TD, ctx) and assign(logits_TE, ctx)"
        )
    signature = inspect.signature(router_class.forward)
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise RouterContractError(
            f"{label_router(config.name)}: forward must take (x_TD, ctx), got forward{signature}"
        ) from error
    if router_class.losses is not Router.losses and not ROUTERS.get(config.name).facts.own_losses:
        raise RouterContractError(f"{label_router(config.name)}: Facts.own_losses must name what losses() returns")
    if not all(isinstance(coefficient, int | float) for coefficient in config.losses.values()):
        raise RouterContractError(
            f"{label_router(config.name)}: Config.losses: coefficients must be numbers, got {config.losses}"
        )
    try:
        num_used = router_class.experts_per_token(config, num_experts)
    except TypeError as error:
        raise RouterContractError(
            f"{label_router(config.name)}: experts_per_token(config, num_experts) must be a static or class method:"
            f" {describe_error(error)}"
        ) from error
    except (ArithmeticError, ValueError) as error:
        router_class.check(config, num_experts)  # names the option with which it cannot be computed
        raise RouterContractError(
            f"{label_router(config.name)}: experts_per_token failed with its options: {describe_error(error)}"
        ) from error
    if not isinstance(num_used, int) or num_used < 0:
        raise RouterContractError(
            f"{label_router(config.name)}: experts_per_token must return a whole number, got {num_used!r}"
        )


def check_routing(router: Router, routing: object) -> AnyRouting:
    """Return what a router's `forward` returned; raise RouterContractError unless it is what its form announces."""
    expected = ROUTING_OF_FORM[router.form]
    if not isinstance(routing, expected):
        raise RouterContractError(
            f"{label_router(router.config.name)}: forward must return a {expected.__name__}, as"
            f" form=Form.{router.form.name} declares, got {type(routing).__name__}"
        )
    return routing  # type: ignore[return-value]  # one of the types above


def label_router(name: str) -> str:
    """Return a router's name and, where it is registered, its file, as the start of a message."""
    origins = {entry.name: f" ({entry.origin})" for entry in ROUTERS.entries()}
    return f"router '{name}'{origins.get(name, '')}"


def _meta_hint(error: Exception) -> str:
    is_of_tensors = isinstance(error, RuntimeError) or "meta" in str(error)  # NotImplementedError is a RuntimeError
    if torch.get_default_device().type != "meta" or not is_of_tensors:
        return ""
    return " (routers are first built on the meta device: __init__ must not use .item(), .tolist() or numpy on tensors)"
