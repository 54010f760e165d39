"""What was decided before the runs that are compared: settings that arms chose, and planned seeds."""

from collections.abc import Collection
from dataclasses import dataclass, field

from moebench.experiment.seed_plan import SeedPlan


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How the runs of a comparison came about."""

    tuned_keys: Collection[str] = ()
    """Settings that each arm has chosen on validation, by other seeds."""
    plan: SeedPlan = field(default_factory=SeedPlan)
    """Planned seeds, which decide the level of verdicts; an empty plan: every look has the full level."""
    has_several_data: bool = False
    """Whether arms are adapted to different data: those that have other data than the baseline get no verdict."""


NO_PROTOCOL = Protocol()
