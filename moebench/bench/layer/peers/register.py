"""Which libraries are compared with, and whether they are here."""

import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from moebench.bench.layer.problem import Candidate, Problem, Skipped


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A library; its adapter has a function `build_candidates(problem)`."""

    package: str
    """Name on the package index."""
    module: str
    """Name to import."""
    adapter: str | None
    """File in this folder; None: named, but not run."""
    why_not: str = ""


PEERS = (
    Peer(package="transformers", module="transformers", adapter="hugging_face"),
    Peer(package="st-moe-pytorch", module="st_moe_pytorch", adapter="st_moe"),
    Peer(package="mixture-of-experts", module="mixture_of_experts", adapter="mixture"),
    Peer(package="soft-moe-pytorch", module="soft_moe_pytorch", adapter="soft_moe"),
    Peer(package="deepspeed", module="deepspeed", adapter=None, why_not="no adapter: its layer was not run on a CPU"),
)
INSTALL = "pip install 'moebench[peers]'"


def absence(peer: Peer) -> str | None:
    """Return why a library cannot take part; None when it can."""
    if importlib.util.find_spec(peer.module) is None:
        hint = f" ({INSTALL})" if peer.adapter else ""
        return f"not installed{hint}" + (f"; {peer.why_not}" if peer.why_not else "")
    return peer.why_not or None


def versions() -> dict[str, str | None]:
    """Return package -> version, None where it is not installed."""
    return {peer.package: _version(peer.package) for peer in PEERS}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def peer_contestants(problem: Problem) -> list[Candidate | Skipped]:
    """Return the layers of every library that is here; a library that fails to import or build says why."""
    found: list[Candidate | Skipped] = []
    for peer in PEERS:
        if absence(peer) is None:
            found += _contestants(peer, problem)
    return found


def _contestants(peer: Peer, problem: Problem) -> list[Candidate | Skipped]:
    try:
        adapter = importlib.import_module(f"moebench.bench.layer.peers.{peer.adapter}")
        found: list[Candidate | Skipped] = adapter.build_candidates(problem)
    except Exception as error:  # another library's release may change anything; the row goes on without it
        return [Skipped(name=peer.package, reason=_in_a_line(error))]
    return [_tried(one, problem) if isinstance(one, Candidate) else one for one in found]


def _tried(one: Candidate, problem: Problem) -> Candidate | Skipped:
    """Return a layer that can go forward and back once, else the reason why it cannot."""
    try:
        one.forward(problem.x_TD).sum().backward()  # type: ignore[no-untyped-call]
    except Exception as error:
        return Skipped(name=one.name, reason=_in_a_line(error))
    return one


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
