"""Every kind of bad data is refused in one line that names the key or the file, before anything is trained."""

import re
from pathlib import Path
from typing import Any

import pytest
from support.bad_data import TEXT_CASES, BadData
from support.bad_media import MEDIA_CASES

from moebench.config import resolve
from moebench.errors import UsageError
from moebench.tasks.task import TASKS


def prepare(options: dict[str, Any], cache: Path) -> None:
    """Read the data as planning and training do."""
    config = resolve({"task": options})
    task = TASKS.get(config.task.name).item
    task.source_digest(config.task)
    task.prepare(config.task, cache)


@pytest.mark.parametrize("case", TEXT_CASES + MEDIA_CASES, ids=lambda case: case.name)
def test_bad_data_is_refused_in_one_line(tmp_path: Path, case: BadData) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    options = case.write(folder)
    with pytest.raises(UsageError, match=f"^task.data.*{re.escape(case.expected)}") as refused:
        prepare(options, tmp_path / "cache")
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 1000
