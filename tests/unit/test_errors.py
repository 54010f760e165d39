"""Messages of one line that stay readable."""

from moebench.errors import MAX_NAMES, build_unknown_error


def test_of_very_many_allowed_names_the_first_are_listed() -> None:
    message = str(build_unknown_error("baseline", "arm 7", [f"arm {n:05d}" for n in range(20_000)]))
    assert message.startswith("baseline: 'arm 7' is unknown. Did you mean 'arm ")
    assert message.endswith(f"arm {MAX_NAMES - 1:05d} and 19,800 more")
    assert str(build_unknown_error("x", "y", ["b", "a"])) == "x: 'y' is unknown. Allowed: a, b"
