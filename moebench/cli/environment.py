"""The environment variables of moebench: a misspelt one would be ignored, and results written to another folder."""

import os
import sys

from moebench.errors import suggest
from moebench.printable import print_text

PREFIX = "MOEBENCH_"
VARIABLES = ("MOEBENCH_KERNELS", "MOEBENCH_RESULTS", "MOEBENCH_TRACKER")
OF_TESTS = "MOEBENCH_TEST_"


def warn_of_unknown_variables() -> None:
    """Print one line on standard error for each variable that has the prefix and is none of these.

    No error: the variables of another version, or of a user's own scripts, prevent nothing.
    """
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in VARIABLES and not name.startswith(OF_TESTS):
            allowed = ", ".join(VARIABLES)
            print_text(
                f"warning: environment variable {name} is unknown and ignored.{suggest(name, VARIABLES)}"
                f" Known: {allowed}",
                file=sys.stderr,
            )
