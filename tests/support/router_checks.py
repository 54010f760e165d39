"""What several contract tests of routers share: losses, parameters trained by them, notes in failures."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from support.cases import Case
from torch import Tensor

from moebench.routing.losses import LOSSES
from moebench.routing.router import Router
from moebench.routing.values import LayerRecord


@contextmanager
def note_in_failure(**values: Any) -> Iterator[None]:
    """Add the given values to the message of a failure."""
    try:
        yield
    except BaseException as error:
        error.add_note("with " + ", ".join(f"{name}={value}" for name, value in values.items()))
        raise


def compute_raw_losses(router: Router, record: LayerRecord) -> dict[str, Tensor]:
    """Return every loss that the router has a coefficient for or defines itself."""
    router_losses = router.losses(record)
    shared = {name: LOSSES.get(name).item(record) for name in router.config.losses if name not in router_losses}
    return router_losses | shared


def learns_from_own_loss(case: Case, name: str) -> bool:
    """Return whether a parameter is trained by the router's own losses or objective only."""
    return any(name == part or name.startswith(f"{part}.") for part in case.facts.trained_by_own_loss)
