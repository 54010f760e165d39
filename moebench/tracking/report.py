"""The summary of a replay."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """What a replay did."""

    experiments: int = 0
    runs: int = 0
    """Number of runs seen."""
    values: int = 0
    """Number of values sent."""
    non_finite: int = 0
    """Number of values left out because they are not finite."""
    problems: tuple[str, ...] = ()
    """One line for each run whose files are damaged; the other runs were sent."""

    def __add__(self, other: "ReplayReport") -> "ReplayReport":
        return ReplayReport(
            experiments=self.experiments + other.experiments,
            runs=self.runs + other.runs,
            values=self.values + other.values,
            non_finite=self.non_finite + other.non_finite,
            problems=self.problems + other.problems,
        )
