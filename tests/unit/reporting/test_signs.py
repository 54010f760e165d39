"""Tables write negative numbers with the same sign everywhere."""

import re
from pathlib import Path

import moebench

FORMAT = re.compile(r"\{[^{}]*:\+[^{}]*\}")


def test_signed_numbers_are_formatted_in_one_place() -> None:
    """`format_signed` writes a true minus sign; a format such as `:+.4f` writes a hyphen."""
    for file in Path(moebench.__file__).parent.rglob("*.py"):
        if file.name != "formatting.py":
            assert FORMAT.findall(file.read_text(encoding="utf-8")) == [], file
