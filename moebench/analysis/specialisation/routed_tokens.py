"""The tokens of an evaluation set with the experts of each, from a model that is run on it once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from moebench.analysis.specialisation.information import Assignments, Floats, Ints
from moebench.analysis.trained_run import run_batches
from moebench.routing.values import LayerRecord, Routing
from moebench.schema import CellConfig
from moebench.tasks.task import Batch, Task
from moebench.training.model import Model

DEFAULT_TOKENS = 32_768
"""Tokens that are probed by default: enough for hundredths of a bit, with a table of each kind in memory."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedLayer:
    """The experts of the tokens in one layer, before capacity."""

    assignments: Assignments
    gate_N: Floats
    """Score of each assignment: its probability where the router has scores, else its weight."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutedTokens:
    """T tokens without padding, sequence by sequence, of one stack of a model."""

    sequence_T: Ints
    """Number of the sequence in the probed part of the set."""
    position_T: Ints
    """Position in its sequence."""
    layers: dict[str, RoutedLayer]


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbedBatches:
    """The batches of an evaluation set that are probed."""

    batches: list[tuple[int, Batch]]
    """Batches and their numbers, which seed noise."""
    num_left_out: int
    """Batches of the trained domains that are left out."""


def select_batches(task: Task, batch_size: int, max_tokens: int) -> ProbedBatches:
    """Return evenly spaced batches of the test split with about `max_tokens` positions; no held-out domains."""
    every = list(enumerate(task.eval_batches("test", batch_size)))
    trained = [pair for pair in every if not bool((pair[1].domain_B >= task.num_trained_domains).any())]
    num_tokens = sum(batch.input_BL.shape[0] * batch.input_BL.shape[1] for _, batch in trained)
    number = max(1, min(len(trained), len(trained) * max_tokens // max(num_tokens, 1)))
    chosen = [trained[index * len(trained) // number] for index in range(number)] if trained else []
    return ProbedBatches(batches=chosen, num_left_out=len(trained) - len(chosen))


@dataclass
class _Stack:
    """What is collected of one stack."""

    sequence: list[Ints] = field(default_factory=list)
    position: list[Ints] = field(default_factory=list)
    layers: dict[str, list[tuple[Ints, Ints, Floats, Floats]]] = field(default_factory=dict)
    num_experts: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0


def route_batches(
    model: Model, batches: Sequence[tuple[int, Batch]], config: CellConfig, *, keeps_outputs: bool = False
) -> tuple[dict[str, RoutedTokens], list[Tensor]]:
    """Run the model; return the tokens of each stack ("" if there is one) and, if asked for, all outputs."""
    stacks: dict[str, _Stack] = {}
    num_sequences, outputs = 0, []
    torch.set_num_threads(config.train.threads)
    for batch, output, records in run_batches(model, batches, config):
        if keeps_outputs:
            assert isinstance(output, Tensor)  # those of text are logits in parts
            outputs.append(output)
        by_half: dict[str, list[LayerRecord]] = {}
        for record in records:
            by_half.setdefault(record.layer.half or "", []).append(record)
        for half, of_half in by_half.items():
            _add(stacks.setdefault(half, _Stack()), of_half, num_sequences)
        num_sequences += len(batch.domain_B)
    return {half: _join(stack) for half, stack in stacks.items()}, outputs


def _add(stack: _Stack, records: Sequence[LayerRecord], first_sequence: int) -> None:
    """Add the tokens of a batch in all layers of a stack."""
    length = records[0].sequence_length
    assert length is not None
    total, valid = len(records[0].routing.experts_per_token_T), records[0].valid_T
    valid_T = np.ones(total, dtype=bool) if valid is None else valid.cpu().numpy()
    index_T = np.cumsum(valid_T) - 1 + stack.num_tokens
    all_T = np.arange(total)
    stack.sequence.append(first_sequence + all_T[valid_T] // length)
    stack.position.append(all_T[valid_T] % length)
    for record in records:
        token_N, expert_N, share_N, gate_N = read_assignments(record, total)
        kept_N = valid_T[token_N]
        name = str(record.layer)
        stack.num_experts[name] = record.routing.num_experts
        part = index_T[token_N[kept_N]], expert_N[kept_N], share_N[kept_N], gate_N[kept_N]
        stack.layers.setdefault(name, []).append(part)
    stack.num_tokens += int(valid_T.sum())


def read_assignments(record: LayerRecord, num_tokens: int) -> tuple[Ints, Ints, Floats, Floats]:
    """Return token, expert, share and gate of each assignment of a layer before capacity.

    A soft or merged routing assigns each token to all experts, with its shares.
    """
    routing = record.routing
    if not isinstance(routing, Routing):
        share_TE = routing.tabulate_labels(torch.arange(num_tokens, device=routing.load_E.device), num_tokens).cpu()
        token_N, expert_N = share_TE.nonzero(as_tuple=True)
        share_N = share_TE[token_N, expert_N].numpy()
        return token_N.numpy(), expert_N.numpy(), share_N, share_N
    token_N, expert_N = routing.token_N[routing.counted_N], routing.expert_N[routing.counted_N]
    scores_TE = routing.scores_TE
    gate_N = routing.weight_N[routing.counted_N] if scores_TE is None else scores_TE[token_N, expert_N]
    ones_N = np.ones(len(token_N))
    return token_N.cpu().numpy(), expert_N.cpu().numpy(), ones_N, gate_N.double().cpu().numpy()


def _join(stack: _Stack) -> RoutedTokens:
    layers = {}
    for name, parts in stack.layers.items():
        token_N, expert_N, share_N, gate_N = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        assignments = Assignments(
            token_N=token_N,
            expert_N=expert_N,
            share_N=None if (share_N == 1).all() else share_N,
            num_tokens=stack.num_tokens,
            num_experts=stack.num_experts[name],
        )
        layers[name] = RoutedLayer(assignments=assignments, gate_N=gate_N)
    return RoutedTokens(
        sequence_T=np.concatenate(stack.sequence), position_T=np.concatenate(stack.position), layers=layers
    )
