"""Hash routers: the expert is a fixed function of token ids or position."""

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from support.cases import VOCAB, Case, Tokens, build_context, route
from support.training_cases import tiny_config, write_text

from moebench.errors import UsageError
from moebench.routing import clusters
from moebench.routing.clusters import cluster_token_ids, embed_token_ids
from moebench.routing.router import ROUTERS
from moebench.routing.routers.hash import build_balanced_table
from moebench.training.model import prepare_task

HASHES = ("hash", "hash_bigram", "hash_future")


def route_ids(name: str, ids: list[list[int]], num_experts: int = 8, **options) -> torch.Tensor:
    """Return the expert of each token of some sequences of ids, after checking that the weights are 1."""
    id_BL = torch.tensor(ids)
    tokens = Tokens.draw(id_BL.numel(), length=id_BL.shape[1])
    tokens = dataclasses.replace(tokens, token_id_T=id_BL.reshape(-1))
    routing = route(Case(name, num_experts, options).router(), tokens, training=True)
    assert (routing.weight_N == 1).all()
    return routing.expert_N.view_as(id_BL)


def test_tables_by_hand() -> None:
    table_V = build_balanced_table(build_context(8).data.token_count_V, 8)
    ids = [[3, 7, 3, 29], [7, 7, 0, 1]]
    assert torch.equal(route_ids("hash", ids), table_V[torch.tensor(ids)])
    # The next id; the last token, which has none, uses its own.
    assert torch.equal(route_ids("hash_future", ids), table_V[torch.tensor([[7, 3, 29, 29], [7, 0, 1, 1]])])
    assert route_ids("hash_position", [[5] * 5, [1] * 5], 4).tolist() == [[0, 1, 2, 3, 0]] * 2


def test_bigram_hash_depends_on_the_pair_within_a_sequence() -> None:
    expert_BL = route_ids("hash_bigram", [[3, 7, 3, 7], [3, 7, 7, 3], [7, 3, 7, 3]])
    assert expert_BL[0, 1] == expert_BL[0, 3] == expert_BL[1, 1] == expert_BL[2, 2], "7 after 3"
    assert expert_BL[0, 2] == expert_BL[1, 3] == expert_BL[2, 1] == expert_BL[2, 3], "3 after 7"
    assert expert_BL[0, 0] == expert_BL[1, 0], "3 at the start, after any previous sequence"
    # One frequent id after each other id is spread over all experts; a table of ids would send it to one.
    pairs = [[before, 5] for before in range(VOCAB)]
    assert route_ids("hash_bigram", pairs)[:, 1].unique().numel() == 8
    # Pairs are spread evenly: 2500 over 8 is 312.5, standard deviation 16.5.
    all_pairs = [[before, after] for before in range(VOCAB) for after in range(VOCAB)]
    load_E = route_ids("hash_bigram", all_pairs)[:, 1].bincount(minlength=8)
    assert (load_E - 312.5).abs().max() < 5 * 16.5


def test_random_table_depends_on_the_layer_only() -> None:
    tables = []
    for layer in (0, 0, 1):
        router_class = ROUTERS.get("hash").item
        context = dataclasses.replace(build_context(8), layer=layer)
        tables.append(router_class(router_class.Config(table="random"), context).table_V)
    assert torch.equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).sum() > 25  # 50 ids, 7/8 of them expected
    assert tables[0].unique().numel() == 8


@pytest.mark.parametrize("name", HASHES)
def test_a_task_without_ids_is_refused(name: str) -> None:
    router_class = ROUTERS.get(name).item
    with pytest.raises(UsageError, match=f"^router.name: '{name}' routes by token id, which this task does not have$"):
        router_class(router_class.Config(), build_context(8, token_count_V=None))


def test_ids_in_similar_contexts_share_an_expert() -> None:
    # Ids 0-3 are always followed by one of 4-7, and those by 8, and 8 by one of 0-3.
    draw = np.random.default_rng(0)
    text_N = np.stack([draw.integers(0, 4, 3000), draw.integers(4, 8, 3000), np.full(3000, 8)], axis=1).reshape(-1)
    pairs_VV = torch.from_numpy(np.bincount(text_N[:-1] * 10 + text_N[1:], minlength=100).reshape(10, 10))
    table_V = cluster_token_ids(pairs_VV, 3, seed=0)
    assert len(set(table_V[:4].tolist())) == len(set(table_V[4:8].tolist())) == 1
    assert len({int(table_V[0]), int(table_V[4]), int(table_V[8])}) == 3
    assert torch.equal(table_V, cluster_token_ids(pairs_VV, 3, seed=0))
    assert not embed_token_ids(pairs_VV)[9].any()  # an id that never occurs


def embed_slowly(pairs_VV: torch.Tensor) -> torch.Tensor:
    """Compute the vectors of ids from the complete matrix and all of its singular vectors."""
    counts_VC = torch.cat([pairs_VV.T, pairs_VV], dim=1).double()
    expected_VC = torch.outer(counts_VC.sum(1), counts_VC.sum(0)) / counts_VC.sum()
    information_VC = (counts_VC / expected_VC.clamp(min=1e-12)).clamp(min=1).log()
    left_VD, size_D, _ = torch.linalg.svd(information_VC, full_matrices=False)
    number = clusters.NUM_DIMENSIONS
    vector_VD = torch.nn.functional.normalize(left_VD[:, :number] * size_D[:number].sqrt(), dim=1)
    return vector_VD.where(counts_VC.any(dim=1, keepdim=True), 0)


@pytest.mark.parametrize("max_dense", [90, 89], ids=["all directions", "the largest alone"])
def test_vectors_of_ids_equal_those_of_the_complete_matrix(monkeypatch: pytest.MonkeyPatch, max_dense: int) -> None:
    draw = np.random.default_rng(0)
    pairs_VV = torch.from_numpy(draw.poisson(0.2, (90, 90)) * draw.integers(1, 50, (90, 1)))
    pairs_VV[7], pairs_VV[:, 7] = 0, 0  # an id that never occurs
    monkeypatch.setattr(clusters, "MAX_DENSE", max_dense)
    vector_VD, slow_VD = embed_token_ids(pairs_VV), embed_slowly(pairs_VV)
    torch.testing.assert_close(vector_VD @ vector_VD.T, slow_VD @ slow_VD.T, rtol=1e-9, atol=1e-9)
    assert not vector_VD[7].any()
    assert torch.equal(vector_VD, embed_token_ids(pairs_VV))


def test_clustering_identical_ids_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^router\.table: 'clustered' finds fewer than 3 distinct token ids"):
        cluster_token_ids(torch.ones(10, 10), 3, seed=0)


def test_clustering_without_text_or_enough_ids_is_refused() -> None:
    router_class = ROUTERS.get("hash").item
    config = router_class.Config(table="clustered")
    for wrong in (dataclasses.replace(build_context(8), features={}), build_context(VOCAB + 1)):
        with pytest.raises(UsageError, match=r"^router\.table: 'clustered' needs a text"):
            router_class(config, wrong)


def test_token_pairs_are_counted(tmp_path: Path) -> None:
    task = prepare_task(tiny_config(write_text(tmp_path)), tmp_path)
    pairs_VV = task.token_pairs()
    token_N = np.asarray(task.text.train.tokens_N, dtype=np.int64)
    assert pairs_VV.shape == (257, 257)
    assert pairs_VV.sum() == len(token_N) - 1
    a, b = ord("a"), ord("b")
    assert pairs_VV[a, b] == sum(x == a and y == b for x, y in itertools.pairwise(token_N.tolist())) > 0
