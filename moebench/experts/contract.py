"""The rules of a layout's plan, checked when it is made; an error is one line with the layout's file."""

import math
from collections.abc import Iterator
from numbers import Integral, Real

from moebench.components import ExpertShape, LayoutConfig
from moebench.experts.layout import LAYOUTS, BlockPlan, Experts
from moebench.plugin_errors import ContractError

KINDS = {
    "feed_forward": {"ffn", "zero", "copy", "constant"},
    "attention": {"projection", "shared_projection", "head"},
    "stack": {"stack"},
}
"""Part of a block -> kinds of experts that it can hold."""


def plan_layout(config: LayoutConfig, num_layers: int) -> tuple[BlockPlan, ...]:
    """Return the plan of each block of a model, from the bottom.

    Raises UsageError for options that do not fit, and ContractError, which names the layout's file, for a plan that no
    model can be built from.
    """
    entry = LAYOUTS.get(config.name, where="layout.name")
    with entry.convert_errors("plan"):
        plan = entry.item.plan(config, num_layers)
    for problem in _list_problems(plan, num_layers):
        raise ContractError(f"{entry.label}: plan {problem}")
    return tuple(plan)


def _list_problems(plan: object, num_layers: int) -> Iterator[str]:
    """Yield what is wrong with a plan, worded to follow the name of the method."""
    wanted = f"a tuple with one BlockPlan for each block (model.num_layers={num_layers})"
    if not isinstance(plan, tuple | list):
        hint = "; does it end with return?" if plan is None else ""
        yield f"must return {wanted}, got {type(plan).__name__}{hint}"
        return
    for index, block in enumerate(plan):
        if not isinstance(block, BlockPlan):
            yield f"must return {wanted}, got {type(block).__name__} for block {index}"
            return
    if any(block.stack is not None for block in plan):
        if len(plan) != 1 or len(plan[0].banks) != 1:
            yield "must return one BlockPlan(stack=...), which stands for all blocks, where experts are whole models"
    elif len(plan) != num_layers:
        yield f"must return {wanted}, got {len(plan)}"
    if not any(block.banks for block in plan):
        yield "must place experts in at least one block"
    for index, block in enumerate(plan):
        for part in KINDS:
            bank = getattr(block, part)
            if bank is not None:
                for problem in _list_bank_problems(bank, part):
                    yield f"has a wrong bank in block {index}: {part}{problem}"


def _list_bank_problems(bank: object, part: str) -> Iterator[str]:
    """Yield what is wrong with a bank of experts, worded to follow the name of its part of the block."""
    if not isinstance(bank, Experts):
        yield f" must be Experts(...), got {type(bank).__name__}"
        return
    shapes = bank.shapes
    if not (isinstance(shapes, tuple) and shapes and all(isinstance(shape, ExpertShape) for shape in shapes)):
        yield ".shapes must be a tuple with one ExpertShape for each expert, at least one"
        return
    if part == "attention" and len({shape.kind for shape in shapes}) > 1:
        yield ".shapes: experts of attention must be of one kind"
    for shape in dict.fromkeys(shapes):
        yield from _list_shape_problems(shape, part)
    counts = {"groups": bank.groups, "top_k_factor": bank.top_k_factor, "unit": bank.unit}
    for name, count in counts.items():
        if not (count is None and name == "unit") and not _is_count(count):
            yield f".{name} must be a whole number of at least 1, got {count!r}"
            return
    if len(shapes) % bank.groups:
        yield f".groups={bank.groups} must divide its {len(shapes)} experts"
    if not _is_size(bank.shared) and bank.shared != 0:
        yield f".shared must be a width of at least 0, got {bank.shared!r}"
    if bank.residual and not bank.shared:
        yield ".residual=True mixes experts with a shared network: .shared must be greater than 0"


def _list_shape_problems(shape: ExpertShape, part: str) -> Iterator[str]:
    if shape.kind not in KINDS[part]:
        yield f" holds experts of kind {', '.join(sorted(KINDS[part]))}, got {shape.kind!r}"
    if not _is_size(shape.width):
        yield f".shapes: width must be a number greater than 0, got {shape.width!r}"
    if not _is_count(shape.depth):
        yield f".shapes: depth must be a whole number of at least 1, got {shape.depth!r}"


def _is_size(value: object) -> bool:
    return isinstance(value, Real) and math.isfinite(value) and float(value) > 0


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and int(value) >= 1
