"""Errors that are an outcome of the arm: a value that is not finite, and a spike under the policy `stop`."""


class DivergedError(Exception):
    """Training cannot continue because of its own numbers; the same cell fails again at the same step."""


class NonFiniteError(DivergedError):
    """A loss or gradient is not finite, which is raised before the update, or a metric of a trained model is not."""


class SpikeError(DivergedError):
    """The loss of a step is a spike, and `train.spike_policy` does not allow training to continue."""
