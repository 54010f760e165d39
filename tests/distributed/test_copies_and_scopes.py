"""Replicas are compared bit by bit; balance losses and capacity have the configured scope."""

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
from moebench.training.model import build_initialised_model, prepare_task


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def test_fingerprint_depends_on_every_bit_and_its_position() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    equal = [values.clone(), values.view(3, 1), values.double().float()]
    different = [values.flip(0), torch.nextafter(values, torch.tensor(9.0)), torch.tensor([1.0, 2.0, -3.0]), values[:2]]
    assert all(torch.equal(fingerprint(x), fingerprint(values)) for x in equal)
    assert not any(torch.equal(fingerprint(x), fingerprint(values)) for x in different)
    assert not torch.equal(fingerprint(torch.tensor([0.0])), fingerprint(torch.tensor([-0.0])))
    assert not torch.equal(fingerprint(torch.tensor([True, False])), fingerprint(torch.tensor([False, True])))


def slow_fingerprint(values: torch.Tensor) -> list[int]:
    """Compute the fingerprint with Python's unbounded integers, reduced to 64 bits."""
    all_bits = [int(value) for value in values.flatten().view(torch.int32)]
    weighted = sum(bits * (index * 0x9E3779B1 % 0x7FFFFFFF) for index, bits in enumerate(all_bits, start=1))
    return [(number + 2**63) % 2**64 - 2**63 for number in (sum(all_bits), weighted)]


def test_fingerprint_does_not_depend_on_chunks_or_memory_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(7, 5, 6, generator=torch.Generator().manual_seed(0))
    expected = slow_fingerprint(values)
    transposed = values.transpose(0, 2).contiguous().transpose(0, 2)  # equal elements, not contiguous
    assert not transposed.is_contiguous()
    strided = torch.stack([values.flatten(), values.flatten()], 1)[:, 0]
    for size in (1000, 64, 30, 7, 1):
        monkeypatch.setattr(moebench.parallel.replicas, "CHUNK_ELEMENTS", size)
        assert [fingerprint(x).tolist() for x in (values, transposed, strided)] == [expected] * 3
    assert fingerprint(torch.empty(0, 4)).tolist() == [0, 0]


