import torch

from moebench.routing.mixing import SoftRouting


def test_label_table_of_an_empty_batch_is_zero() -> None:
    empty_BLS = torch.zeros(0, 5, 8)
    routing = SoftRouting(dispatch_BLS=empty_BLS, combine_BLS=empty_BLS, num_experts=4)
    assert not routing.tabulate_labels(torch.zeros(0, dtype=torch.int64), 3).any()
