"""A simulated device that is not the host, on a CPU: what a GPU would refuse is refused here.

`DEVICE` is "cpu:0". To torch that is the CPU, and everything is computed there; inside `separate_device()` tensors that
were made without a device, or moved to "cpu", count as on the host (`tensor.device` is "cpu"), all others as on the
device ("cpu:0"). A tensor of the host raises DeviceError in a collective (NCCL has no way to send it), and in an
operation together with tensors of the device, where CUDA raises too.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
HOST = torch.device("cpu")

COLLECTIVES = ("c10d", "c10d_functional", "_c10d_functional")
"""Namespaces of the operations that send: every collective (of DDP, DTensor, checkpoints) ends there."""
ACROSS = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "_local_scalar_dense", "set_"}
"""Operations that CUDA allows between devices, indices on the host among them."""


class DeviceError(Exception):
    """A tensor of the host is where only tensors of the device may be."""


class _Places:
    """Device of each storage; those that torch makes internally have none, and may be combined with any other.

    Weak references keep an address from being given to another storage.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[torch.device, StorageWeakRef]] = {}

    def of(self, tensor: Tensor) -> torch.device | None:
        entry = self.known.get(_address(tensor))
        return entry[0] if entry else None

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        self.known[_address(tensor)] = device, StorageWeakRef(_local(tensor).untyped_storage())
        return tensor


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _address(tensor: Tensor) -> int:
    return int(_local(tensor).untyped_storage()._cdata)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class _Generator(torch.Generator):
    """A generator that reports the device that it was made for."""

    def __new__(cls, device: torch.device | str = HOST) -> "_Generator":
        made = super().__new__(cls, HOST)
        made.asked = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.asked


class _Calls(TorchFunctionMode):
    """Intercepts calls from Python: on which device a tensor is made, where it is moved, where it is."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)  # not a call from Python: `_Operations` handles those from C++
        if func == Tensor.device.__get__:  # type: ignore[attr-defined]
            return self.places.of(args[0]) or DEVICE
        if func is Tensor.cpu or func is Tensor.to:
            return self._move(func, args, kwargs)
        made = func(*args, **kwargs)
        given, generator = kwargs.get("device"), kwargs.get("generator")
        is_maker = not _tensors((args, kwargs))
        if is_maker and generator is not None and torch.device(given or HOST) != generator.device:
            raise DeviceError(f"{func.__name__}: a generator on {generator.device} cannot draw on {given}")
        if given is not None or is_maker:
            for tensor in _tensors(made):
                self.places.put(tensor, torch.device(given or HOST))
        return made

    def _move(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
        tensor, *rest = args
        if func is Tensor.cpu:
            device, dtype, copy = HOST, None, False
        elif rest and isinstance(rest[0], Tensor):
            device, dtype, copy = self.places.of(rest[0]), rest[0].dtype, False
        else:
            copy = kwargs.pop("copy", False)
            device, dtype, *_ = torch._C._nn._parse_to(*rest, **kwargs)
        # torch would copy from "cpu" to "cpu:0" each time, and never from there to "cpu": the device is not passed on.
        made = Tensor.to(tensor, dtype) if dtype else tensor
        if device is not None and (self.places.of(tensor) or device) != device:
            return _MoveToDevice.apply(made, device, self.places)  # type: ignore[no-any-return, no-untyped-call]
        return tensor.clone() if copy and made is tensor else made


class _MoveToDevice(torch.autograd.Function):
    """A copy on the other device; the gradient comes back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, device: torch.device, places: "_Places") -> Tensor:
        ctx.back, ctx.places = places.of(tensor), places
        return places.put(tensor.clone(), device)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.places.put(grad.clone(), ctx.back), None, None


class _Operations(TorchDispatchMode):
    """Intercepts every operation, those of the backward pass and of torch's own code included."""

    def __init__(self, places: _Places) -> None:
        super().__init__()
        self.places = places

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with what is here
        given, (_, name) = _tensors((args, kwargs)), func._schema.name.split("::")
        places = [self.places.of(tensor) for tensor in given]
        near = [tensor for tensor, place in zip(given, places, strict=True) if place == HOST]
        sent = func.namespace in COLLECTIVES and name != "barrier"  # which sends nothing of ours
        mixed = DEVICE in places and any(tensor.dim() > 0 for tensor in near) and name not in ACROSS
        if near and (sent or mixed):
            what = "cannot be sent" if sent else "meets tensors of the device"
            raise DeviceError(f"{func}: {near[0].dtype} {tuple(near[0].shape)}, on the host, {what}")
        made = func(*args, **kwargs)
        for tensor in _tensors(made) if near or DEVICE in places else ():
            if self.places.of(tensor) is None:
                self.places.put(tensor, DEVICE if DEVICE in places else HOST)
        return made


@contextlib.contextmanager
def separate_device() -> Iterator[torch.device]:
    """Pretend, in this thread and its backward passes, that `DEVICE` is not the host."""
    places = _Places()
    from_numpy = torch.from_numpy  # the one maker of tensors that no mode sees
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "Generator", _Generator)
        patched.setattr(torch, "from_numpy", lambda array: places.put(from_numpy(array), HOST))
        # Objects travel as tensors that torch moves itself: over NCCL to the GPU, here to the device.
        patched.setattr(distributed_c10d, "_get_object_coll_device", lambda group=None: str(DEVICE))
        with _Operations(places), _Calls(places):
            yield DEVICE
