"""Copies are compared bit by bit; the scope of balance losses and of capacity is what the configuration says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.mesh_cases import EVERY_N, case
from support.process_group import ALONE, Mesh, Shape
from support.training_cases import tiny_config, write_text
from support.training_steps import train_steps
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moebench.parallel.replicas
from moebench.parallel.replicas import ReplicaError, check_replicas, fingerprint
from moebench.training.model import initialised_model, prepare_task


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_a_fingerprint_sees_every_bit_and_its_place() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    same = [values.clone(), values.view(3, 1), values.double().float()]
    other = [values.flip(0), torch.nextafter(values, torch.tensor(9.0)), torch.tensor([1.0, 2.0, -3.0]), values[:2]]
    assert all(torch.equal(fingerprint(x), fingerprint(values)) for x in same)
    assert not any(torch.equal(fingerprint(x), fingerprint(values)) for x in other)
    assert not torch.equal(fingerprint(torch.tensor([0.0])), fingerprint(torch.tensor([-0.0])))
    assert not torch.equal(fingerprint(torch.tensor([True, False])), fingerprint(torch.tensor([False, True])))


def plain_fingerprint(values: torch.Tensor) -> list[int]:
    """Return the same in Python's numbers, which have no end, brought to 64 bits."""
    whole = [int(value) for value in values.flatten().view(torch.int32)]
    weighed = sum(bits * (place * 0x9E3779B1 % 0x7FFFFFFF) for place, bits in enumerate(whole, start=1))
    return [(number + 2**63) % 2**64 - 2**63 for number in (sum(whole), weighed)]


def test_a_fingerprint_in_parts_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, 6, generator=draw)
    wanted = plain_fingerprint(values)
    turned = values.transpose(0, 2).contiguous().transpose(0, 2)  # the same numbers in the same places, not contiguous
    assert not turned.is_contiguous()
    line = torch.stack([values.flatten(), values.flatten()], 1)[:, 0]
    for size in (1000, 64, 30, 7, 1):
        monkeypatch.setattr(moebench.parallel.replicas, "PART", size)
        assert [fingerprint(x).tolist() for x in (values, turned, line)] == [wanted] * 3
    assert fingerprint(torch.empty(0, 4)).tolist() == [0, 0]


class Peak(TorchDispatchMode):
    """Counts the bytes that operations hold at a time, beyond what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[StorageWeakRef, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                self.held[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self.held = {storage: size for storage, size in self.held.items() if not storage.expired()}
        self.most = max(self.most, sum(self.held.values()))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_turned", [False, True], ids=["contiguous", "turned"])
def test_a_fingerprint_takes_little_memory(dtype: torch.dtype, is_turned: bool) -> None:
    values = torch.ones(4096, 4096, dtype=dtype)
    with Peak() as peak:
        fingerprint(values.T if is_turned else values)
    assert 2**23 < peak.most <= 2**26  # the numbers alone are 2**25 or 2**26 bytes


def spoil(mesh: Mesh, text: Path, folder: Path, overrides: dict[str, Any], what: str) -> str:
    """Change one bit on the last rank and return what the comparison says."""
    config = tiny_config(text, **overrides)
    model = initialised_model(config, prepare_task(config, folder), mesh)
    check_replicas(model, mesh)
    (found,) = [tensor for name, tensor in model.state_dict().items() if name.endswith(what)]
    own = found.to_local() if isinstance(found, DTensor) else found
    if mesh.rank == mesh.size - 1:
        own.view(-1)[0] = torch.nextafter(own.view(-1)[0], torch.tensor(9.0))
    try:
        check_replicas(model, mesh)
    except ReplicaError as error:
        return str(error)
    return "no difference"


@pytest.mark.parametrize(
    ("shape", "what", "said"),
    [
        (Shape(2, 1), "blocks.0.feed_forward.bank.w_in_EDF", "rank 0 and rank 1"),
        (Shape(2, 2), "blocks.1.feed_forward.router.gate.weight_ED", "rank 0 and rank 3"),
        (Shape(2, 2), "blocks.1.feed_forward.bank.w_out_EFD", "rank 1 and rank 3"),
    ],
    ids=str,
)
def test_copies_that_differ_are_named_on_every_rank(
    text: Path, tmp_path: Path, shape: Shape, what: str, said: str
) -> None:
    for message in shape.run(spoil, text, tmp_path, shape.over(case()), what):
        assert what in message
        assert said in message


def logged(found: dict[str, Any], name: str) -> list[float]:
    lines = [json.loads(line) for line in found["journal"].splitlines()]
    return [line["metrics"][name] for line in lines if name in line.get("metrics", {})]


def test_local_balance_is_the_mean_of_each_rank_alone(text: Path, tmp_path: Path) -> None:
    shape, router = Shape(2, 1), {"name": "switch", "jitter": 0.0, "losses": {"load_balance": 0.5}}
    wanted = case(router=router, train={"steps": 1, "batch_size": 4})
    cut = case(router=router, train={"steps": 1, "batch_size": 4, "accumulate": 2})
    local = shape.over(wanted | {"balance": {"scope": "local"}})

    def found(shape: Shape, overrides: dict[str, Any]) -> dict[str, Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        first: dict[str, Any] = shape.run(train_steps, text, overrides, folder)[0]
        return first

    together, everyone, own = found(ALONE, wanted), found(shape, shape.over(wanted)), found(shape, local)
    apart = found(ALONE, cut)  # two halves, one after the other: what two ranks hold
    name = "balance/load_balance"
    assert logged(everyone, name) == pytest.approx(logged(together, name), rel=1e-5)
    assert logged(own, name) == pytest.approx(logged(apart, name), rel=1e-5)
    assert logged(own, name) != pytest.approx(logged(everyone, name), rel=1e-4)


def test_local_capacity_drops_per_rank(text: Path, tmp_path: Path) -> None:
    limits = EVERY_N | {"capacity_factor_train": 1.0, "drop_order": "position"}
    wanted = case(layout=limits, router={"name": "switch", "jitter": 0.0}, train={"steps": 1, "batch_size": 4})
    found = {}
    for scope in ("global", "local"):
        shape = Shape(2, 1, {"scope": scope})
        found[scope] = logged(shape.run(train_steps, text, shape.over(wanted), tmp_path)[0], "train/load/drop_rate")
    (alone,) = ALONE.run(train_steps, text, wanted, tmp_path)
    assert found["global"] == logged(alone, "train/load/drop_rate")
    assert found["local"] != found["global"]


def test_bytes_on_the_way_are_those_predicted(text: Path, tmp_path: Path) -> None:
    for number, overrides in enumerate(
        (
            case(layout={"name": "zero_computation", "num_experts": 8, "match": "none"}),
            case(layout={"name": "moduleformer", "num_experts": 8, "match": "none"}, train={"precision": "bf16"}),
            case(router={"name": "soft_moe"}, train={"accumulate": 2}),
        )
    ):
        shape, folder = Shape(1, 2), tmp_path / str(number)
        folder.mkdir()
        found = shape.run(train_steps, text, shape.over(overrides), folder)[0]
        sent, predicted = logged(found, "parallel/sent_mib"), logged(found, "parallel/predicted_mib")
        assert sent == predicted
        assert all(mib > 0 for mib in sent)
        assert all(value > 0 for value in logged(found, "parallel/all_to_all_s"))
