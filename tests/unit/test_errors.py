"""Messages of one line that stay readable."""

import pytest

from moebench.errors import MAX_GIVEN_LENGTH, MAX_NAMES, UsageError, build_unknown_error, require


def test_of_very_many_allowed_names_the_first_are_listed() -> None:
    message = str(build_unknown_error("baseline", "arm 7", [f"arm {n:05d}" for n in range(20_000)]))
    assert message.startswith("baseline: 'arm 7' is unknown. Did you mean 'arm ")
    assert message.endswith(f"arm {MAX_NAMES - 1:05d} and 19,800 more")
    assert str(build_unknown_error("x", "y", ["b", "a"])) == "x: 'y' is unknown. Allowed: a, b"
    assert str(build_unknown_error("x", "y", ["b, c", "a"])) == "x: 'y' is unknown. Allowed: a, 'b, c'"


def test_a_very_long_given_name_is_cut() -> None:
    message = str(build_unknown_error("train." + "k" * 1028, "k" * 1034, ["seeds"]))
    start = f"train.{'k' * (MAX_GIVEN_LENGTH - 6)}... (1,034 characters)"
    assert message == f"{start}: '{'k' * MAX_GIVEN_LENGTH}... (1,034 characters)' is unknown. Allowed: seeds"
    with pytest.raises(UsageError, match=r"^seed must be a number, got x+\.\.\. \(500 characters\)$"):
        require(False, "seed", "x" * 500, "a number")
