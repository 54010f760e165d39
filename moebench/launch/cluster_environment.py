"""Read from the environment whether torchrun or SLURM has started this program as one of several."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from moebench.errors import UsageError
from moebench.parallel.process_info import ProcessInfo


@dataclass(frozen=True, kw_only=True)
class ClusterEnvironment:
    """Ranks and store of this program, as torchrun or SLURM has set them."""

    process_info: ProcessInfo
    """Its namespace is the prefix of all keys of this launch."""
    hosts_store: bool
    """Whether rank 0 has to open the store."""


def detect_cluster(environment: Mapping[str, str] = os.environ) -> ClusterEnvironment | None:
    """Return the cluster environment, or None if this program was started alone.

    Raises UsageError if the environment is incomplete.
    """
    for is_started_by, read in _LAUNCHERS:
        if is_started_by(environment):
            try:
                return read(environment)
            except (KeyError, ValueError, RuntimeError) as error:
                raise UsageError(f"one of several processes, but its environment is incomplete: {error}") from error
    return None


def _is_torchrun(environment: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in environment


def _is_slurm(environment: Mapping[str, str]) -> bool:
    # An interactive shell has the variables of the allocation, although srun has started no process.
    is_interactive = environment.get("SLURM_JOB_NAME") in ("bash", "interactive")
    has_several = "SLURM_PROCID" in environment and int(environment.get("SLURM_NTASKS", "1")) > 1
    return "SLURM_JOB_ID" in environment and has_several and not is_interactive


def _read_torchrun(environment: Mapping[str, str]) -> ClusterEnvironment:
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    cluster = TorchElasticEnvironment()
    local_world_size = int(environment["LOCAL_WORLD_SIZE"])
    restarts = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    process_info = ProcessInfo(
        rank=cluster.global_rank(),
        world_size=cluster.world_size(),
        local_rank=cluster.local_rank(),
        local_world_size=local_world_size,
        node=cluster.node_rank(),
        num_nodes=cluster.world_size() // local_world_size,
        store_host=cluster.main_address,
        store_port=cluster.main_port,
        namespace=f"moebench/{environment['TORCHELASTIC_RUN_ID']}/{restarts}",
    )
    hosts_store = environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return ClusterEnvironment(process_info=process_info, hosts_store=hosts_store)


def _read_slurm(environment: Mapping[str, str]) -> ClusterEnvironment:
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    cluster = SLURMEnvironment(auto_requeue=False)
    num_nodes = int(environment["SLURM_NNODES"])
    process_info = ProcessInfo(
        rank=cluster.global_rank(),
        world_size=cluster.world_size(),
        local_rank=cluster.local_rank(),
        local_world_size=cluster.world_size() // num_nodes,
        node=cluster.node_rank(),
        num_nodes=num_nodes,
        store_host=cluster.main_address,
        store_port=cluster.main_port,
        namespace=f"moebench/{environment['SLURM_JOB_ID']}/{environment.get('SLURM_STEP_ID', '0')}",
    )
    return ClusterEnvironment(process_info=process_info, hosts_store=True)


_LAUNCHERS: tuple[
    tuple[Callable[[Mapping[str, str]], bool], Callable[[Mapping[str, str]], ClusterEnvironment]], ...
] = ((_is_torchrun, _read_torchrun), (_is_slurm, _read_slurm))
