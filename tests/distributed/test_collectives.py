"""Sums, gathers and all-to-alls over two processes, with results worked by hand."""

import torch
from support.process_group import Mesh, Shape

from moebench.parallel.collectives import AsyncAllToAll
from moebench.parallel.exchange import ExpertExchange

PATTERNS = (
    [[1, 2], [3, 4]],
    [[0, 5], [2, 0]],  # rank 0 sends to rank 1 and vice versa
    [[0, 0], [4, 1]],  # rank 0 sends nothing
    [[3, 0], [3, 0]],  # rank 1 receives nothing
    [[0, 0], [0, 0]],
)
"""Rows from each rank to each rank."""


def check_collectives(mesh: Mesh) -> None:
    rank = mesh.rank
    value = torch.tensor([1.0 + rank, 10.0], requires_grad=True)
    summed = mesh.world.sum(value)
    assert summed.tolist() == [3.0, 20.0]
    (summed * torch.tensor([1.0, 2.0 + rank])).sum().backward()
    # The sum of both ranks' losses: the first number counts 1 + 1, the second 2 + 3.
    assert value.grad is not None
    assert value.grad.tolist() == [2.0, 5.0]
    assert mesh.world.sum(torch.tensor(rank)).item() == 1

    rows = torch.full((rank * 2, 3), float(rank), requires_grad=True)  # rank 0 has no rows
    gathered = mesh.world.gather(rows)
    assert gathered.tolist() == [[1.0] * 3] * 2
    (gathered * (rank + 1)).sum().backward()
    assert rows.grad is not None
    assert rows.grad.tolist() == [[3.0] * 3] * (rank * 2)
    assert mesh.world.gather(torch.tensor([rank == 1])).tolist() == [False, True]

    assert mesh.expert_group is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for pattern in PATTERNS:
            check_all_to_all(mesh, pattern, dtype)


def check_all_to_all(mesh: Mesh, pattern: list[list[int]], dtype: torch.dtype) -> None:
    assert mesh.expert_group is not None
    rank = mesh.rank
    send, receive = pattern[rank], [pattern[other][rank] for other in (0, 1)]
    labels = [10.0 * rank + to for to in (0, 1) for _ in range(send[to])]
    x_RI = torch.tensor(labels, dtype=dtype).view(-1, 1).requires_grad_()
    mesh.traffic.reset(is_timed=False)
    received_RI = AsyncAllToAll(send, receive, mesh.expert_group, mesh.traffic)(x_RI)
    assert received_RI.flatten().tolist() == [10.0 * source + rank for source in (0, 1) for _ in range(receive[source])]
    assert mesh.traffic.num_bytes == send[1 - rank] * dtype.itemsize
    (received_RI * (1.0 + rank)).sum().backward()
    assert x_RI.grad is not None
    assert x_RI.grad.flatten().tolist() == [1.0] * send[0] + [2.0] * send[1]
    assert mesh.traffic.num_bytes == (send[1 - rank] + receive[1 - rank]) * dtype.itemsize


def test_collectives_are_exact() -> None:
    Shape(1, 2).run(check_collectives)


def check_order(mesh: Mesh) -> None:
    """Check that experts get their rows in the order of the full batch, and that results return to their rows."""
    assert mesh.expert_group is not None
    exchange = ExpertExchange(mesh.expert_group, mesh.traffic, overlap=True)
    load_E = torch.tensor([[2, 0, 1, 3], [1, 1, 0, 2]][mesh.rank])
    expert_R = torch.arange(4).repeat_interleave(load_E)
    x_RI = torch.stack([expert_R, torch.arange(len(expert_R)) + 100 * mesh.rank], 1).double()
    calls = []

    def compute(rows_RI: torch.Tensor, loads_E: torch.Tensor) -> torch.Tensor:
        calls.append((rows_RI.tolist(), loads_E.tolist()))
        return -rows_RI

    overlapped = []
    padded_RI = torch.cat([x_RI, torch.full((2, 2), torch.nan, dtype=torch.float64)])  # rows without an expert
    y_RI = exchange(compute, padded_RI, load_E, lambda: overlapped.append(True))
    assert torch.equal(y_RI, torch.cat([-x_RI, torch.zeros(2, 2, dtype=torch.float64)]))
    assert overlapped == [True]
    ((rows, loads),) = calls
    if mesh.rank == 0:
        assert loads == [3, 1]
        assert rows == [[0, 0], [0, 1], [0, 100], [1, 101]]
    else:
        assert loads == [1, 5]
        assert rows == [[2, 2], [3, 3], [3, 4], [3, 5], [3, 102], [3, 103]]
    assert exchange.count_sent_rows(load_E) == [4, 2][mesh.rank]
    assert exchange.count_local_rows(torch.tensor([3, 1, 1, 5])) == [4, 6][mesh.rank]


def test_rows_arrive_in_the_order_of_the_batch() -> None:
    Shape(1, 2).run(check_order)


def describe_communicators(mesh: Mesh) -> tuple[bool, list[float]]:
    """Return whether all communicators differ, and their timeouts in seconds."""
    from torch.distributed import group

    assert mesh.expert_group is not None
    assert mesh.replica_group is not None
    groups = [group.WORLD, mesh.world.group, mesh.expert_group, mesh.replica_group]
    timeouts_s = [g._get_backend(torch.device("cpu")).options._timeout.total_seconds() for g in groups]
    return len({id(g) for g in groups}) == len(groups), timeouts_s


def test_communicators_differ_and_have_the_configured_timeout() -> None:
    for are_different, timeouts_s in Shape(1, 2, {"timeout_s": 20.0}).run(describe_communicators):
        assert are_different
        assert timeouts_s == [20.0] * 4
