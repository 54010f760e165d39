import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.tasks.text.prepared.blocks import choose_split, cut_text, read_parts

SHARES = {"validation": 0.2, "test": 0.1}
TEXT = st.text(alphabet="ab \n", max_size=60)


@given(TEXT, st.integers(2, 9))
def test_parts_add_up_and_are_short(text, size):
    parts = list(cut_text(text, size))
    assert "".join(parts) == text
    assert all(len(part) <= size for part in parts)
    assert list(read_parts(io.StringIO(text, newline=""), size)) == parts


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("abc\ndefgh", ["abc\n", "defgh"]),  # after the last line in the second half of 6 characters
        ("a\nbcd efgh", ["a\nbcd ", "efgh"]),  # that line is in the first half: after the last space
        ("abcdefgh", ["abcdef", "gh"]),
    ],
)
def test_cuts_by_hand(text, parts):
    assert list(cut_text(text, 6)) == parts


def test_splits_are_those_of_the_source_or_of_the_hash():
    splits = [choose_split(f"text/{number}", "train", SHARES) for number in range(5000)]
    # Standard errors: 28 and 21 documents.
    assert abs(splits.count("validation") - 1000) < 150
    assert abs(splits.count("test") - 500) < 110
    assert {choose_split(f"text/{number}", "test", SHARES) for number in range(50)} == {"test"}
    assert {choose_split(f"text/{number}", "train", {"validation": 0.0, "test": 0.0}) for number in range(50)} == {
        "train"
    }
