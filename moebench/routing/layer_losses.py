"""The auxiliary losses of MoE layers by name: those that a router defines itself, and the shared ones."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from moebench.errors import UsageError
from moebench.plugin_errors import ContractError, is_plugin
from moebench.routing.contract import RouterContractError, describe_value, label_router
from moebench.routing.losses import LOSSES
from moebench.routing.reduction import LossValue, PendingLoss, resolve_losses
from moebench.routing.router import ROUTERS, Router
from moebench.routing.values import LayerRecord


def compute_raw_losses(router: Router, record: LayerRecord, names: Collection[str]) -> dict[str, Tensor]:
    """Return the named losses of a layer, without coefficients; the router's own losses override the shared ones."""
    return compute_losses_of_layers([router], [record], names)[0]


def compute_losses_of_layers(
    routers: Sequence[Router], records: Sequence[LayerRecord], names: Collection[str]
) -> list[dict[str, Tensor]]:
    """Return `compute_raw_losses` of several layers; processes exchange the sums of all of them at once."""
    if not routers or not names:
        return [{} for _ in routers]
    ranks = records[0].ranks
    pending: list[LossValue] = []
    for router, record in zip(routers, records, strict=True):
        pending += _compute_losses(router, replace(record, defers_sums=ranks.size > 1), names)
    values = iter(resolve_losses(pending, ranks))
    return [{name: next(values) for name in names} for _ in routers]


def check_own_losses(router: Router, record: LayerRecord) -> None:
    """Raise ContractError unless a plug-in router returns the losses that its facts announce, with or without weight.

    Training computes a loss only where it has a coefficient.
    """
    own_losses = _compute_own_losses(router, replace(record, defers_sums=record.ranks.size > 1))
    for name in ROUTERS.get(router.config.name).facts.own_losses:
        if name not in own_losses:
            raise _missing_loss(router, name)


def _compute_losses(router: Router, record: LayerRecord, names: Collection[str]) -> Iterator[LossValue]:
    """Yield the named losses of one layer; raise ContractError for one that is no scalar, or not there."""
    own_losses = _compute_own_losses(router, record)
    for name in names:
        if name in own_losses:
            yield own_losses[name]
            continue
        if name not in LOSSES.names() and is_plugin(type(router.config)):
            raise _missing_loss(router, name)
        entry = LOSSES.get(name)
        try:
            value = entry.item(record)
        except UsageError as error:  # the loss needs what the router does not have
            if not is_plugin(type(router.config)):
                raise
            raise RouterContractError(f"{label_router(router.config.name)}: {error}") from error
        _require_scalar(entry.label, name, value)
        yield value


def _compute_own_losses(router: Router, record: LayerRecord) -> Mapping[str, LossValue]:
    """Return the losses that only this router has; raise ContractError for a wrong name or a value with dimensions."""
    own_losses: Any = router.losses(record)
    if not isinstance(own_losses, Mapping):
        label = label_router(router.config.name)
        raise RouterContractError(f"{label}: losses must return losses by name, got {describe_value(own_losses)}")
    for name, value in own_losses.items():
        if is_plugin(type(router.config)):
            _check_name(name, router)
        _require_scalar(f"{label_router(router.config.name)}: losses", name, value)
    return own_losses


def _check_name(name: str, router: Router) -> None:
    """Raise RouterContractError for a loss that `Facts.own_losses` does not name."""
    names = ROUTERS.get(router.config.name).facts.own_losses
    if name not in names:
        label = label_router(router.config.name)
        raise RouterContractError(f"{label}: losses returned '{name}', Facts.own_losses has {', '.join(names)}")


def _missing_loss(router: Router, name: str) -> RouterContractError:
    label = label_router(router.config.name)
    return RouterContractError(f"{label}: losses must return '{name}', which Facts.own_losses names")


def _require_scalar(owner: str, name: str, value: object) -> None:
    if not (isinstance(value, PendingLoss) or (isinstance(value, Tensor) and value.dim() == 0)):
        raise ContractError(f"{owner}: '{name}' must be a tensor without dimensions, got {describe_value(value)}")
