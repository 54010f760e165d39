"""Tags for the sender alone, which MLflow's UI hides because of their prefix; whether a description was edited."""

import zlib
from collections.abc import Mapping

HIDDEN = "mlflow.moebench."
"""MLflow's UI does not show tags that begin with `mlflow.`; searches find them."""
CELL, RESULTS, CURSOR = f"{HIDDEN}cell", f"{HIDDEN}results", f"{HIDDEN}cursor"
"""Id of the cell, or `EXPERIMENT`; id of the results folder; how far the journal was sent."""
DESCRIBED, SENT, ATTACHED = f"{HIDDEN}described", f"{HIDDEN}sent", f"{HIDDEN}attached"
"""Version of the description that the run has; digests of the result, and of the files of an experiment, sent last."""
NON_FINITE, DATA_DIGEST, GIT_DIRTY = f"{HIDDEN}non_finite", f"{HIDDEN}data_digest", f"{HIDDEN}git_dirty"
NOTE_DIGEST, VIEWS_DIGEST = f"{HIDDEN}note_digest", f"{HIDDEN}views_digest"
"""Checksums of the last description, and of the views of the experiment, that were sent."""
NOTE = "mlflow.note.content"
"""The description of a run or an experiment, in Markdown."""
_EARLIER = "moebench."
"""Prefix of these tags in earlier versions, visible."""


def add_hidden_names(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the tags of a run; those that an earlier version wrote have their names of today too."""
    earlier = {
        f"{HIDDEN}{key.removeprefix(_EARLIER)}": value for key, value in tags.items() if key.startswith(_EARLIER)
    }
    return {**earlier, **tags}


def compute_digest(text: str) -> str:
    """Return the CRC-32 of a text."""
    return f"{zlib.crc32(text.encode()):08x}"


def describe(tags: Mapping[str, str], text: str, *, earlier: str = "") -> dict[str, str]:
    """Return the tags that make `text` the description of a run with these tags.

    Empty where the run has it already, and where the description was edited in the tracker, which is kept. `earlier`: a
    description that versions without a digest wrote.
    """
    current = tags.get(NOTE, "")
    is_ours = tags.get(NOTE_DIGEST) == compute_digest(current) or current in ("", earlier)
    if not is_ours or (current == text and NOTE_DIGEST in tags):
        return {}
    return {NOTE: text, NOTE_DIGEST: compute_digest(text)}
