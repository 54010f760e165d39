"""The section `init` of a configuration: where the weights of a cell come from before its first step."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

from moebench.errors import UsageError, require
from moebench.ranges import AT_LEAST_0_FINITE, FRACTION, Range, check_ranges

ID_LENGTH = 12
"""Digits of the id of a run."""
ALLOWED = "null, run:ID, run:ID@STEP of train.keep_checkpoints, hf:FOLDER, or stage:NAME in an experiment with stages"
"""What `init.from` can be."""
_RUN = re.compile(r"run:(?P<run>[0-9a-f]{1,12})(?:@(?P<step>[1-9][0-9]{0,8}))?")
_STAGE = re.compile(r"stage:(?P<stage>[^/@\s][^/@]*)(?:/(?P<label>.+))?")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Kind = Literal["run", "hf", "stage"]


@dataclass(frozen=True, kw_only=True)
class Parent:
    """One source of weights, as `init.from` names it."""

    kind: Kind
    name: str
    """Id of a run or its beginning, path of a folder, or name of a stage."""
    step: int | None = None
    """Of a run: the step whose weights were kept; None: the last one."""
    label: str | None = None
    """Of a stage: the arm; None: the one with the same settings as the child."""

    @classmethod
    def parse(cls, text: str) -> "Parent":
        """Return the parent that a text names; raise UsageError for any other text."""
        if run := _RUN.fullmatch(text):
            return cls(kind="run", name=run["run"], step=int(run["step"]) if run["step"] else None)
        if stage := _STAGE.fullmatch(text):
            return cls(kind="stage", name=stage["stage"], label=stage["label"])
        if text.startswith("hf:") and len(text) > 3:
            return cls(kind="hf", name=text[3:])
        if text.startswith("run:"):
            raise UsageError(
                f"init.from: '{text[:100]}' names no run (allowed: run: and 1 to 12 hexadecimal digits, the beginning"
                " of an id; run:ID@STEP with a step of train.keep_checkpoints)"
            )
        raise UsageError(f"init.from: '{text[:100]}' names no weights (allowed: {ALLOWED})")

    @property
    def name_in_id(self) -> str:
        """Name of the parent in the id of a child: the path of a folder does not count, its digest does."""
        return "hf" if self.kind == "hf" else str(self)

    def __str__(self) -> str:
        """Return the text that names it."""
        end = f"@{self.step}" if self.step is not None else f"/{self.label}" if self.label is not None else ""
        return f"{self.kind}:{self.name}{end}"


@dataclass(frozen=True, kw_only=True)
class UpcycleConfig:
    """How experts are made from the dense feed-forward networks of a parent (sparse upcycling, arXiv:2212.05055)."""

    RANGES: ClassVar[Mapping[str, Range]] = {"noise": AT_LEAST_0_FINITE, "drop": FRACTION}

    copies: int | Literal["all"] = "all"
    """Experts of a bank that start as the parent's network: all, or a number of them; the others keep their own initial
    weights."""
    noise: float = 0.0
    """Standard deviation of the noise that is added to copied weights of experts, relative to that of the weights of
    each matrix; each expert draws its own."""
    drop: float = 0.0
    """Share of the hidden units of each copied expert that are drawn again, with the mean and the standard deviation
    that the parent's weights have there (drop-upcycling, arXiv:2502.19261); each expert draws its own units."""
    router: Literal["auto", "random", "copy", "zero"] = "auto"
    """Weights and state of routers. auto: those of a parent with the same router, or of a model of transformers whose
    router computes the same, else random. random: the router's own initial weights. copy: those of the parent, which
    must fit. zero: gates of 0, so that all scores are equal."""

    def __post_init__(self) -> None:
        check_ranges(self, "init.upcycle")
        is_number = self.copies == "all" or self.copies >= 1
        require(is_number, "init.upcycle.copies", self.copies, "all, or a number of experts, at least 1")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Where weights come from before the first step.

    A cell draws its own initial weights first, from its seed, and then takes what its parent has: what the parent lacks
    (routers, new experts) starts as it would without a parent. Weights are taken by name where names and shapes agree.
    Optimizer, schedule and data order start anew.
    """

    from_: str | list[str] | None = None
    """Parent whose weights are taken: run:ID (or run:ID@STEP, of train.keep_checkpoints), a run of the same results
    folder; hf:FOLDER, a model of transformers; stage:NAME, in an experiment with stages. null: none."""
    digest: str | None = None
    """With hf:FOLDER: SHA-256 of the content of the folder, which is computed and recorded; if given, the folder must
    have it."""
    combine: Literal["experts", "average"] | None = None
    """How several parents become one model. average: the mean of their weights. experts: the feed-forward network of
    each dense parent becomes an expert, in their order, and all other weights are averaged (branch-train-mix,
    arXiv:2403.07816). null: there is one parent."""
    combine_weights: list[float] = field(default_factory=list)
    """Weight of each parent in a mean, in their order; they are divided by their sum. Empty: equal weights."""
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    """How experts are made from dense networks."""
    new_experts: Literal["random", "mean", "nearest"] = "random"
    """Initial weights of the experts that a bank has in addition to those of its parent. random: their own initial
    weights. mean: the mean of the parent's experts. nearest, for the routers by domain: a copy of the expert with the
    lowest loss on the training text of the new domain (DEMix, arXiv:2108.05036, section 6)."""
    allow_overlap: bool = False
    """Train even if the parent's training text contains test documents of this cell. By default this is refused,
    because a gain on such documents may be memorised. Not part of the id."""

    def __post_init__(self) -> None:
        num_parents = len(self.parents)
        is_one = num_parents == 1 or self.from_ is None or self.combine is not None
        require(is_one, "init.from", f"a list of {num_parents}", "one parent, or init.combine")
        has_parents = self.combine is None or num_parents > 0
        require(has_parents, "init.combine", self.combine, "null where init.from is null")
        self._check_combination()
        is_digest = self.digest is None or _DIGEST.fullmatch(self.digest) is not None
        require(is_digest, "init.digest", self.digest, "64 hexadecimal digits, or null")

    def _check_combination(self) -> None:
        """Raise UsageError for weights of a mean that are none, and for options that change copies of one network."""
        are_positive = all(0 < weight < math.inf for weight in self.combine_weights)
        require(are_positive, "init.combine_weights", self.combine_weights, "positive numbers")
        is_used = not self.combine_weights or self.combine is not None
        require(is_used, "init.combine_weights", self.combine_weights, "none where init.combine is null")
        is_plain = replace(self.upcycle, router="auto") == UpcycleConfig()
        is_free = self.combine != "experts" or is_plain
        require(is_free, "init.combine", self.combine, "average or null with init.upcycle.copies, noise or drop")

    @cached_property
    def parents(self) -> tuple[Parent, ...]:
        """The sources of weights."""
        names = [self.from_] if isinstance(self.from_, str) else self.from_ or []
        return tuple(map(Parent.parse, names))

    def replace_parents(self, parents: Sequence[Parent]) -> "InitConfig":
        """Return the section with other sources of weights; a single one is no list."""
        names = [str(parent) for parent in parents]
        return replace(self, from_=names[0] if len(names) == 1 else names)

    @property
    def has_parent(self) -> bool:
        """Whether weights come from anywhere but the seed."""
        return bool(self.parents)
