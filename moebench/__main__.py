"""The entry point: runs a command, and prints a user's mistake as one line, with exit code 2."""

import sys

from moebench import interrupts


def main() -> None:
    """Run the command line and exit with its code."""
    interrupts.record_interrupts()
    try:
        code = _run()
        sys.exit(130 if interrupts.received and code == 0 else code)
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> int:
    import typer

    from moebench.cli import app
    from moebench.cli.encoding import use_replacements
    from moebench.errors import UsageError

    use_replacements()
    try:
        return int(app(prog_name="moebench", standalone_mode=False) or 0)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except typer.Abort:
        return 130
    except Exception as error:
        # An unknown command or option, a missing argument: the command-line library exports no class for them.
        if not hasattr(error, "format_message"):
            raise
        print(f"error: {' '.join(error.format_message().split())} (moebench --help)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    main()
