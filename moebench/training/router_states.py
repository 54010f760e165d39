"""The state of the routers before their latest update."""

from collections.abc import Sequence

from torch import Tensor

from moebench.experts.layer import MoELayer


class RouterStates:
    """The buffers of the routers before the latest update of them, so that its step can be repeated exactly."""

    def __init__(self, layers: Sequence[MoELayer]) -> None:
        self._buffers = [buffer for layer in layers for buffer in layer.router.buffers()]
        self._saved: tuple[int, list[Tensor]] | None = None

    def save(self, step: int) -> None:
        """Keep the buffers as they are before the update of `step`."""
        self._saved = step, [buffer.clone() for buffer in self._buffers]

    def restore(self, step: int) -> None:
        """Set the buffers to what they were before the update of `step`, if that was the latest."""
        if self._saved is not None and self._saved[0] == step:
            for buffer, value in zip(self._buffers, self._saved[1], strict=True):
                buffer.copy_(value)
