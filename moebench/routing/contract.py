"""The rules of a router that are checked when it is built and when it routes; an error is one line with its file."""

from collections.abc import Mapping
from numbers import Real

import torch
from torch import Tensor

from moebench.errors import UsageError
from moebench.plugin_errors import ContractError, convert_errors, describe_error, is_plugin
from moebench.routing.logit_router import LogitRouter
from moebench.routing.mixing import MergeRouting, SoftRouting
from moebench.routing.router import ROUTERS, Form, Router, RouterBuildContext, RouterConfig, RouterTraits
from moebench.routing.values import AnyRouting, ChainRouting, LayerRecord, Routing

ROUTING_OF_FORM: dict[Form, type] = {
    Form.LIST: Routing,
    Form.DENSE: Routing,
    Form.SOFT: SoftRouting,
    Form.MERGED: MergeRouting,
    Form.CHAIN: ChainRouting,
}
"""What `forward` returns, by the router's form."""


class RouterContractError(ContractError):
    """A router does not do what its file declares."""


def build_router(router_class: type[Router], config: RouterConfig, context: RouterBuildContext) -> Router:
    """Build a router.

    Raises RouterContractError, which names the router's file, when its `__init__` fails or makes parameters that are
    not fp32.
    """
    try:
        router = router_class(config, context)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        raise RouterContractError(
            f"{label_router(config.name)}: __init__: {describe_error(error)}{_describe_meta_device(error)}"
        ) from error
    if not hasattr(router, "config"):
        raise RouterContractError(
            f"{label_router(config.name)}: __init__ must begin with super().__init__(config, context)"
        )
    for name, parameter in router.named_parameters():
        if parameter.dtype != torch.float32:
            raise RouterContractError(
                f"{label_router(config.name)}: parameter '{name}' must be float32, got {parameter.dtype}"
            )
    if is_plugin(router_class):
        with convert_errors(lambda: f"{label_router(config.name)}: costs and traits"):
            _check_properties(router, router_class.experts_per_token(config, context.num_experts))
    return router


def _check_properties(router: Router, experts_per_token: int) -> None:
    """Raise RouterContractError unless traits and planned costs are of the types that shared code reads."""
    label = label_router(router.config.name)
    if not isinstance(router.traits, RouterTraits):
        raise RouterContractError(f"{label}: traits must be RouterTraits(...), got {router.traits!r}")
    flops, rows = router.flops_per_token(), router.rows_per_token(experts_per_token)
    costs: dict[str, object] = {"flops_per_token": flops, "rows_per_token": rows}
    for name, cost in costs.items():
        if not (isinstance(cost, Real) and float(cost) >= 0):
            raise RouterContractError(f"{label}: {name} must return a number of at least 0, got {cost!r}")


def check_router_class(router_class: type[Router], config: RouterConfig, num_experts: int) -> None:
    """Raise RouterContractError unless form, losses and experts per token of a router are what shared code reads."""
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
    if router_class.losses is not Router.losses and not ROUTERS.get(config.name).facts.own_losses:
        raise RouterContractError(f"{label_router(config.name)}: Facts.own_losses must name what losses() returns")
    if router_class.losses is Router.losses and ROUTERS.get(config.name).facts.own_losses:
        raise RouterContractError(
            f"{label_router(config.name)}: its class must define losses(record), which Facts.own_losses announces"
        )
    if not all(isinstance(coefficient, int | float) for coefficient in config.losses.values()):
        raise RouterContractError(
            f"{label_router(config.name)}: Config.losses: coefficients must be numbers, got {config.losses}"
        )
    try:
        num_used = router_class.experts_per_token(config, num_experts)
    except TypeError as error:
        raise RouterContractError(f"{label_router(config.name)}: experts_per_token: {describe_error(error)}") from error
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


