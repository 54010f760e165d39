"""What the words of `moebench compare` and `report` name: one experiment, several, or routers."""

from collections.abc import Sequence
from pathlib import Path

from moebench.errors import UsageError, suggest
from moebench.experiment.files import list_experiments
from moebench.registry import names_without_import

SUFFIXES = (".yaml", ".yml")


def are_experiments(subjects: Sequence[str], command: str = "compare", plugins: Sequence[str] = ()) -> bool:
    """Return whether the words are experiments rather than routers; raise UsageError for a mixture or no word.

    A file and a known name are experiments; every other word is a router, of `plugins` where there are any. Without
    them, an unknown word that looks like the name of an experiment raises UsageError, too.
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
            hint = suggest(unknown[0], [*known, *routers])
            raise UsageError(f"{command}: '{unknown[0]}' is neither an experiment nor a router of the package.{hint}")
        raise UsageError(
            f"{command}: got experiments ({', '.join(experiments)}) and routers ({', '.join(others)}); allowed:"
            " experiments only, or routers only"
        )
    if not experiments and not plugins:
        _check_for_experiment(others, command)
    return bool(experiments)


def _check_for_experiment(subjects: Sequence[str], command: str) -> None:
    """Raise UsageError for a word that is no router of the package and is, but for its spelling, an experiment."""
    experiments, routers = list_experiments(), names_without_import("router")
    for name in subjects:
        if name in routers:
            continue
        file = next((Path(name + suffix) for suffix in SUFFIXES if Path(name + suffix).is_file()), None)
        hint = f" Did you mean the file '{file}'?" if file else suggest(name, [*experiments, *routers])
        if file or any(f"'{experiment}'" in hint for experiment in experiments):
            raise UsageError(f"{command}: '{name}' is neither an experiment nor a router of the package.{hint}")


def is_experiment(subjects: Sequence[str], command: str, plugins: Sequence[str] = ()) -> bool:
    """Return whether the words are one experiment rather than routers; raise UsageError for several, and as above."""
    has_experiments = are_experiments(subjects, command, plugins)
    if has_experiments and len(subjects) > 1:
        raise UsageError(f"{command}: got {', '.join(subjects)} (allowed: one experiment, or routers)")
    return has_experiments
