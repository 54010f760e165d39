"""docs/reliability.md: every guarantee names a test that exists."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_named_tests_exist() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith("| tested")]
    without = [row for row in rows if not re.search(r"`test_\w+(\.py)?`[^|]*\|$", row)]
    assert rows
    assert not without
    files = list((ROOT / "tests").rglob("test_*.py"))
    defined = {file.name for file in files}
    for file in files:
        defined |= {*re.findall(r"^ *def (test_\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE)}
    assert {*re.findall(r"`(test_\w+(?:\.py)?)`", page)} - defined == set()
