"""Counts the operations for which the host would wait for a GPU, in code that runs on a CPU."""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from moebench.training.callback import CellCallback

READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
"""Methods of a tensor that give its values to the host."""
WAITING = {
    *("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "bincount"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
"""Operations that read a number, or whose result has a shape that depends on values."""
CREATED_FROM_NUMBERS = {"lift_fresh", "new_tensor"}
"""`torch.tensor(...)` and `new_tensor`: copies from memory that is not pinned, for which the host waits too."""
CHECKED_ON_A_CPU = {"one_hot"}
"""Functions that read their arguments to check them, but not on a GPU."""
HOST_FILES = ("tasks/",)
"""Code of moebench that makes batches on the host."""


class HostWaits:
    """Counts the waits while it is active, by the line of moebench that causes them."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()
        self._modes = (_Functions(self), _Operations(self))
        self._is_inside = False

    @property
    def total(self) -> int:
        """Number of waits."""
        return self.places.total()

    def __enter__(self) -> Self:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, error, trace)

    def count(self, name: str) -> None:
        """Count a wait at the innermost line of moebench."""
        files = [(frame.filename.rpartition("/moebench/")[2], frame.lineno) for frame in traceback.extract_stack()
                 if "/moebench/" in frame.filename]  # fmt: skip
        file, line = files[-1] if files else ("elsewhere", 0)
        if not file.startswith(HOST_FILES):
            self.places[f"{name} at {file}:{line}"] += 1


@contextlib.contextmanager
def waits_of_steps(first: int, last: int) -> Iterator[HostWaits]:
    """Count the waits of some steps of a run, from 0."""
    waits, begin, end = HostWaits(), CellCallback.on_train_batch_start, CellCallback.on_train_batch_end

    def start_step(callback: CellCallback, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == first:
            waits.__enter__()
        begin(callback, trainer, module, batch, index)

    def end_step(callback: CellCallback, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
        end(callback, trainer, module, outputs, batch, index)
        if index == last:
            waits.__exit__(None, None, None)

    with (
        patch.object(CellCallback, "on_train_batch_start", start_step),
        patch.object(CellCallback, "on_train_batch_end", end_step),
    ):
        yield waits


class _Functions(TorchFunctionMode):
    """Intercepts the methods that read on a CPU without an operation."""

    def __init__(self, waits: HostWaits) -> None:
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name not in READS | CHECKED_ON_A_CPU | CREATED_FROM_NUMBERS or self.waits._is_inside:
            return function(*args, **(kwargs or {}))
        if name not in CHECKED_ON_A_CPU:
            self.waits.count(name)
        self.waits._is_inside = True  # the operation by which it reads is the same wait
        try:
            return function(*args, **(kwargs or {}))
        finally:
            self.waits._is_inside = False


class _Operations(TorchDispatchMode):
    """Intercepts the operations."""

    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.__name__.split(".")[0]
        waits = name in WAITING | CREATED_FROM_NUMBERS
        waits |= name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(index, Tensor) and index.dtype.itemsize == 1
            for index in args[1]  # a mask, of bool or uint8
        )
        waits |= name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if waits and not self.waits._is_inside:
            self.waits.count(name)
        return operation(*args, **(kwargs or {}))
