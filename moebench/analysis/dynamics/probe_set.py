"""The fixed batches on which routing is compared, and who takes which of their tokens."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moebench.analysis.trained_run import run_batches
from moebench.routing.values import LayerRecord, Routing
from moebench.schema import CellConfig
from moebench.seeds import make_generator
from moebench.tasks.task import Batch, Task
from moebench.training.model import Model


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeSet:
    """Batches of the validation split: equal for all checkpoints, seeds and arms of one task and batch size."""

    batches: tuple[Batch, ...]
    num_tokens: int
    """Positions without padding, those of an encoder alone where there are two stacks."""
    digest: str
    """Identifies the inputs: equal sets have equal digests."""

    @classmethod
    def draw(cls, task: Task, batch_size: int, num_tokens: int) -> "ProbeSet":
        """Draw whole batches, without regard to any seed of a run, until they have `num_tokens` or all are drawn."""
        batches = task.eval_batches("validation", batch_size)
        order = torch.randperm(len(batches), generator=make_generator("probe set")).tolist()
        drawn: dict[int, Batch] = {}
        total = 0
        for index in order:
            drawn[index] = batches[index]
            total += count_positions(drawn[index])
            if total >= num_tokens:
                break
        selected = tuple(drawn[index] for index in sorted(drawn))
        return cls(batches=selected, num_tokens=total, digest=_digest(selected))

    @property
    def num_sequences(self) -> int:
        """Sequences of all batches."""
        return sum(len(batch.domain_B) for batch in self.batches)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        sizes = {"sequences": self.num_sequences, "tokens": self.num_tokens}
        return {"split": "validation", **sizes, "digest": self.digest}


def count_positions(batch: Batch) -> int:
    """Return the number of positions without padding."""
    return batch.input_BL.shape[0] * batch.input_BL.shape[1] if batch.valid_BL is None else int(batch.valid_BL.sum())


def _digest(batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(str(tuple(batch.input_BL.shape)).encode())
        digest.update(batch.input_BL.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def collect_memberships(model: Model, probe_set: ProbeSet, config: CellConfig) -> dict[str, Tensor]:
    """Return MoE layer -> which token goes to which expert before capacity, bool [T, E] on the CPU, without padding."""
    parts: dict[str, list[Tensor]] = {}
    for _, _, records in run_batches(model, enumerate(probe_set.batches), config):
        for record in records:
            member_TE = _tabulate(record)
            parts.setdefault(str(record.layer), []).append(member_TE.cpu())
    return {layer: torch.cat(tables) for layer, tables in parts.items()}


def _tabulate(record: LayerRecord) -> Tensor:
    routing = record.routing
    assert isinstance(routing, Routing)  # `open_routed_run` refuses routers that mix
    shape = routing.num_tokens, routing.num_experts
    member_TE = torch.zeros(shape, dtype=torch.bool, device=routing.expert_N.device)
    member_TE = member_TE.index_put((routing.token_N, routing.expert_N), routing.counted_N)
    return member_TE if record.valid_T is None else member_TE[record.valid_T]
