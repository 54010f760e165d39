"""How parameters are divided among processes, and how their parts are sent in pieces of bounded size."""

import pytest
import torch

from moebench.parallel import parameter_shards
from moebench.parallel.parameter_shards import _choose_dim, _fill_buckets, _split_pieces


@pytest.mark.parametrize(
    ("shape", "num_copies", "is_matrix", "dim"),
    [
        ((8, 6, 4), 4, False, 0),
        ((6, 8, 4), 4, False, 1),  # 6 experts do not divide among 4 processes, their rows do
        ((3, 5), 2, False, None),
        ((), 2, False, None),
        ((8, 8), 2, True, None),  # one matrix stays in one piece
        ((3, 8, 8), 2, True, 0),  # of three matrices, one process has two
    ],
)
def test_dimension(shape: tuple[int, ...], num_copies: int, is_matrix: bool, dim: int | None) -> None:
    assert _choose_dim(torch.Size(shape), num_copies, is_matrix=is_matrix) == dim


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("limit", [4, 10, 50, 1000])
def test_pieces_cover_a_parameter_and_are_bounded(dim: int, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(parameter_shards.MAX_GATHERED_ELEMENTS, "cpu", limit)
    shape = [3, 5, 7]
    shape[dim] = 4
    parameter = torch.zeros(shape)
    parts_W = parameter.unflatten(dim, (2, -1)).movedim(dim, 0)
    updated = torch.arange(1.0, parts_W[0].numel() + 1).view(parts_W.shape[1:])
    pieces = list(_split_pieces(parts_W, updated))
    for target_W, piece in pieces:
        assert target_W.numel() <= limit
        target_W.copy_(piece.expand_as(target_W))
    assert torch.equal(parameter.chunk(2, dim)[0], updated)
    assert torch.equal(parameter.chunk(2, dim)[1], updated)
    for bucket in _fill_buckets(pieces * 3):
        assert sum(target_W.numel() for target_W, _ in bucket) <= limit
