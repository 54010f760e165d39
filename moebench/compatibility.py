"""Which tasks, layouts, routers and processes are compatible: every rule in one place.

A rule yields the message with which it refuses a combination. `MODEL_RULES` concern the router and the layout alone and
are checked whenever a model is planned; `CELL_RULES` add the task, the batch and the processes and are checked before a
cell is trained. The first message is the one that the user sees. What a component requires of its own options it checks
itself: `Router.check`, `Layout.plan` and the Config classes.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from moebench.causality import find_leak, must_be_causal
from moebench.errors import UsageError, build_unknown_error
from moebench.experts.assembly import RouterPlan
from moebench.experts.capacity import Capacity
from moebench.experts.contract import plan_layout
from moebench.experts.layout import BlockPlan, Experts
from moebench.experts.mixed import WITHOUT_NETWORK
from moebench.registry import Entry
from moebench.routing.contract import check_router_class
from moebench.routing.features.feature import sequence_group_size
from moebench.routing.kernels.backend import require_kernels
from moebench.routing.losses import LOSSES
from moebench.routing.router import ROUTERS, Facts, Router, required_features
from moebench.schema import CellConfig
from moebench.tasks.task import TASKS, TaskFacts
from moebench.tasks.text.document_masks import refuse_masked_documents


@dataclass(frozen=True, kw_only=True)
class Combination:
    """The configuration of a cell with the components that it names."""

    config: CellConfig
    router: Entry[type[Router], Facts]
    task: TaskFacts
    blocks: tuple[BlockPlan, ...]
    """The blocks as the layout plans them; all dense for a dense router."""

    @classmethod
    def of(cls, config: CellConfig) -> "Combination":
        """Plan the blocks of a configuration; raise UsageError where the layout refuses its own options."""
        blocks = plan_layout(config.layout, config.model.num_layers)
        router = ROUTERS.get(config.router.name, where="router.name")
        check_router_class(router.item, config.router, config.layout.num_experts)
        return cls(
            config=config,
            router=router,
            task=TASKS.get(config.task.name, where="task.name").facts,
            blocks=(BlockPlan(),) * config.model.num_layers if router.item.form.is_dense else blocks,
        )

    @property
    def banks(self) -> list[Experts]:
        """The expert banks of all blocks."""
        return [bank for block in self.blocks for bank in block.banks]

    @property
    def is_feed_forward(self) -> bool:
        """Whether all experts are feed-forward networks, none of them parts of attention or whole models."""
        return not any(block.attention or block.stack for block in self.blocks)

    @property
    def has_plain_banks(self) -> bool:
        """Whether all experts are feed-forward networks in one group."""
        return self.is_feed_forward and all(bank.groups == 1 for bank in self.banks)

    @property
    def never_drops(self) -> bool:
        """Whether no assignment is ever dropped: there is no capacity, or it does not apply to the router."""
        return (
            self.router.item.form.is_dense
            or self.router.item.form.is_mixture
            or Capacity.from_layout(self.config.layout).is_dropless
        )

    def check(self, rules: Sequence["Rule"]) -> None:
        """Raise UsageError with the message of the first rule that refuses the combination."""
        for message in itertools.chain.from_iterable(rule(self) for rule in rules):
            raise UsageError(message)


Rule = Callable[[Combination], Iterator[str]]


def check_cell(config: CellConfig) -> None:
    """Raise UsageError for a cell that a rule refuses, before any data is read."""
    Combination.of(config).check((*MODEL_RULES, *CELL_RULES))


def list_marks(config: CellConfig) -> tuple[str, ...]:
    """Return the warnings that every table shows beside a cell's numbers."""
    combination = Combination.of(config)
    return ("non-causal",) if must_be_causal(combination) and find_leak(combination) else ()


def refuse_total_params_without_matching(c: Combination) -> Iterator[str]:
    """Require matching by parameters where the layout sets their total."""
    total, match = c.config.layout.total_params, c.config.layout.match
    if total != 1.0 and match != "params":
        yield f"layout.total_params={total:g} needs layout.match=params, got {match}"


def refuse_merging_unequal_experts(c: Combination) -> Iterator[str]:
    """Require feed-forward experts of one shape for a router that merges their parameters."""
    if c.router.item.form.is_merged and not (c.has_plain_banks and all(bank.can_merge for bank in c.banks)):
        yield (
            f"router.name: '{c.config.router.name}' sums the parameters of experts, and those of layout"
            f" '{c.config.layout.name}' are not feed-forward networks of one shape in one group (allowed: another"
            " router or another layout)"
        )