class PeakMemory(TorchDispatchMode):
    """Tracks the bytes of the tensors that operations create, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[StorageWeakRef, int] = {}
        self.peak_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        inputs = {tensor.untyped_storage()._cdata for tensor in tree_leaves(args) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in inputs:
                self.sizes[StorageWeakRef(tensor.untyped_storage())] = tensor.untyped_storage().nbytes()
        self.sizes = {storage: size for storage, size in self.sizes.items() if not storage.expired()}
        self.peak_bytes = max(self.peak_bytes, sum(self.sizes.values()))
        return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["contiguous", "transposed"])
def test_fingerprint_needs_little_memory(dtype: torch.dtype, is_transposed: bool) -> None:
    values = torch.ones(4096, 4096, dtype=dtype)
    with PeakMemory() as memory:
        fingerprint(values.T if is_transposed else values)
    assert 2**23 < memory.peak_bytes <= 2**26  # the tensor itself has 2**25 or 2**26 bytes


def corrupt_and_check(mesh: Mesh, text: Path, folder: Path, overrides: dict[str, Any], what: str) -> str:
    """Change one bit on the last rank and return the message of the replica check."""
    config = tiny_config(text, **overrides)
    model = build_initialised_model(config, prepare_task(config, folder), mesh)
    check_replicas(model, mesh)
    (corrupted,) = [tensor for name, tensor in model.state_dict().items() if name.endswith(what)]
    local = corrupted.to_local() if isinstance(corrupted, DTensor) else corrupted
    if mesh.rank == mesh.size - 1:
        local.view(-1)[0] = torch.nextafter(local.view(-1)[0], torch.tensor(9.0))
    try:
        check_replicas(model, mesh)
    except ReplicaError as error:
        return str(error)
    return "no difference"


@pytest.mark.parametrize(
    ("shape", "what", "ranks"),
    [
        (Shape(2, 1), "blocks.0.feed_forward.bank.w_in_EDF", "rank 0 and rank 1"),
        (Shape(2, 2), "blocks.1.feed_forward.router.gate.weight_ED", "rank 0 and rank 3"),
        pytest.param(Shape(2, 2), "blocks.1.feed_forward.bank.w_out_EFD", "rank 1 and rank 3", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_rank_names_replicas_that_differ(text: Path, tmp_path: Path, shape: Shape, what: str, ranks: str) -> None:
    for message in shape.run(corrupt_and_check, text, tmp_path, shape.over(case()), what):
        assert what in message
        assert ranks in message


def read_metric(run: dict[str, Any], name: str) -> list[float]:
    """Return the values of a metric in the journal of a run."""
    lines = [json.loads(line) for line in run["journal"].splitlines()]
    return [line["metrics"][name] for line in lines if name in line.get("metrics", {})]


def test_local_balance_loss_is_the_mean_over_ranks(text: Path, tmp_path: Path) -> None:
    shape, router = Shape(2, 1), {"name": "switch", "jitter": 0.0, "losses": {"load_balance": 0.5}}
    full = case(router=router, train={"steps": 1, "batch_size": 4})
    halves = case(router=router, train={"steps": 1, "batch_size": 4, "accumulate": 2})
    local = shape.over(full | {"balance": {"scope": "local"}})

    def train_on(shape: Shape, overrides: dict[str, Any]) -> dict[str, Any]:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        rank_0: dict[str, Any] = shape.run(train_steps, text, overrides, folder)[0]
        return rank_0

    one_process, global_scope = train_on(ALONE, full), train_on(shape, shape.over(full))
    local_scope = train_on(shape, local)
    micro_batches = train_on(ALONE, halves)  # the halves that the two ranks hold, one after the other
    name = "balance/load_balance"
    assert read_metric(global_scope, name) == pytest.approx(read_metric(one_process, name), rel=1e-5)
    assert read_metric(local_scope, name) == pytest.approx(read_metric(micro_batches, name), rel=1e-5)
    assert read_metric(local_scope, name) != pytest.approx(read_metric(global_scope, name), rel=1e-4)


def test_local_capacity_drops_per_rank(text: Path, tmp_path: Path) -> None:
    layout = EVERY_N | {"capacity_factor_train": 1.0, "drop_order": "position"}
    overrides = case(layout=layout, router={"name": "switch", "jitter": 0.0}, train={"steps": 1, "batch_size": 4})
    drop_rates = {}
    for scope in ("global", "local"):
        shape = Shape(2, 1, {"scope": scope})
        run = shape.run(train_steps, text, shape.over(overrides), tmp_path)[0]
        drop_rates[scope] = read_metric(run, "train/load/drop_rate")
    (alone,) = ALONE.run(train_steps, text, overrides, tmp_path)
    assert drop_rates["global"] == read_metric(alone, "train/load/drop_rate")
    assert drop_rates["local"] != drop_rates["global"]


def test_bytes_sent_are_those_predicted(text: Path, tmp_path: Path) -> None:
    for number, overrides in enumerate(
        (
            case(layout={"name": "zero_computation", "num_experts": 8, "match": "none"}),
            case(layout={"name": "moduleformer", "num_experts": 8, "match": "none"}, train={"precision": "bf16"}),
            case(router={"name": "soft_moe"}, train={"accumulate": 2}),
        )
    ):
        shape, folder = Shape(1, 2), tmp_path / str(number)
        folder.mkdir()
        run = shape.run(train_steps, text, shape.over(overrides), folder)[0]
        sent, predicted = read_metric(run, "parallel/sent_mib"), read_metric(run, "parallel/predicted_mib")
        assert sent == predicted
        assert all(mib > 0 for mib in sent)
        assert all(value > 0 for value in read_metric(run, "parallel/all_to_all_s"))
        # The balance statistics of all layers forward and backward, for each micro-batch, and the loss of the step.
        assert set(read_metric(run, "parallel/collectives")) == {1 if number == 2 else 3}
