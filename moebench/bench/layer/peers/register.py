"""The libraries that the layer is compared with, as far as they are installed."""

import importlib
import importlib.util
from dataclasses import dataclass

from moebench.bench.layer.problem import Candidate, Problem, Skipped
from moebench.runs.environment import find_version


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library; its adapter has a function `build_candidates(problem)`."""

    package: str
    """Name on the package index."""
    module: str
    """Name to import."""
    adapter: str | None
    """File in this folder; None: never run."""
    reason: str = ""
    """Why it is not run."""


PEERS = (
    Peer(package="transformers", module="transformers", adapter="hugging_face"),
    Peer(package="st-moe-pytorch", module="st_moe_pytorch", adapter="st_moe"),
    Peer(package="mixture-of-experts", module="mixture_of_experts", adapter="mixture"),
    Peer(package="soft-moe-pytorch", module="soft_moe_pytorch", adapter="soft_moe"),
    Peer(package="liger-kernel", module="liger_kernel", adapter="liger"),
    Peer(package="deepspeed", module="deepspeed", adapter=None, reason="no adapter: its layer was not run on a CPU"),
)
PACKAGE = "moebench.bench.layer.peers"
"""Package of the adapters."""
INSTALL = "pip install 'moebench[peers]'"


def find_absence_reason(peer: Peer) -> str | None:
    """Return why a library cannot be measured; None if it can."""
    if importlib.util.find_spec(peer.module) is None:
        hint = f" ({INSTALL})" if peer.adapter else ""
        return f"not installed{hint}" + (f"; {peer.reason}" if peer.reason else "")
    return peer.reason or None


def list_versions() -> dict[str, str | None]:
    """Return package -> version; None where it is not installed."""
    return {peer.package: find_version(peer.package) for peer in PEERS}


def build_peer_candidates(problem: Problem) -> list[Candidate | Skipped]:
    """Return the layers of every installed library, or why one fails to import or build."""
    candidates: list[Candidate | Skipped] = []
    for peer in PEERS:
        if find_absence_reason(peer) is None:
            candidates += _build_candidates(peer, problem)
    return candidates


def _build_candidates(peer: Peer, problem: Problem) -> list[Candidate | Skipped]:
    try:
        adapter = importlib.import_module(f"{PACKAGE}.{peer.adapter}")
        candidates: list[Candidate | Skipped] = adapter.build_candidates(problem)
    except Exception as error:  # any release of another library may break its adapter; the row continues without it
        return [Skipped(name=peer.package, reason=_one_line(error))]
    return [_try_out(layer, problem) if isinstance(layer, Candidate) else layer for layer in candidates]


def _try_out(layer: Candidate, problem: Problem) -> Candidate | Skipped:
    """Run a layer forward and backward once; return it, or the reason why it failed."""
    try:
        layer.forward(problem.x_TD).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return Skipped(name=layer.name, reason=_one_line(error))
    return layer


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