def refuse_mixing_outside_feed_forward(c: Combination) -> Iterator[str]:
    """Require feed-forward experts in one group for a router that mixes tokens."""
    if c.router.item.form.is_mixture and not c.has_plain_banks:
        yield (
            f"router.name: '{c.config.router.name}' mixes tokens into slots, and layout '{c.config.layout.name}' needs"
            " to know where each token goes (allowed: another router, or a layout of feed-forward experts in one group)"
        )


def refuse_chain(c: Combination) -> Iterator[str]:
    """Require feed-forward experts in one group, dropless, for a router that applies them one after another."""
    router, layout = c.config.router.name, c.config.layout
    if c.router.item.form.is_chain and not c.has_plain_banks:
        yield (
            f"router.name: '{router}' sends tokens through one expert after another, and layout '{layout.name}' applies"
            " experts in parallel (allowed: another router, or a layout of feed-forward experts in one group)"
        )
    for key in ("capacity_factor_train", "capacity_factor_eval"):
        factor = getattr(layout, key)
        if c.router.item.form.is_chain and factor is not None and not math.isinf(factor):
            yield f"layout.{key} must be null with router '{router}', got {factor:g}: no step can be left out"


def refuse_feed_forward_options(c: Combination) -> Iterator[str]:
    """Require feed-forward experts for dropout inside experts, and to pass on the input of dropped assignments."""
    layout = c.config.layout
    if layout.overflow == "pass" and not c.is_feed_forward:
        yield f"layout.overflow: 'pass' has no meaning in layout '{layout.name}' (allowed: drop, reroute)"
    if layout.expert_dropout > 0 and not c.is_feed_forward:
        yield f"layout.expert_dropout must be 0 in layout '{layout.name}', got {layout.expert_dropout:g}"


def refuse_router_options(c: Combination) -> Iterator[str]:
    """Require options of the router that fit the number of experts in every bank (see `Router.check`)."""
    for bank in c.banks:
        try:
            RouterPlan.of(c.config.router, bank)
        except UsageError as error:
            yield str(error)


def refuse_losses(c: Combination) -> Iterator[str]:
    """Require auxiliary losses that exist, with coefficients of at least 0."""
    known = {*LOSSES.names(), *c.router.facts.own_losses}
    defaults = c.router.item.Config().losses  # type: ignore[call-arg]  # every router's own has a name
    for loss, coefficient in c.config.router.losses.items():
        is_default = defaults.get(loss) == coefficient
        where = f"{c.router.label}: Config.losses" if is_default else "router.losses"  # where the mistake is
        if loss not in known:
            yield str(build_unknown_error(where, loss, known))
        if not coefficient >= 0:
            yield f"{where}.{loss} must be at least 0, got {coefficient}"
        elif math.isinf(coefficient):
            yield f"{where}.{loss} must be finite, got {coefficient}"


def refuse_missing_gpu(c: Combination) -> Iterator[str]:
    """Require a CUDA device where the configuration asks for one, and what the chosen kernels need."""
    if c.config.train.device == "cuda" and not torch.cuda.is_available():
        yield "train.device: 'cuda' was asked for, but torch finds no CUDA device (allowed: auto, cpu)"
    try:
        require_kernels(on_gpu=c.config.train.device != "cpu" and torch.cuda.is_available())
    except UsageError as error:
        yield str(error)


def refuse_rerouting_without_scores(c: Combination) -> Iterator[str]:
    """Require scores of every expert to reroute dropped assignments to the next best one."""
    if c.config.layout.overflow == "reroute" and not c.router.facts.makes_scores and not c.never_drops:
        router = c.config.router.name
        yield f"layout.overflow: 'reroute' needs scores, which router '{router}' does not make (allowed: drop, pass)"


def refuse_sharding(c: Combination) -> Iterator[str]:
    """Require experts of each kind in multiples of `parallel.expert`, not merged, compiled or whole models."""
    num_processes, layout = c.config.parallel.expert, c.config.layout.name
    if num_processes > 1 and c.router.item.form.is_merged:
        yield (
            f"parallel.expert={num_processes}: router '{c.config.router.name}' merges the parameters of all experts, so"
            " every process needs them (allowed: parallel.expert=1 and parallel.data)"
        )
    if num_processes > 1 and c.config.train.compile and c.banks:
        yield f"train.compile: experts on parallel.expert={num_processes} processes are not compiled (allowed: false)"
    for shapes in (bank.shapes for bank in c.banks if num_processes > 1):
        for shape, equal_shapes in itertools.groupby(shapes):
            num_equal = len(list(equal_shapes))
            if shape.kind == "stack":
                yield (
                    f"parallel.expert={num_processes}: the experts of layout '{layout}' are whole models, which stay on"
                    " every process (try parallel.expert=1 and parallel.data)"
                )
            elif shape.kind not in WITHOUT_NETWORK and num_equal % num_processes:
                experts = "experts" if num_equal == len(shapes) else "experts of one kind"
                divisors = ", ".join(str(n) for n in range(1, num_equal + 1) if num_equal % n == 0)
                count = f"{num_equal} {experts} of layout '{layout}'"
                yield f"parallel.expert={num_processes} does not divide the {count} (try {divisors})"


