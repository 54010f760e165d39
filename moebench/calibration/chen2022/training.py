"""Training and test of the networks of Chen et al. 2022: full batches, normalised gradients, their early stopping."""

import math
import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moebench.calibration.chen2022.data import NUM_CLUSTERS, Directions, Examples, Setting, draw_examples
from moebench.calibration.chen2022.model import SINGLE_FILTERS_PER_CLASS, PatchBank, PatchMixture
from moebench.routing.values import LayerRecord, Routing
from moebench.seeds import make_generator

NUM_EXAMPLES = 16_000
"""Examples for training, and as many for the test."""
MIXTURE_STEPS = 501
EXPERT_LEARNING_RATE = 0.001
"""Length of an expert's step, because its gradient is normalised."""
ROUTER_LEARNING_RATE = 0.1
SINGLE_STEPS = 801
SINGLE_LEARNING_RATE = {"linear": 0.003, "nonlinear": 0.01}
WEIGHT_DECAY = 5e-4
"""Weight decay of the single networks, added to the gradient."""
SPIKE = 0.02
"""A loss this far above the lowest one ends the training."""
CONVERGED_LOSS = 0.314
"""A loss that is no longer falling ends the training below this; log(1 + 1/e) = 0.3133 is the least possible."""


@dataclass(frozen=True, kw_only=True)
class ModelKind:
    """One of the four models."""

    is_mixture: bool
    is_cubic: bool

    @property
    def name(self) -> str:
        """The name in tables."""
        return f"{'MoE' if self.is_mixture else 'single'} {self.activation}"

    @property
    def activation(self) -> str:
        """Name of the activation: nonlinear (cubic) or linear."""
        return "nonlinear" if self.is_cubic else "linear"


KINDS = tuple(
    ModelKind(is_mixture=is_mixture, is_cubic=is_cubic) for is_mixture in (True, False) for is_cubic in (True, False)
)


@dataclass(frozen=True, kw_only=True)
class TrainingOutcome:
    """What one training run reached."""

    accuracy: float
    """Percent of the test examples."""
    dispatch_entropy: float | None
    """Entropy of the cluster given the expert in the last step of training, in nats; None for a single network."""


class TrainingStopped(Exception):  # noqa: N818 - not an error
    """The training was stopped from outside."""


def train_and_test(
    setting: Setting,
    kind: ModelKind,
    seed: int,
    *,
    num_examples: int = NUM_EXAMPLES,
    stopped: threading.Event | None = None,
) -> TrainingOutcome:
    """Draw data, train a model and test it; everything is a function of setting, kind and seed.

    Raises TrainingStopped at the first step after `stopped` was set.
    """
    source = make_generator("chen2022", setting.name, seed)
    directions = Directions.draw(source)
    training, test = (draw_examples(setting, directions, num_examples, source) for _ in range(2))
    if kind.is_mixture:
        model = PatchMixture(is_cubic=kind.is_cubic, seed=seed)
        record = train_mixture(model, training, stopped=stopped)
        with torch.no_grad():
            output_TC, _ = model(test.x_TD, "test")
        return TrainingOutcome(
            accuracy=measure_accuracy(output_TC, test),
            dispatch_entropy=measure_dispatch_entropy(record, training.cluster_T),
        )
    network = PatchBank(1, SINGLE_FILTERS_PER_CLASS, is_cubic=kind.is_cubic)
    network.draw_weights(1.0, make_generator(seed, "single"))
    train_single(network, training, SINGLE_LEARNING_RATE[kind.activation], stopped=stopped)
    with torch.no_grad():
        return TrainingOutcome(accuracy=measure_accuracy(network.expert(test.x_TD, 0), test), dispatch_entropy=None)


def train_mixture(model: PatchMixture, data: Examples, stopped: threading.Event | None = None) -> LayerRecord:
    """Train a mixture; return the record of the last step that was computed.

    The loss is the cross-entropy of a softmax of the model's probabilities, as published.
    """
    optimizer = torch.optim.SGD(
        [
            {"params": list(model.bank.parameters()), "lr": EXPERT_LEARNING_RATE},
            {"params": list(model.router.parameters()), "lr": ROUTER_LEARNING_RATE},
        ]
    )
    lowest = math.inf
    record: LayerRecord
    for step in range(MIXTURE_STEPS):
        _check_stopped(stopped)
        optimizer.zero_grad()
        output_TC, record = model(data.x_TD, step)
        loss = functional.cross_entropy(output_TC.softmax(1), data.label_T)
        if loss.item() <= lowest:
            lowest = loss.item()
        elif loss.item() > lowest + SPIKE or loss.item() <= CONVERGED_LOSS:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        normalise_gradients(model.bank)
        optimizer.step()
    return record


@torch.no_grad()
def normalise_gradients(bank: PatchBank) -> None:
    """Divide each expert's gradients by the sum of the norms of those of its weights and of its biases."""
    weight_grad, bias_grad = bank.weight_EIF.grad, bank.bias_EF.grad
    assert weight_grad is not None
    assert bias_grad is not None
    norm_E = weight_grad.flatten(1).norm(dim=1) + bias_grad.norm(dim=1)
    norm_E = norm_E.where(norm_E > 0, 1.0)  # an expert without tokens
    weight_grad /= norm_E[:, None, None]
    bias_grad /= norm_E[:, None]


def train_single(
    network: PatchBank, data: Examples, learning_rate: float, stopped: threading.Event | None = None
) -> None:
    """Train a single network with Adam; a spike of the loss ends it after step 500."""
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate, weight_decay=WEIGHT_DECAY)
    lowest = math.inf
    for step in range(SINGLE_STEPS):
        _check_stopped(stopped)
        optimizer.zero_grad()
        loss = functional.cross_entropy(network.expert(data.x_TD, 0), data.label_T)
        if loss.item() <= lowest:
            lowest = loss.item()
        elif step > 500 and loss.item() > lowest + SPIKE:
            break
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def measure_accuracy(output_TC: Tensor, data: Examples) -> float:
    """Return the percentage of examples whose class has the largest output."""
    return 100 * float((output_TC.argmax(1) == data.label_T).double().mean())


def measure_dispatch_entropy(record: LayerRecord, cluster_T: Tensor) -> float:
    """Return the entropy of an example's cluster given its expert, in nats: 0 where each expert has one cluster."""
    assert isinstance(record.kept, Routing)
    joint_YE = record.kept.tabulate_labels(cluster_T, NUM_CLUSTERS) / len(cluster_T)
    return float(torch.special.entr(joint_YE).sum() - torch.special.entr(joint_YE.sum(0)).sum())


def _check_stopped(stopped: threading.Event | None) -> None:
    if stopped is not None and stopped.is_set():
        raise TrainingStopped
