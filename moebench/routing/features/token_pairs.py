"""Token pairs: how often each token id is followed by each other in the training split."""

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from moebench.routing.features.feature import Feature, TaskView


@dataclass(frozen=True)
class TokenPairs(Feature):
    """int64 counts, [V, V]: row id followed by column id; a build-time value of tasks that read text."""

    description = "counts of pairs of token ids"

    @override
    def from_task(self, task: TaskView) -> Any | None:
        return None if task.token_count_V is None else task.token_pairs()
