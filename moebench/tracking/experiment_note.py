"""The description of an experiment in a tracker: question, verdicts, quality of each arm, how to see its curves."""

import json
from collections.abc import Mapping
from typing import Any

from moebench.reporting.table import format_markdown_row
from moebench.runs.experiment_summary import REPORT_FILE, ExperimentSummary, SummaryTable
from moebench.tracking.trivial_baselines import list_baselines

MAX_LENGTH, MAX_TAG_LENGTH = 5000, 4000
"""Characters of a description and of another tag that every tracker takes."""
MAX_SENTENCES, MAX_ROWS = 40, 40
GUIDE = (
    "**Curves**: on the page of runs, open *By router* or *By arm* under *Views*, or choose *Group by* `router.name`,"
    " and switch to the charts: a line for each router, the mean over seeds, and a band from the lowest to the highest."
    f" **Tables** and, where it was built, the report: `comparison.json` and `{REPORT_FILE}` under *Artifacts*."
)


def build_experiment_note(experiment: Mapping[str, Any], summary: ExperimentSummary | None, mark: str) -> str:
    """Return the description in Markdown; `mark`: how the baseline arm compares with trivial baselines."""
    question = str(experiment.get("question") or "")
    parts = [f"**{question}**" if question else ""]
    if summary:
        parts.append("\n".join(f"- {sentence}" for sentence in summary.sentences[:MAX_SENTENCES]))
        parts += [_format_table(table) for table in summary.tables[:1]]
    parts += [mark, list_baselines(experiment)] if not summary else []
    text = "\n\n".join(part for part in [*parts, GUIDE] if part)
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 2]} …"


def describe_tuning(experiment: Mapping[str, Any]) -> dict[str, str]:
    """Return the tag with what each arm of an experiment has chosen in tuning; none without tuning."""
    tuning = experiment.get("tuning")
    arms = tuning.get("arms") if isinstance(tuning, Mapping) else None
    if not isinstance(arms, Mapping):
        return {}
    chosen = {str(arm): choice.get("chosen") for arm, choice in arms.items() if isinstance(choice, Mapping)}
    return {"tuned": json.dumps(chosen)[:MAX_TAG_LENGTH]}


def _format_table(table: SummaryTable) -> str:
    rules = ["---"] * len(table.columns)
    rows = [format_markdown_row(cells) for cells in (table.columns, rules, *table.rows[:MAX_ROWS])]
    return "\n".join([f"{table.title}:", "", *rows])