def check_objective(router: Router, record: LayerRecord) -> Tensor | None:
    """Return the objective of a router; raise RouterContractError unless it is one value for each token, or None."""
    objective_T = router.objective(record)
    num_tokens = record.routing.num_tokens
    if objective_T is not None and not (isinstance(objective_T, Tensor) and objective_T.shape == (num_tokens,)):
        raise RouterContractError(
            f"{label_router(router.config.name)}: objective must return one value for each of the {num_tokens} tokens,"
            f" or None, got {describe_value(objective_T)}"
        )
    return objective_T


def check_statistics(router: Router, record: LayerRecord) -> Mapping[str, Tensor]:
    """Return the statistics of a router; raise RouterContractError unless they are tensors by name."""
    statistics = router.statistics(record)
    if not (isinstance(statistics, Mapping) and all(isinstance(value, Tensor) for value in statistics.values())):
        raise RouterContractError(
            f"{label_router(router.config.name)}: statistics must return tensors by name, got {statistics!r:.100}"
        )
    return statistics


def check_executed_flops(router: Router, record: LayerRecord) -> Tensor:
    """Return the FLOPs that a router executed; raise RouterContractError unless they are a scalar tensor."""
    flops = router.executed_flops(record)
    if not (isinstance(flops, Tensor) and flops.dim() == 0):
        raise RouterContractError(
            f"{label_router(router.config.name)}: executed_flops must return a tensor without dimensions,"
            f" got {describe_value(flops)}"
        )
    return flops


def describe_value(value: object) -> str:
    """Return the type of a value, with the shape and the dtype of a tensor."""
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def find_routing_problem(routing: AnyRouting, num_tokens: int, num_experts: int) -> str:
    """Return what is wrong with the values of a routing; empty if nothing is. Waits for the device."""
    if routing.num_tokens != num_tokens:
        return f"must route the {num_tokens} tokens of x_TD, got num_tokens={routing.num_tokens}"
    if not isinstance(routing, Routing):
        return ""
    if routing.num_experts != num_experts:
        return f"must route to {num_experts} experts, got num_experts={routing.num_experts}"
    lists = {"token_N": routing.token_N, "expert_N": routing.expert_N, "weight_N": routing.weight_N}
    if len({value.shape for value in lists.values()}) > 1 or routing.token_N.dim() != 1:
        shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in lists.items())
        return f"must return token_N, expert_N and weight_N of one length, got {shapes}"
    for name, limit in (("token_N", num_tokens), ("expert_N", num_experts)):
        index_N = lists[name]
        if index_N.dtype != torch.int64:
            return f"must return {name} as int64, got {index_N.dtype}"
        if len(index_N) and not 0 <= int(index_N.min()) <= int(index_N.max()) < limit:
            return f"must return {name} from 0 to {limit - 1}, got {int(index_N.min())} to {int(index_N.max())}"
    if not routing.weight_N.is_floating_point():
        return f"must return weight_N as float32, got {routing.weight_N.dtype}"
    pair_N = (routing.token_N * num_experts + routing.expert_N)[routing.counted_N]
    if bool((pair_N.sort().values.diff() == 0).any()):
        return "must not send a token to one expert twice"
    for name, table_TE in (("logits_TE", routing.logits_TE), ("scores_TE", routing.scores_TE)):
        if table_TE is not None and (table_TE.dim() != 2 or len(table_TE) != num_tokens):
            return f"must return {name} of shape [{num_tokens}, {num_experts}], got {list(table_TE.shape)}"
    return ""


def label_router(name: str) -> str:
    """Return a router's name and, where it is registered, its file, as the start of a message."""
    return ROUTERS.get(name).label if name in ROUTERS.names() else f"router '{name}'"


def _describe_meta_device(error: BaseException) -> str:
    is_of_tensors = isinstance(error, RuntimeError) or "meta" in str(error)  # NotImplementedError is a RuntimeError
    if torch.get_default_device().type != "meta" or not is_of_tensors:
        return ""
    return " (routers are first built on the meta device: __init__ must not use .item(), .tolist() or numpy on tensors)"
