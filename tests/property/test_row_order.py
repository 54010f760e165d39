"""The order of rows that other processes have sent equals a stable sort by expert."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.parallel.exchange import RowOrder


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_rows_are_sorted_by_expert_and_back(num_processes: int, num_experts: int, data: st.DataObject) -> None:
    counts = st.lists(st.integers(0, 3), min_size=num_experts, max_size=num_experts)
    received = data.draw(st.lists(counts, min_size=num_processes, max_size=num_processes))
    expert_R = torch.tensor([e for row in received for e, n in enumerate(row) for _ in range(n)], dtype=torch.int64)
    order = RowOrder.of(torch.tensor(received), len(expert_R))
    assert order.by_expert_R.tolist() == expert_R.argsort(stable=True).tolist()
    assert order.by_expert_R[order.by_process_R].tolist() == list(range(len(expert_R)))
