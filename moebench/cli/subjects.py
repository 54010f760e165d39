"""What the words of `moebench compare` and `report` name: one experiment, several, or routers."""

from collections.abc import Sequence

from moebench.errors import UsageError, nearest
from moebench.experiment.files import list_experiments
from moebench.registry import names_without_import

SUFFIXES = (".yaml", ".yml")


def are_experiments(subjects: Sequence[str], command: str = "compare") -> bool:
    """Return whether the words are experiments rather than routers; raise UsageError for a mixture or no word.

    A file and a known name are experiments; every other word is a router.
    """
    known = list_experiments()
    experiments = [name for name in subjects if name.endswith(SUFFIXES) or "/" in name or name in known]
    others = [name for name in subjects if name not in experiments]
    if not subjects:
        raise UsageError(f"{command}: got neither an experiment nor a router (allowed: experiments, or routers)")
    if experiments and others:
        routers = names_without_import("router")
        unknown = [name for name in others if name not in routers]
        if unknown:
            hint = nearest(unknown[0], [*known, *routers])
            raise UsageError(f"{command}: '{unknown[0]}' is no experiment, and no router of the package.{hint}")
        raise UsageError(
            f"{command}: got experiments ({', '.join(experiments)}) and routers ({', '.join(others)}); allowed:"
            " experiments only, or routers only"
        )
    return bool(experiments)


def is_experiment(subjects: Sequence[str], command: str) -> bool:
    """Return whether the words are one experiment rather than routers; raise UsageError for several, and as above."""
    has_experiments = are_experiments(subjects, command)
    if has_experiments and len(subjects) > 1:
        raise UsageError(f"{command}: got {', '.join(subjects)} (allowed: one experiment, or routers)")
    return has_experiments