def refuse_divided_sequence_groups(c: Combination) -> Iterator[str]:
    """Require micro-batches of whole groups of sequences for a router that mixes the sequences of a group."""
    group_size = sequence_group_size(required_features(c.config.router))
    batch_size, accumulate = c.config.train.batch_size, c.config.train.accumulate
    if batch_size // accumulate % group_size:
        parts = f" in train.accumulate={accumulate} parts" if accumulate > 1 else ""
        yield (
            f"train.batch_size={batch_size}{parts} does not divide into groups of {group_size} sequences, which router"
            f" '{c.config.router.name}' mixes (allowed: a multiple of {group_size * accumulate}, or another"
            " router.group_size)"
        )


def refuse_experts_in_missing_half(c: Combination) -> Iterator[str]:
    """Require an encoder-decoder model to place experts in its encoder or its decoder alone."""
    if c.config.layout.experts_in != "both" and not c.task.is_encoder_decoder:
        yield (
            f"layout.experts_in: '{c.config.layout.experts_in}' is a half of an encoder-decoder model, which task"
            f" '{c.config.task.name}' does not train (allowed: both)"
        )


def refuse_in_encoder_decoder(c: Combination) -> Iterator[str]:
    """Require experts inside blocks in an encoder-decoder model."""
    if c.task.is_encoder_decoder and any(block.stack for block in c.blocks):
        yield (
            f"layout.name: the experts of layout '{c.config.layout.name}' are whole models, which do not read an"
            f" encoder; task '{c.config.task.name}' needs a layout of experts inside blocks"
        )


def refuse_missing_features(c: Combination) -> Iterator[str]:
    """Require a task that has every context feature which the router requires."""
    for feature in required_features(c.config.router):
        if not feature.is_provided_by(c.task):
            known = ", ".join(entry.name for entry in TASKS.entries() if feature.is_provided_by(entry.facts))
            yield (
                f"router.name: '{c.config.router.name}' needs {feature.description}, which task '{c.config.task.name}'"
                f" does not have (tasks that have it: {known or 'none'})"
            )


def refuse_output_options(c: Combination) -> Iterator[str]:
    """Require tokens as input and output to tie the embeddings, and logits for the z-loss."""
    task = c.config.task.name
    if c.config.model.tie_embeddings and c.task.output != "tokens":
        yield f"model.tie_embeddings: task '{task}' does not read and predict ids of one vocabulary (allowed: false)"
    if c.config.train.z_loss > 0 and c.task.output == "vectors":
        yield f"train.z_loss must be 0, got {c.config.train.z_loss:g}: task '{task}' predicts vectors without logits"


def refuse_leak(c: Combination) -> Iterator[str]:
    """Require causal experts where the task predicts from the past, unless `allow_noncausal` is set."""
    if must_be_causal(c) and not c.config.allow_noncausal and (leak := find_leak(c)):
        encoder = " layout.experts_in=encoder," if c.task.is_encoder_decoder else ""
        yield (
            f"{leak}; task '{c.config.task.name}' predicts from the past. Allowed: a causal choice,{encoder} or"
            " allow_noncausal=true, which marks the arm in every table"
        )


MODEL_RULES: tuple[Rule, ...] = (
    refuse_total_params_without_matching,
    refuse_merging_unequal_experts,
    refuse_mixing_outside_feed_forward,
    refuse_chain,
    refuse_feed_forward_options,
    refuse_router_options,
    refuse_losses,
)
CELL_RULES: tuple[Rule, ...] = (
    refuse_missing_gpu,
    refuse_rerouting_without_scores,
    refuse_sharding,
    refuse_divided_sequence_groups,
    refuse_experts_in_missing_half,
    refuse_in_encoder_decoder,
    refuse_masked_documents,
    refuse_missing_features,
    refuse_output_options,
    refuse_leak,
)
