"""The entry point: runs a command, and turns a user's mistake into one line and exit code 2."""

import sys


def main() -> None:
    """Run the command line and exit with its code."""
    from moebench.cli import app
    from moebench.errors import UsageError

    try:
        app(prog_name="moebench")
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
